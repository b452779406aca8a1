"""Which keys each token sees in a full and in a sliding layer of the releases, by the model's own
function, over 512 tokens."""

from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from mimo_jax.config import MiMoConfig
from mimo_jax.explore import plots
from pallas_kernels.attention.reference import visible

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 512
QUERY = 400


def draw() -> None:
    """A mask a kind of layer, with the row of one query marked."""
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.7), sharey=True)
    layers = {s.kind: s for s in MiMoConfig.from_pretrained("MiMo-V2.6-Flash-RL").layers}
    first, newest = jnp.zeros(1, jnp.int32), jnp.full(1, TOKENS - 1)
    for ax, kind, colour in zip(axes, layers, (plots.FULL, plots.SLIDING), strict=True):
        window = layers[kind].window
        seen = visible(first, first, newest, (TOKENS, TOKENS), window=window)[0]
        oldest, count = seen.argmax(axis=1), seen.sum(axis=1)
        ax.fill_betweenx(np.arange(TOKENS), oldest, oldest + count, color=colour, lw=0)
        keys = jnp.flatnonzero(seen[QUERY])
        ink = plots.PAPER if window is None else plots.INK
        ax.plot([int(keys[0]), QUERY], [QUERY, QUERY], color=ink, lw=1.5)
        at = (QUERY / 2, "center") if window is None else (QUERY + 8, "left")
        text = f"query {QUERY} sees {len(keys)} keys"
        ax.text(at[0], QUERY - 8, text, ha=at[1], va="bottom", fontsize=8, color=ink)
        ax.set(xlabel="position of the key", xlim=(0, TOKENS), ylim=(TOKENS, 0), aspect="equal")
        ax.set_title(f"{kind} attention")
    axes[0].set_ylabel("position of the query")
    figure.align_labels()


if __name__ == "__main__":
    plt.rcParams.update(plots.STYLE)
    draw()
    plt.savefig(ROOT / "docs" / "images" / "windows.png", dpi=100)
