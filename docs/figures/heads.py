"""How many positions a turn of each rotary pair takes, by the two bases of V2.6-Flash, beside the
window and the longest context."""

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from mimo_jax.config import MiMoConfig
from mimo_jax.explore import plots

ROOT = Path(__file__).resolve().parents[2]


def draw() -> None:
    """A line a kind of layer; a pair below a dashed line comes round within that distance."""
    _, ax = plt.subplots(figsize=(7.0, 3.4))
    config = MiMoConfig.from_pretrained("MiMo-V2.6-Flash-RL")
    layers = {s.kind: s for s in config.layers}
    reach = {"full": config.max_position_embeddings, "sliding": config.sliding_window}
    names = {"full": "the longest context", "sliding": "the window"}
    for kind, colour in (("full", plots.FULL), ("sliding", plots.SLIDING)):
        spec = layers[kind]
        pair = np.arange(spec.rotary_dim // 2)
        turn = 2 * math.pi * spec.rope_theta ** (2 * pair / spec.rotary_dim)
        label = f"{kind} layers, base {spec.rope_theta:,.0f}"
        ax.plot(pair, turn, "o-", ms=4, color=colour, label=label)
        ax.axhline(reach[kind], color=colour, ls="--", lw=1)
        text = f" {names[kind]}: {reach[kind]:,}"
        ax.text(-0.6, reach[kind] * 1.15, text, color=colour, fontsize=8, va="bottom")
    ax.set(xlabel="rotary pair i (dimensions i and i + 32 of a head)", xlim=(-0.8, 32))
    ax.set(ylabel="positions a turn", yscale="log", title="How slowly each pair turns")
    ax.legend(loc="lower right")


if __name__ == "__main__":
    plt.rcParams.update(plots.STYLE)
    draw()
    plt.savefig(ROOT / "docs" / "images" / "heads.png", dpi=100)
