"""The kinds of layers of each published configuration, and of mimo-tiny, in their order."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from mimo_jax.config import MiMoConfig
from mimo_jax.explore import plots

ROOT = Path(__file__).resolve().parents[2]
MODELS = {
    "V2-Flash, V2.5,\nV2.6-Flash": "MiMo-V2.6-Flash-RL",
    "V2.5-Pro,\nV2.6-Pro": "MiMo-V2.5-Pro",
    "mimo-tiny": ROOT / "mimo_jax" / "assets" / "mimo-tiny",
}
COLOURS = {"full": plots.FULL, "sliding": plots.SLIDING}


def draw() -> None:
    """A row of squares a model, with a strip below for what follows attention."""
    _, ax = plt.subplots(figsize=(8.6, 2.5))
    for row, name in enumerate(MODELS.values()):
        for spec in MiMoConfig.from_pretrained(name).layers:
            ax.barh(row, 0.86, 0.5, spec.index - 0.43, color=COLOURS[spec.kind])
            feed_forward = plots.PALE if spec.moe else plots.INK
            ax.barh(row + 0.36, 0.86, 0.14, spec.index - 0.43, color=feed_forward)
    ax.set_yticks(range(len(MODELS)), list(MODELS))
    ax.set(xlabel="layer", xlim=(-1, 70), ylim=(len(MODELS) - 0.4, -0.4))
    ax.tick_params("y", length=0)
    ax.spines["left"].set_visible(False)
    what = {
        "full attention": plots.FULL,
        "sliding window": plots.SLIDING,
        "experts": plots.PALE,
        "dense feed-forward": plots.INK,
    }
    patches = [Patch(color=colour, label=name) for name, colour in what.items()]
    ax.figure.legend(handles=patches, loc="outside upper right", ncols=4)


if __name__ == "__main__":
    plt.rcParams.update(plots.STYLE)
    draw()
    plt.savefig(ROOT / "docs" / "images" / "layers.png", dpi=110)
