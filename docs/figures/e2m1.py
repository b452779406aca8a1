"""The codes of MXFP4 and of block FP8, and what rounding to them changes.

Both for a block whose largest weight is just below 8: MXFP4 then has the scale 1, and block FP8 the
scale 8 / 448.
"""

from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from mimo_jax.explore import plots
from mimo_jax.quant import dequantize, quantize_fp8, quantize_mxfp4

ROOT = Path(__file__).resolve().parents[2]
LARGEST = np.float32(7.999)
COLUMNS = {"MXFP4": 32, "FP8": 128}
ROWS = {"MXFP4": 1, "FP8": 128}
QUANTIZE = {"MXFP4": quantize_mxfp4, "FP8": quantize_fp8}
COLORS = {"MXFP4": plots.SLIDING, "FP8": plots.FULL}


def rounded(w: np.ndarray, name: str) -> np.ndarray:
    """Weights after rounding, each in a block whose largest weight is LARGEST."""
    rows, columns = ROWS[name], COLUMNS[name]
    blocks = -(-len(w) // (rows * (columns - 1)))
    padded = np.resize(w, (blocks * rows, columns - 1))
    matrix = np.concatenate([padded, np.full((blocks * rows, 1), LARGEST)], axis=1)
    back = np.asarray(dequantize(QUANTIZE[name](jnp.asarray(matrix)), "float32"))
    return back[:, :-1].ravel()[: len(w)]


def codes(ax: Axes, w: np.ndarray) -> None:
    """The sizes that there are."""
    for y, name in enumerate(QUANTIZE):
        sizes = np.unique(rounded(w, name))
        print(name, len(sizes), sizes[:9])
        ax.plot(sizes[sizes > 0], np.full((sizes > 0).sum(), y), "|", ms=16, color=COLORS[name])
    ax.set(yticks=range(len(QUANTIZE)), yticklabels=list(QUANTIZE), ylim=(-0.6, 1.6))
    ax.set_title("Sizes of weights that there are, in a block whose largest is almost 8")


def errors(ax: Axes, w: np.ndarray) -> None:
    """How far each weight is moved."""
    for name in QUANTIZE:
        error = np.abs(rounded(w, name) / w - 1)
        ax.plot(w, 100 * error, color=COLORS[name], label=name, lw=1)
    ax.set(xlabel="weight, as multiples of MXFP4's scale", ylabel="rounding moves it by, %")
    ax.set_ylim(0, 105)


def main() -> None:
    """Draws the codes above the errors."""
    plt.rcParams.update(plots.STYLE)
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(7.6, 4.2), sharex=True, height_ratios=(1, 2)
    )
    w = np.geomspace(1 / 16, LARGEST, 6000).astype(np.float32)
    codes(top, w)
    errors(bottom, w)
    bottom.set_xscale("log", base=2)
    bottom.set_xticks([1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 3, 4, 6, 8])
    bottom.xaxis.set_major_formatter("{x:g}")
    figure.savefig(ROOT / "docs" / "images" / "e2m1.png", dpi=110)


if __name__ == "__main__":
    main()
