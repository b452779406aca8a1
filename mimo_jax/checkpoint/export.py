"""The tensors that a model's parameters become in a checkpoint of a given layout.

Quantised weights keep their codes and scales: where a layout would need other scale blocks, the
export is refused instead of requantising.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from mimo_jax.checkpoint.errors import Problem
from mimo_jax.checkpoint.layout import Layout
from mimo_jax.checkpoint.names import (
    SCALE_SUFFIX,
    stacked_name,
    stacked_shape,
    weight_shapes,
)
from mimo_jax.checkpoint.qkv import (
    aligned,
    blocks,
    fuse,
    fused_scale_rows,
    kv_scale_rows,
    rechunk_fp8,
    total_rows,
    unfuse,
    unfuse_fp8,
)
from mimo_jax.checkpoint.safetensors_file import Entry
from mimo_jax.checkpoint.values import to_host
from mimo_jax.model.parameters import ParamSpec, QKVRows, value_format
from mimo_jax.quant import FP8_BLOCK, FP8Array

Values = Mapping[str, tuple[ParamSpec, Any]]


def export(values: Values, layout: Layout) -> tuple[list[Entry], list[Problem]]:
    """Tensors to write, and the reasons why some parameters cannot be written in this layout.

    Args:
      values: declaration and value of each parameter, by tensor name.
      layout: where QKV rows go, and whether experts are stacked.
    """
    entries: list[Entry] = []
    problems: list[Problem] = []
    for spec, value in values.values():
        refusal = _refusal(spec, value, layout)
        if refusal is not None:
            expected = "a layout that its scales fit; save with the layout it was loaded from"
            problems.append(Problem("cannot be saved exactly", refusal, expected, spec.name))
        elif spec.qkv is not None:
            entries += _qkv(spec, spec.qkv, value, layout)
        elif "{}" in spec.name and layout.stacked_experts:
            entries += _stacked(spec, value, values)
        elif "{}" in spec.name:
            for e in range(spec.shape[0]):
                entries += _matrix(spec.name.format(e), value, spec.tensor_shape, e)
        else:
            (name,) = weight_shapes(spec, layout)
            entries += _matrix(name, value, spec.tensor_shape)
    return entries, problems


def _refusal(spec: ParamSpec, value: Any, layout: Layout) -> str | None:
    """Why a parameter cannot be written in a layout as it is; None if it can."""
    fmt = value_format(value)
    if "{}" in spec.name and layout.stacked_experts and fmt != "plain":
        return f"{fmt} experts, which have no stacked form"
    if spec.qkv is None or fmt == "plain":
        return None
    now = spec.shape[0]
    total = total_rows(spec.qkv, now)
    held = f"{spec.qkv.q}, {spec.qkv.k} and {spec.qkv.v} rows in each of {now} chunks"
    if layout.qkv != "split":
        chunks = layout.chunks if layout.qkv == "interleaved" else 1
        exact = now == chunks or (aligned(total, now) and aligned(total, chunks))
        return None if exact else f"{held}, whose scale blocks would cross {chunks} chunks"
    if spec.qkv.q % FP8_BLOCK:
        return f"{held}, where queries and keys share scale blocks"
    shared = kv_scale_rows(total, now, shared=True)
    if not aligned(total, now) and shared == kv_scale_rows(total, 1, shared=False):
        return f"{held}, where no reader could tell that keys and values share scale blocks"
    return None


def _entry(name: str, like: Any, shape: tuple[int, ...], read: Callable[[], np.ndarray]) -> Entry:
    return Entry(name, np.dtype(like.dtype), shape, read)


def _array(name: str, array: Any, shape: tuple[int, ...], item: int | None = None) -> Entry:
    """One array, or one item of a stack, in the shape it is stored in."""
    return _entry(name, array, shape, lambda: to_host(array, item).reshape(shape))


def _matrix(
    name: str, value: Any, shape: tuple[int, ...], item: int | None = None
) -> Iterable[Entry]:
    """A weight of this shape with its scales, if it has any."""
    fmt = value_format(value)
    if fmt == "plain":
        return [_array(name, value, shape, item)]
    arrays = {name: value.codes, name + SCALE_SUFFIX[fmt]: value.scales}
    lead = 0 if item is None else 1
    return [_array(n, a, tuple(a.shape[lead:]), item) for n, a in arrays.items()]


def _stacked(spec: ParamSpec, value: Any, values: Values) -> Iterable[Entry]:
    """All experts of a layer in one tensor, as transformers has them."""
    name = stacked_name(spec)
    if spec.name.endswith("down_proj.weight"):
        return [_array(name, value, tuple(value.shape))]
    if spec.name.endswith("up_proj.weight"):
        return []  # part of the gate's tensor
    _, up = values[spec.name.replace("gate_proj", "up_proj")]

    def read() -> np.ndarray:
        return np.concatenate([to_host(value), to_host(up)], axis=1)

    return [_entry(name, value, stacked_shape(spec), read)]


def _qkv(spec: ParamSpec, rows: QKVRows, value: Any, layout: Layout) -> Iterable[Entry]:
    """The fused tensor, or the three split ones, each with its scales."""
    chunks = layout.chunks if layout.qkv == "interleaved" else 1
    entries = []
    for i, (name, shape) in enumerate(weight_shapes(spec, layout).items()):
        if not isinstance(value, FP8Array):
            entries.append(_entry(name, value, shape, _plain_reader(value, rows, layout, i)))
            continue
        total, columns = total_rows(rows, spec.shape[0]), value.scales.shape[-1]
        if layout.qkv == "split":
            scale_rows = (
                blocks(total.q),
                *kv_scale_rows(total, spec.shape[0], shared=True),
            )[i]
        else:
            scale_rows = fused_scale_rows(total, chunks)
        for tensor, like, size, which in (
            (name, value.codes, shape, 0),
            (name + SCALE_SUFFIX["fp8"], value.scales, (scale_rows, columns), 1),
        ):
            read = _fp8_reader(value, rows, layout.qkv == "split", chunks, i, which)
            entries.append(_entry(tensor, like, size, read))
    return entries


def _plain_reader(value: Any, rows: QKVRows, layout: Layout, part: int) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        parts = unfuse(to_host(value), rows.q, rows.k)
        if layout.qkv == "split":
            return parts[part]
        fused = fuse(parts, layout.chunks if layout.qkv == "interleaved" else 1)
        return fused.reshape(-1, fused.shape[-1])

    return read


def _fp8_reader(
    value: FP8Array, rows: QKVRows, split: bool, chunks: int, part: int, which: int
) -> Callable[[], np.ndarray]:
    """Reads codes (which = 0) or scales (1) of Q, K, V (part = 0, 1, 2) or of the fused matrix."""

    def read() -> np.ndarray:
        host = FP8Array(to_host(value.codes), to_host(value.scales))
        if split:
            return unfuse_fp8(host, rows)[which][part]
        fused = rechunk_fp8(host, rows, chunks)
        array = fused.scales if which else fused.codes
        return array.reshape(-1, array.shape[-1])

    return read
