"""What the selection bias does: the load of mimo-tiny's experts, with it and without it.

Pieces of the modules of the standard library that mimo-tiny was not trained on go through the
model.  At every MoE layer the experts are chosen twice from the same scores: with the bias, as the
model does, and without.
"""

import matplotlib.pyplot as plt
import numpy as np
from sources import ROOT, held_out

import mimo_jax as mj
from mimo_jax import explore
from mimo_jax.explore import plots

LENGTH, EVERY, ROWS = 256, 4096, 32


def pieces_of(lm: mj.LanguageModel) -> np.ndarray:
    """Pieces of the modules that the corpus keeps apart."""
    pieces = []
    for text in held_out().values():
        ids = lm.encode(text)
        pieces += [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH, EVERY)]
    return np.array(pieces[: len(pieces) // ROWS * ROWS])


def loads(lm: mj.LanguageModel, pieces: np.ndarray) -> dict[int, np.ndarray]:
    """By layer, tokens of each expert as multiples of its fair share: [with bias or not, E]."""
    config = lm.config
    layers = [s.index for s in config.layers if s.moe]
    counts = {i: np.zeros((2, config.n_routed_experts)) for i in layers}
    for rows in np.split(pieces, len(pieces) // ROWS):
        seen = explore.taps(lm, rows, "router.*", "experts.*")
        for i in layers:
            best = np.argsort(-seen[f"router.{i}"].values, axis=-1, kind="stable")
            pair = (seen[f"experts.{i}"].values, best[..., : config.num_experts_per_tok])
            for which, chosen in enumerate(pair):
                counts[i][which] += np.bincount(chosen.ravel(), minlength=config.n_routed_experts)
    return {i: c / c.mean(axis=1, keepdims=True) for i, c in counts.items()}


def main() -> None:
    """Draws the loads of all layers into one picture."""
    plt.rcParams.update(plots.STYLE)
    lm = mj.load("mimo-tiny")
    pieces = pieces_of(lm)
    found = loads(lm, pieces)
    ax = plt.subplots(figsize=(7.6, 3.2))[1]
    ax.axhline(1, color=plots.PALE, lw=1)
    kinds = (("with the bias", plots.FULL, -0.15), ("without it", plots.SLIDING, 0.15))
    for which, (name, color, shift) in enumerate(kinds):
        for i, both in found.items():
            at = np.full(both.shape[1], i + shift)
            label = name if i == min(found) else None
            style = {"ms": 4.5, "alpha": 0.6, "color": color, "mec": "none", "label": label}
            ax.plot(at, both[which], "o", **style)
            print(f"layer {i} {name}: {both[which].min():.2f} to {both[which].max():.2f}")
    ax.set(xlabel="layer", ylabel="times its fair share", xticks=list(found), ylim=(0, 2))
    ax.set_title(
        f"Load of mimo-tiny's {lm.config.n_routed_experts} experts, {pieces.size:,} tokens"
    )
    ax.legend(loc="upper left", ncols=2)
    ax.figure.savefig(ROOT / "docs" / "images" / "routing.png", dpi=110)


if __name__ == "__main__":
    main()
