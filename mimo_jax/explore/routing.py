"""Which experts tokens go to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from mimo_jax.explore.named import NamedArray
from mimo_jax.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Favourite:
    """A token that an expert gets often.

    Attributes:
      token: its id.
      sent: how often the expert got it.
      seen: how often the text has it.
    """

    token: int
    sent: int
    seen: int


@dataclasses.dataclass(frozen=True, eq=False)
class RouterStats:
    """The routing of P tokens in L layers, to X of E experts each.

    Attributes:
      layers: indices of the layers.
      tokens: the tokens' ids.
      chosen: the experts of each token.
      weights: what their outputs are multiplied by, in the same order.
      counts: how many tokens each expert got.
      shares: sums of the weights that each expert got.
    """

    layers: tuple[int, ...]
    tokens: Int[np.ndarray, " P"]
    chosen: Int[np.ndarray, "L P X"]
    weights: Float[np.ndarray, "L P X"]
    counts: Int[np.ndarray, "L E"]
    shares: Float[np.ndarray, "L E"]

    @property
    def load(self) -> Float[np.ndarray, "L E"]:
        """Counts as multiples of what an expert would get if all got the same."""
        return self.counts / self.counts.mean(axis=1, keepdims=True)

    def favourites(
        self, layer: int, expert: int, *, most: int = 8, least: int = 3
    ) -> list[Favourite]:
        """The tokens of which an expert gets the largest part.

        Args:
          layer: its index in the model.
          expert: its index in the layer.
          most: how many to return.
          least: tokens that the text has less often don't count.

        Raises:
          ValueError: the layer is not among those that were looked at.
        """
        if layer not in self.layers:
            raise ValueError(f"layer {layer} is not among {self.layers}")
        mine = (self.chosen[self.layers.index(layer)] == expert).any(axis=1)
        ids, seen = np.unique(self.tokens, return_counts=True)
        sent = np.array([mine[self.tokens == i].sum() for i in ids])
        order = sorted(
            np.flatnonzero((seen >= least) & (sent > 0)),
            key=lambda j: (-sent[j] / seen[j], -sent[j], ids[j]),
        )
        return [Favourite(int(ids[j]), int(sent[j]), int(seen[j])) for j in order[:most]]


def router_stats(lm: LanguageModel, seen: Mapping[str, NamedArray]) -> RouterStats:
    """Counts and weights of the experts that tokens went to.

    Args:
      lm: the model.
      seen: what `taps` gave for `router.*` and `experts.*`, or for some of these layers.

    Raises:
      ValueError: no layer has both.
    """
    layers = [s.index for s in lm.config.layers if f"experts.{s.index}" in seen]
    layers = tuple(i for i in layers if f"router.{i}" in seen)
    if not layers:
        raise ValueError('no layer\'s routing was tapped; ask for "router.*" and "experts.*"')
    config, experts = lm.config, lm.config.n_routed_experts
    chosen = np.stack([_by_token(seen[f"experts.{i}"]) for i in layers])
    scores = np.stack([_by_token(seen[f"router.{i}"]) for i in layers]).astype(np.float32)
    weights = np.take_along_axis(scores, chosen, axis=-1)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    weights = weights * np.float32(config.routed_scaling_factor or 1.0)
    flat = [c.ravel() for c in chosen]
    return RouterStats(
        layers,
        np.asarray(seen["tokens"]).ravel(),
        chosen,
        weights,
        np.stack([np.bincount(c, minlength=experts) for c in flat]),
        np.stack([np.bincount(c, w.ravel(), experts) for c, w in zip(flat, weights, strict=True)]),
    )


def _by_token(array: NamedArray) -> np.ndarray:
    return array.values.reshape(-1, array.shape[-1])
