"""Why wide rounds cost on a mixture of experts: distinct experts, and measured verification.

Left, the experts of a layer that some of n tokens choose: if they choose independently (lines), and
of successive tokens of a text (crosses: mimo-tiny, modules that it was not trained on).  Right,
from benchmarks/results/speculative_flash_h100.json and speculative_flash_8_rows_h100.json: what
verifying so many tokens takes, with a plain step as a width of 1.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from sources import ROOT, held_out, result

import mimo_jax as mj
from mimo_jax import explore
from mimo_jax.explore import plots

MOST, TINY = 8, "mimo-tiny"
PRESETS = {
    "MiMo-V2.5-Pro-FP4-DFlash": ("V2.5-Pro", plots.SLIDING),
    "MiMo-V2.6-Flash-RL": ("V2.6-Flash", plots.FULL),
    TINY: (TINY, plots.THIRD),
}


def of_text(lm: mj.LanguageModel) -> list[float]:
    """Experts that n successive tokens choose, n = 1, 2, ...: the mean of layers and places."""
    ids = [i for name, text in held_out().items() if "/" not in name for i in lm.encode(text)]
    seen = explore.taps(lm, np.reshape(ids[: 32 * 256], (32, 256)), "experts.*")
    chosen = np.stack([a.values for name, a in seen.items() if name != "tokens"])
    used = np.eye(lm.config.n_routed_experts, dtype=bool)[chosen].any(axis=-2)  # [L, B, T, E]
    starts = used.shape[2] - MOST
    union, means = used[:, :, :starts], []
    for n in range(MOST):
        union = union | used[:, :, n : n + starts]
        means.append(float(union.sum(axis=-1).mean()))
    return means


def experts(ax: Axes) -> None:
    """Experts that are read, by tokens."""
    n = np.arange(1, MOST + 1)
    lm = mj.load(TINY)
    for preset, (name, color) in PRESETS.items():
        config = lm.config if preset == TINY else mj.MiMoConfig.from_pretrained(preset)
        total, each = config.n_routed_experts, config.num_experts_per_tok
        label = f"{name}: {each} of {total} a token"
        read = total * (1 - (1 - each / total) ** n)
        print(name, read.round(1))
        ax.plot(n, read, "o-", color=color, label=label)
    measured = of_text(lm)
    print("of a text", np.round(measured, 1))
    ax.plot(n, measured, "x", color=plots.THIRD, label=f"{TINY}, tokens of a text")
    ax.set(xlabel="tokens", ylabel="experts of a layer that are read", title="Distinct experts")
    ax.set_ylim(0, 75)
    ax.legend()


def times(ax: Axes) -> None:
    """Milliseconds of a verification, by its width."""
    for file, color in (("", plots.FULL), ("_8_rows", plots.THIRD)):
        measured = result(f"speculative_flash{file}_h100.json")
        found = [row for row in measured["rows"] if row["drafter"] == "dflash"]
        widths = [1, *(row["width"] for row in found)]
        seconds = [found[0]["plain_s"], *(row["verify_s"] for row in found)]
        label = f"{found[0]['rows']} row{'s' * (found[0]['rows'] > 1)}"
        ax.plot(widths, np.multiply(seconds, 1000), "o-", color=color, label=label)
    ax.set(xlabel="width: tokens of a row verified at once", ylabel="milliseconds")
    ax.set_title("18 layers of V2.6-Flash on an H100")
    ax.set_ylim(bottom=0)
    ax.legend()


def main() -> None:
    """Draws both beside each other."""
    plt.rcParams.update(plots.STYLE)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.3))
    experts(left)
    times(right)
    for ax in (left, right):
        ax.set_xticks(range(1, MOST + 1))
    figure.savefig(ROOT / "docs" / "images" / "experts_read.png", dpi=110)


if __name__ == "__main__":
    main()
