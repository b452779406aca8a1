"""Which sources a parameter is read from, for every storage layout (MODEL_SPEC 5)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mimo_jax.checkpoint.files import TensorStore
from mimo_jax.checkpoint.layout import Layout
from mimo_jax.checkpoint.names import SCALE_SUFFIX, weight_shapes
from mimo_jax.checkpoint.safetensors_file import StoredTensor
from mimo_jax.checkpoint.sources import Cast, Dense, Joined, Source, Tensor, Window, whole
from mimo_jax.model.parameters import Format, ParamSpec, QKVRows
from mimo_jax.quant import FP8Array, MXFP4Array

KINDS: dict[Format, type] = {"fp8": FP8Array, "mxfp4": MXFP4Array}


@dataclasses.dataclass
class ParameterSources:
    """A `Make` whose values are sources: one, or a quantised array of two.

    Attributes:
      store: tensors to read.
      layout, formats: how they are stored (plain, where nothing is said).
      dtype: type of dequantised weights.
      cast: type for weights that are not quantised and do not fix their own.
      dequantize: whether to dequantise.
      damaged: the tensors in which bad values were read so far.
    """

    store: TensorStore
    layout: Layout
    formats: dict[str, Format]
    dtype: np.dtype
    cast: np.dtype | None
    dequantize: bool
    damaged: set[StoredTensor]

    def __call__(self, spec: ParamSpec) -> Any:
        """The source of a parameter, or a quantised array of those of codes and scales."""
        fmt = self.formats.get(spec.name, "plain")
        if fmt == "plain":
            weights = self._whole(spec, "")
            return weights if self.cast is None or spec.dtype else Cast(weights, self.cast)
        if self.dequantize and spec.qkv is not None and self.layout.qkv == "split":
            return self._dense_split(spec, spec.qkv)
        codes, scales = self._whole(spec, ""), self._whole(spec, SCALE_SUFFIX[fmt])
        if self.dequantize:
            return Dense(KINDS[fmt], codes, scales, self.dtype)
        return KINDS[fmt](codes, scales)

    def _whole(self, spec: ParamSpec, suffix: str) -> Source:
        """The weights (or codes) of a parameter, or with a suffix their scales."""
        names = [name + suffix for name in weight_shapes(spec, self.layout)]
        if spec.qkv is not None:
            return self._chunked(names, spec.shape[0])
        stored = self.store.tensors[names[0]]
        if "{}" not in spec.name:
            return self._seen(names[0], spec.shape if spec.stored_shape else stored.shape)
        if self.layout.stacked_experts:
            both = self._seen(names[0], stored.shape)
            place = list(whole(stored.shape))
            below = spec.shape[1] if spec.name.endswith("up_proj.weight") else 0
            place[1] = slice(below, below + spec.shape[1])
            return Window(both, tuple(place))
        return Joined([self._seen(name, (1, *stored.shape)) for name in names], 0)

    def _seen(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return Tensor(self.store.tensors[name], shape, self.damaged)

    def _chunked(self, names: list[str], chunks: int) -> Source:
        """[C, R, D] of tensors whose rows are those of C chunks, one after another.

        These are a fused tensor, or Q, K and V (or their scales), of which every chunk has a part.
        """
        shapes = [self.store.tensors[name].shape for name in names]
        parts = [
            self._seen(name, (chunks, rows // chunks, width))
            for name, (rows, width) in zip(names, shapes, strict=True)
        ]
        return Joined(parts, 1)

    def _dense_split(self, spec: ParamSpec, rows: QKVRows) -> Source:
        """Dense [C, R, D] of split FP8 tensors, whatever their scale blocks are aligned to."""
        chunks = spec.shape[0]
        names = list(weight_shapes(spec, self.layout))

        def dense(names: list[str], parts: int) -> Source:
            codes = self._chunked(names, parts)
            scales = self._chunked([n + SCALE_SUFFIX["fp8"] for n in names], parts)
            return Dense(FP8Array, codes, scales, self.dtype)

        def by_chunk(name: str, rows: int) -> Source:
            matrix = dense([name], 1)
            one, _, columns = whole(matrix.shape)
            places = [(one, slice(c * rows, (c + 1) * rows), columns) for c in range(chunks)]
            return Joined([Window(matrix, place) for place in places], 0)

        if spec.name in self.layout.shared_kv_scales:
            return Joined([by_chunk(names[0], rows.q), dense(names[1:], chunks)], 1)
        each = zip(names, (rows.q, rows.k, rows.v), strict=True)
        return Joined([by_chunk(name, n) for name, n in each], 1)
