"""Checks of stored values, and copies of values on devices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from mimo_jax.checkpoint.errors import Problem
from mimo_jax.checkpoint.names import SCALE_SUFFIX
from mimo_jax.checkpoint.safetensors_file import DTYPES, StoredTensor
from mimo_jax.model.parameters import value_format
from mimo_jax.quant import MXFP4_NAN_SCALE, FP8Array, MXFP4Array
from pallas_kernels.packed import Packed, unpack

# Bytes looked at a time.
PIECE_BYTES = 4 << 20
# The bits of the first positive value that is not finite.
INFINITY: dict[np.dtype, int] = {
    np.dtype(ml_dtypes.float8_e4m3fn): 0x7F,  # the only NaN beside its negative; no infinity
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
    np.dtype(np.float16): 0x7C00,
    np.dtype(np.float32): 0x7F800000,
}
# Where what is on one device is computed with, whatever mesh the caller uses.
NO_MESH = Mesh(np.empty((), object), ())


def any_wrong(name: str, values: np.ndarray) -> bool:
    """Whether a tensor cannot have one of these values (of which there is one at least).

    The name tells what bytes mean: `_scale` are exponents (0 and 255 forbidden), `_scale_inv`
    positive multipliers (MODEL_SPEC 5.2, 5.3).
    """
    # Floats are ordered as the integers of the same bits are, but for the sign.  Largest and
    # smallest need no memory beside the values, which costs more than reading a file does.
    size = values.dtype.itemsize
    signed, unsigned = values.view(f"i{size}"), values.view(f"u{size}")
    if name.endswith(SCALE_SUFFIX["mxfp4"]) and values.dtype == np.uint8:
        return bool(unsigned.min() == 0 or unsigned.max() == MXFP4_NAN_SCALE)
    if values.dtype.kind == "u":
        return False
    infinity = INFINITY[values.dtype]
    if name.endswith(SCALE_SUFFIX["fp8"]):
        return bool(signed.min() <= 0 or signed.max() >= infinity)
    negative = infinity | 1 << (8 * size - 1)
    return bool(signed.max() >= infinity or unsigned.max() >= negative)


def bad_values(stored: StoredTensor) -> Problem | None:
    """What is wrong with the values of a tensor, and what they should be; None if all is well.

    Raises:
      OSError: the file cannot be read.
    """
    dtype, count, first = DTYPES[stored.dtype], 0, ""
    size, step = stored.nbytes // dtype.itemsize, PIECE_BYTES // dtype.itemsize
    for begin in range(0, size, step):
        values = np.empty(min(step, size - begin), dtype)
        stored.read_into(begin, values)
        wrong = np.flatnonzero(_wrong(stored.name, values))
        if wrong.size and not count:
            at = [int(i) for i in np.unravel_index(begin + wrong[0], stored.shape)]
            first = f"{values[wrong[0]]} at {at}"
        count += wrong.size
    if not count:
        return None
    found = f"{count} of {size} values ({first})"
    expected = _expected(stored.name, dtype)
    return Problem("bad values", found, expected, stored.name, stored.file.name)


def _wrong(name: str, values: np.ndarray) -> np.ndarray:
    if name.endswith(SCALE_SUFFIX["mxfp4"]) and values.dtype == np.uint8:
        return (values == 0) | (values == MXFP4_NAN_SCALE)
    if name.endswith(SCALE_SUFFIX["fp8"]):
        return ~(np.isfinite(values) & (values > 0))
    return ~np.isfinite(values)


def _expected(name: str, dtype: np.dtype) -> str:
    if name.endswith(SCALE_SUFFIX["mxfp4"]):
        return f"exponent bytes other than 0 and {MXFP4_NAN_SCALE}"
    if name.endswith(SCALE_SUFFIX["fp8"]):
        return "finite positive multipliers"
    return "codes other than NaN" if dtype.itemsize == 1 else "finite numbers"


@dataclasses.dataclass(frozen=True)
class Unpacked:
    """Codes or scales of weights that were repacked for kernels, as they were before.

    Attributes:
      packed: the weights.
      field: "codes" or "scales".
    """

    packed: Packed
    field: str

    @property
    def _like(self) -> jax.ShapeDtypeStruct:
        w = self.packed
        arrays = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (w.words, w.scales))
        return getattr(jax.eval_shape(unpack, w.with_arrays(*arrays)), self.field)

    @property
    def shape(self) -> tuple[int, ...]:
        """As before packing."""
        return self._like.shape

    @property
    def dtype(self) -> Any:
        """As before packing."""
        return self._like.dtype

    def to_host(self, item: int | None) -> np.ndarray:
        """The array, or one item of its first dimension."""
        arrays = (jnp.asarray(to_host(a, item)) for a in (self.packed.words, self.packed.scales))
        return np.asarray(getattr(unpack(self.packed.with_arrays(*arrays)), self.field))


def as_stored(value: Any) -> Any:
    """A parameter's value in the format of checkpoints; packed weights are unpacked when read."""
    if not isinstance(value, Packed):
        return value
    kind = MXFP4Array if value_format(value) == "mxfp4" else FP8Array
    return kind(Unpacked(value, "codes"), Unpacked(value, "scales"))


def to_host(array: Any, item: int | None = None) -> np.ndarray:
    """An array, or one item of its first dimension, on the host.

    Of an array on devices no more than that is copied, and jax keeps no copy with the array (as it
    does for `np.asarray`), so that saving needs memory for one tensor.
    """
    if isinstance(array, Unpacked):
        return array.to_host(item)
    if not isinstance(array, jax.Array):
        return np.asarray(array) if item is None else np.asarray(array)[item]
    out = np.empty(array.shape if item is None else array.shape[1:], array.dtype)
    with jax.set_mesh(NO_MESH):
        for shard in array.addressable_shards:
            if shard.replica_id:
                continue
            data, index = shard.data, shard.index
            if item is None:
                data = jax.make_array_from_single_device_arrays(data.shape, data.sharding, [data])
            else:
                begin, end, _ = index[0].indices(array.shape[0])
                if not begin <= item < end:
                    continue
                data, index = data[item - begin], index[1:]
            out[index] = np.asarray(data)
    return out
