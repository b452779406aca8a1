"""Which keys the rows of DFlash's block see, in the configuration of V2.5-Pro-FP4-DFlash.

The mask is the one that the drafter's attention computes with.  Of the 1151 positions that are in
sight only both ends are drawn.
"""

from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

import mimo_jax as mj
from mimo_jax.explore import plots
from mimo_jax.model.cache import RING_SLACK
from pallas_kernels.decode_attention.reference import slot_positions, visible_slots

ROOT = Path(__file__).resolve().parents[2]
ANCHOR = 5000
EDGE = 12


def main() -> None:
    """Draws the far end of the context beside the near end and the block."""
    plt.rcParams.update(plots.STYLE)
    config = mj.DFlashConfig.from_pretrained("MiMo-V2.5-Pro-FP4-DFlash")
    block, window = config.block_size, config.sliding_window
    at = ANCHOR + jnp.arange(block)[None]
    slots = window + RING_SLACK
    seen = visible_slots(at, (block, slots), window=window, causal=False)[0]
    held = np.asarray(slot_positions(at.max(axis=1), slots, ring=True)[0])
    order = np.argsort(held)
    offset, seen = held[order] - ANCHOR, np.asarray(seen)[:, order]
    kinds = np.where(seen, np.where(offset >= 0, 2, 1), 0)
    colors = ListedColormap([plots.PAPER, plots.FULL, plots.SLIDING])
    parts = ((-window - 1, -window - 1 + EDGE), (block - EDGE - 4, block))
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.9), sharey=True, width_ratios=(EDGE, EDGE + 4))
    for ax, (first, last) in zip(axes, parts, strict=True):
        shown = (offset >= first) & (offset < last)
        grid = (np.arange(first, last + 1) - 0.5, np.arange(block + 1) - 0.5)
        ax.pcolormesh(*grid, kinds[:, shown], cmap=colors, vmin=0, vmax=2, ec=plots.PALE, lw=0.5)
        ticks = [i for i in range(first, last) if i % 4 == 0]
        ax.set_xticks(ticks, [f"s{i:+d}" if i else "s" for i in ticks])
        ax.set_xlabel("position of the key")
    axes[0].invert_yaxis()
    axes[0].set_yticks(range(block), ["s (anchor)", *(f"s+{r} (mask)" for r in range(1, block))])
    axes[0].set(ylabel="position of the query", title="the oldest context in sight")
    axes[1].set_title("the newest context (blue) and the block itself (orange)")
    figure.savefig(ROOT / "docs" / "images" / "dflash.png", dpi=110)


if __name__ == "__main__":
    main()
