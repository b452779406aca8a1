"""Random weights in the release's own formats, made where they will be.

For measuring a model whose checkpoint isn't at hand: every device fills the part it holds, codes
and scales as they are stored, so that nothing passes through the host or through a dense copy.  A
weight depends on the seed, its parameter's name and its place, and on no mesh.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, UInt32

from mimo_jax.model.parameters import Make, ParamSpec, stable_hash
from mimo_jax.model.placement import Placement
from mimo_jax.quant import BLOCKS, FP8Array, MXFP4Array
from sharding import mesh

# E8M0 bytes 119 and 120: with uniform e2m1 codes, whose root mean square is 2.93, a standard
# deviation of .018, near the usual .02; the releases have 118 to 125 (MODEL_SPEC 5.3).
MXFP4_SCALES = 119

Kind = Literal["normal", "zeros", "ones", "fp8", "fp8_scale", "mxfp4", "mxfp4_scale"]
# Of codes and of scales.
KINDS: dict[type, tuple[Kind, ...]] = {
    FP8Array: ("fp8", "fp8_scale"),
    MXFP4Array: ("mxfp4", "mxfp4_scale"),
}


def random_release(seed: int, dtype: Any, placement: Placement | None = None) -> Make:
    """A `Make` whose values are random, and quantised where the release's are.

    Args:
      seed: the same seed gives the same weights.
      dtype: of parameters that do not set their own.
      placement: the mesh and rules to split them by; by default they are on the first device.
    """

    def make(spec: ParamSpec) -> Any:
        arrays = shapes(spec, dtype)
        placed = None if placement is None else placement.shardings(spec, arrays)
        key = (seed * 0x9E3779B1 + stable_hash(spec.name)) & 0xFFFFFFFF

        def fill(array: jax.ShapeDtypeStruct, kind: Kind, sharding: Any, which: int) -> Array:
            with mesh.use(placement and placement.mesh):
                return _fill(
                    np.uint32(key ^ which), array.shape, array.dtype, kind, spec.std, sharding
                )

        kinds = KINDS.get(type(arrays), (spec.init,))
        leaves, form = jax.tree.flatten(arrays)
        where = [None] * len(leaves) if placed is None else jax.tree.leaves(placed)
        filled = map(fill, leaves, kinds, where, range(len(leaves)))
        return jax.tree.unflatten(form, filled)

    return make


def shapes(spec: ParamSpec, dtype: Any) -> Any:
    """What holds a parameter of a model of this dtype, as shapes and dtypes."""

    def array(blocks: tuple[int, int], dtype: Any) -> jax.ShapeDtypeStruct:
        *lead, rows, columns = spec.shape
        shape = (*lead, -(-rows // blocks[0]), -(-columns // blocks[1]))
        return jax.ShapeDtypeStruct(shape, dtype)

    if spec.format == "fp8":
        codes, scales = BLOCKS[FP8Array]
        return FP8Array(array(codes, jnp.float8_e4m3fn), array(scales, jnp.float32))
    if spec.format == "mxfp4":
        codes, scales = BLOCKS[MXFP4Array]
        return MXFP4Array(array(codes, jnp.uint8), array(scales, jnp.uint8))
    return jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype or dtype))


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _fill(
    key: UInt32[Array, ""],
    shape: tuple[int, ...],
    dtype: np.dtype,
    kind: Kind,
    std: float,
    sharding: NamedSharding | None,
) -> Array:
    """One array; its elements are functions of their own indices, so devices need no exchange."""
    if kind in ("zeros", "ones"):
        return jnp.full(shape, float(kind == "ones"), dtype, out_sharding=sharding)
    bits = _hash(key, shape, sharding)
    if kind == "normal":
        # Uniform, of the standard deviation asked for.
        return ((bits.astype(jnp.float32) * 2.0**-32 - 0.5) * (std * math.sqrt(12))).astype(dtype)
    if kind == "fp8_scale":
        return std / _fp8_root_mean_square() * (0.5 + bits.astype(jnp.float32) * 2.0**-32)
    if kind == "mxfp4_scale":
        return (MXFP4_SCALES + (bits & 1)).astype(jnp.uint8)
    code = (bits & 0xFF).astype(jnp.uint8)
    if kind == "mxfp4":
        return code
    code = jnp.where(code & 0x7F == 0x7F, code & 0x80, code)  # the NaNs become zeros
    return jax.lax.bitcast_convert_type(code, jnp.float8_e4m3fn)


def _hash(
    key: UInt32[Array, ""], shape: tuple[int, ...], sharding: NamedSharding | None
) -> UInt32[Array, ...]:
    """32 well-mixed bits an element: its flat index through the finaliser of MurmurHash3."""
    index, stride = key, 1
    for dim in reversed(range(len(shape))):
        at = jax.lax.broadcasted_iota(jnp.uint32, shape, dim, out_sharding=sharding)
        index = index + at * jnp.uint32(stride & 0xFFFFFFFF)
        stride *= shape[dim]
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        index = (index ^ (index >> shift)) * jnp.uint32(factor)
    return index ^ (index >> 16)


@functools.cache
def _fp8_root_mean_square() -> float:
    """Of the 254 e4m3 codes that are numbers."""
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return float(np.sqrt(np.nanmean(codes**2)))
