"""Proposals kept by position: mimo-tiny's drafters on 64 held-out prompts, measured on an H100.

From benchmarks/results/acceptance_tiny_h100.json.
"""

import matplotlib.pyplot as plt
from sources import ROOT, result

from mimo_jax.explore import plots

NAMES = {"dflash": ("DFlash", plots.FULL), "mtp": ("MTP", plots.SLIDING)}


def main() -> None:
    """Draws both drafters, greedy and at temperature 1."""
    plt.rcParams.update(plots.STYLE)
    measured = result("acceptance_tiny_h100.json")
    ax = plt.subplots(figsize=(6.4, 3.2))[1]
    for drafter, (name, color) in NAMES.items():
        for run in measured[drafter]:
            shares, sampled = run["accepted_by_position"], run["temperature"] > 0
            how = f"temperature {run['temperature']:g}" if sampled else "greedy"
            ax.plot(
                range(1, len(shares) + 1),
                shares,
                "o--" if sampled else "o-",
                color=color,
                label=f"{name}, {how}: {run['acceptance_length']:.1f} tokens a round",
            )
    ax.set(xlabel="position of the proposal", ylabel="share of rounds that keep it", ylim=(0, 1))
    ax.set_title("mimo-tiny's drafters on held-out prompts")
    ax.legend()
    ax.figure.savefig(ROOT / "docs" / "images" / "kept.png", dpi=110)


if __name__ == "__main__":
    main()
