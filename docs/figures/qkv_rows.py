"""The rows of a fused QKV matrix as V2.6-Flash stores them, and in the order its name suggests.

    python docs/figures/qkv_rows.py

Writes docs/images/qkv_rows.png.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from mimo_jax.checkpoint.qkv import chunk_rows, fused_scale_rows
from mimo_jax.config import LayerSpec, MiMoConfig
from mimo_jax.explore.plots import FULL, INK, SLIDING, STYLE, THIRD
from mimo_jax.model.parameters import QKVRows

MODEL = "MiMo-V2.6-Flash-RL"
COLOURS = {"queries": FULL, "keys": SLIDING, "values": THIRD}


def rows_of(spec: LayerSpec) -> QKVRows:
    """Rows of all heads of a layer."""
    k = spec.num_kv_heads
    return QKVRows(spec.num_heads * spec.head_dim, k * spec.head_dim, k * spec.v_head_dim)


def draw(ax: Axes, y: float, total: QKVRows, chunks: int) -> None:
    """A bar with the rows of a matrix, chunk after chunk."""
    one, begin = chunk_rows(total, chunks), 0
    for _ in range(chunks):
        for size, colour in zip((one.q, one.k, one.v), COLOURS.values(), strict=True):
            ax.barh(y, size, left=begin, height=0.62, color=colour)
            begin += size
        ax.plot([begin, begin], [y - 0.42, y + 0.42], color=INK, lw=1)
    scales = fused_scale_rows(total, chunks)
    ax.text(begin + 120, y, f"{scales} scale rows", va="center", fontsize=8)


def main() -> None:
    """Draws and writes the figure."""
    plt.rcParams.update(STYLE)
    config = MiMoConfig.from_pretrained(MODEL)
    kinds = {spec.kind: spec for spec in reversed(config.layers)}
    ax = plt.subplots(figsize=(9, 2.9))[1]
    labels, places = [], []
    for i, kind in enumerate(("full", "sliding")):
        total = rows_of(kinds[kind])
        for j, (chunks, name) in enumerate(((config.qkv_chunks, "stored"), (1, "[Q; K; V]"))):
            places.append(2.3 * i + j)
            labels.append(f"{kind}, {name}")
            draw(ax, places[-1], total, chunks)
    ax.set_yticks(places, labels)
    ax.invert_yaxis()
    ax.set(xlabel="row of qkv_proj.weight", xlim=(0, 17200))
    ax.set_title(f"{MODEL}: {config.qkv_chunks} chunks, with scale blocks of their own")
    patches = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    ax.legend(handles=patches, ncols=3, loc="lower right", bbox_to_anchor=(1, 0.98))
    Path("docs/images").mkdir(exist_ok=True)
    plt.savefig("docs/images/qkv_rows.png")


if __name__ == "__main__":
    main()
