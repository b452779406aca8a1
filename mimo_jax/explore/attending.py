"""Where heads look, and how much of their attention the sink takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from mimo_jax.config import LayerSpec
from mimo_jax.explore.named import NamedArray
from mimo_jax.language_model import LanguageModel


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionMap:
    """The attention of one layer.

    Attributes:
      layer: what kind of layer it is.
      weights: float32 (batch, head, query, key), zero for keys that are not seen.
      sink: what the sink takes, float32 (batch, head, query): a row of weights sums to 1 minus it.
        Zeros in layers without one.
    """

    layer: LayerSpec
    weights: NamedArray
    sink: NamedArray

    @property
    def distance(self) -> NamedArray:
        """How far back a head looks, float32 (batch, head): tokens between query and key, weighted
        by what the sink leaves, and each query as much as others."""
        weights = self.weights.values
        back = np.maximum(np.arange(weights.shape[-2])[:, None] - np.arange(weights.shape[-1]), 0)
        left = np.maximum(weights.sum(axis=-1), np.finfo(np.float32).tiny)
        mean = ((weights * back).sum(axis=-1) / left).mean(axis=-1)
        return NamedArray(mean.astype(np.float32), ("batch", "head"))


def attention_maps(lm: LanguageModel, seen: Mapping[str, NamedArray]) -> dict[int, AttentionMap]:
    """Attention by layer.

    Args:
      lm: the model.
      seen: what `taps` gave for "attention.*", or for some of the layers.

    Raises:
      ValueError: it has no layer's.
    """
    found = {}
    for spec in lm.config.layers:
        weights = seen.get(f"attention.{spec.index}")
        if weights is None:
            continue
        sink = np.zeros(weights.shape[:3], np.float32)
        if spec.sink:
            sink = np.clip(1 - weights.values.sum(axis=-1), 0, 1)
        found[spec.index] = AttentionMap(spec, weights, NamedArray(sink, weights.axes[:3]))
    if not found:
        raise ValueError('no attention was tapped; ask for "attention.*" or a layer\'s')
    return found
