"""README's picture: a layer of experts, and what a layer adds to a step, both measured on an H100.

Left, from benchmarks/results/moe_h100.json: the feed-forward of one layer of V2.5-Pro by number of
tokens.  Right, from benchmarks/results/model_h100.json: what a layer of V2.6-Flash adds to a step.
"""

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from sources import ROOT, result

from mimo_jax.explore import plots

PLAIN = "plain XLA"


def experts(ax: Axes) -> None:
    """Milliseconds of a layer of experts: ours, plain XLA, and a copy of the bytes it must read."""
    measured = result("moe_h100.json")
    copy = measured["ceilings"]["copy_bytes_s"]
    ours: dict[int, tuple[float, float]] = {}
    plain: dict[int, float] = {}
    for row in measured["rows"]:
        preset, tokens = row["case"].split()
        if row["operation"] != "moe" or preset != "pro":
            continue
        if row["backend"] == PLAIN:
            plain[int(tokens)] = row["seconds"]
        elif row["seconds"] < ours.get(int(tokens), (float("inf"),))[0]:
            ours[int(tokens)] = row["seconds"], row["bytes"] / copy
    few = {tokens: times for tokens, times in ours.items() if tokens <= 64}
    ax.loglog(list(plain), [1e3 * s for s in plain.values()], "o-", color=plots.PALE, label=PLAIN)
    ax.loglog(list(ours), [1e3 * s for s, _ in ours.values()], "o-", label="mimo-jax")
    ax.loglog(list(few), [1e3 * s for _, s in few.values()], ":", label="a copy of what it reads")
    ax.set_xticks([1, 4, 16, 64, 256, 1024, 8192])
    ax.xaxis.set_major_formatter("{x:.0f}")
    ax.minorticks_off()
    ax.set_xlabel("tokens")
    ax.set_ylabel("milliseconds")
    ax.set_title("One MoE layer of V2.5-Pro (384 experts, MXFP4)")
    ax.legend()


def added(whole: dict[str, Any], less: dict[str, Any], rows: int) -> float:
    """Milliseconds that a layer adds to a step of so many rows, from two numbers of layers."""
    longer, shorter = (
        next(s["step_ms"] for s in r["steps"] if s["rows"] == rows and "step_ms" in s)
        if "steps" in r
        else r["step_ms"][str(rows)]
        for r in (whole, less)
    )
    return (longer - shorter) / (whole["layers"] - less["layers"])


def steps(ax: Axes) -> None:
    """What a layer of V2.6-Flash adds to a decode step, beside transformers."""
    measured = result("model_h100.json")
    theirs = measured["transformers"]
    both = [("transformers", theirs), ("mimo-jax", measured)]
    for place, (name, run) in enumerate(both):
        times = [added(run, run["fewer"][0], rows) for rows in (1, 8)]
        color = plots.PALE if name == "transformers" else plots.FULL
        bars = ax.bar([x + 0.4 * place for x in (0, 1)], times, 0.38, color=color, label=name)
        ax.bar_label(bars, fmt="%.2f", padding=2)
    ax.set_xticks([0.2, 1.2], ["1 row", "8 rows"])
    ax.set_ylabel("milliseconds a layer")
    ax.set_title("A decode step of V2.6-Flash, random weights")
    ax.legend()


def main() -> None:
    """Draws both beside each other."""
    plt.rcParams.update(plots.STYLE)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=(3, 2))
    experts(left)
    steps(right)
    figure.savefig(ROOT / "docs" / "images" / "overview.png", dpi=110)


if __name__ == "__main__":
    main()
