"""What the slots of a small ring hold after successive steps, some of whose tokens are rejected;
written and located by the model's own functions."""

from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch, Rectangle

from mimo_jax.explore import plots
from pallas_kernels.decode_attention.reference import slot_positions, visible_slots
from pallas_kernels.rotate_and_store.reference import store

ROOT = Path(__file__).resolve().parents[2]
WINDOW, SLACK = 4, 4
SLOTS = WINDOW + SLACK
# Position of the first token of a step, how many it writes, how many of these are kept.
STEPS = ((0, 6, 6), (6, 5, 2), (8, 1, 1), (9, 5, 4))
COLOURS = {
    "in the window of the last token that is kept": plots.SLIDING,
    "older": "#f3d6bf",
    "rejected": "#cdd3d9",
    "never written": plots.PAPER,
}


def draw() -> None:
    """A row of slots a step, each with the position that is in it."""
    _, ax = plt.subplots(figsize=(8.6, 3.3))
    ring = jnp.full((1, SLOTS, 1, 1), -1.0)
    rejected: set[int] = set()
    for row, (start, count, kept) in enumerate(STEPS):
        positions = jnp.arange(start, start + count)[None]
        ring = store(ring, positions[..., None, None].astype(ring.dtype), positions, ring=True)
        there = np.asarray(ring[0, :, 0, 0]).astype(int)
        rejected = {p for p in rejected if p >= start + count}
        rejected |= set(range(start + kept, start + count))
        taken_for = np.asarray(slot_positions(positions.max(axis=1), SLOTS, ring=True))[0]
        seen = np.asarray(visible_slots(positions, (count, SLOTS), window=WINDOW))[0, kept - 1]
        for slot, (held, taken) in enumerate(zip(there, taken_for, strict=True)):
            kind = 3 if held < 0 else 2 if int(held) in rejected else 0 if seen[slot] else 1
            assert not seen[slot] or (held == taken and kind == 0)
            _cell(ax, slot, row, int(held), int(taken), list(COLOURS.values())[kind])
    labels = [_label(*step) for step in STEPS]
    ax.set_yticks(range(len(STEPS)), labels)
    ax.set_xticks(range(SLOTS))
    ax.set(xlim=(-0.5, SLOTS - 0.5), ylim=(len(STEPS) - 0.5, -0.5), xlabel="slot")
    ax.tick_params(length=0)
    ax.spines[["left", "bottom"]].set_visible(False)
    patches = [Patch(fc=colour, ec=plots.PALE, label=name) for name, colour in COLOURS.items()]
    ax.figure.legend(handles=patches, loc="outside upper center", ncols=4)


def _cell(ax: plt.Axes, slot: int, row: int, held: int, taken: int, colour: str) -> None:
    box = Rectangle((slot - 0.46, row - 0.42), 0.92, 0.84, facecolor=colour, edgecolor=plots.PALE)
    ax.add_patch(box)
    if held >= 0:
        ink = plots.PAPER if colour == plots.SLIDING else plots.INK
        ax.text(slot, row - 0.06, held, ha="center", va="center", color=ink, fontsize=11)
    if 0 <= held != taken:
        ax.text(slot, row + 0.27, f"taken for {taken}", ha="center", va="center", fontsize=7)


def _label(start: int, count: int, kept: int) -> str:
    if count == 1:
        return f"{start} is written"
    return f"{start} to {start + count - 1} are written,\n{kept} of {count} are kept"


if __name__ == "__main__":
    plt.rcParams.update(plots.STYLE)
    draw()
    plt.savefig(ROOT / "docs" / "images" / "ring.png", dpi=100)
