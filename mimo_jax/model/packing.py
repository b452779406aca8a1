"""A model made ready for kernels: which ones it may use, and its weights in their order."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from mimo_jax.model.attention import Attention
from mimo_jax.model.layers import RMSNorm
from mimo_jax.model.parameters import ParamSpec, parameters
from mimo_jax.quant import FP8Array, MXFP4Array
from pallas_kernels import packed
from pallas_kernels.backends import REFERENCE, BackendError
from sharding.mesh import use
from sharding.types import entries, explicit_mesh


def use_kernels(module: nnx.Module, kernels: Sequence[str], *, native_e2m1: bool = False) -> None:
    """Has a module use kernels, and repacks its quantised parameters for them.

    That happens one after the other, each in place of the original.

    Args:
      module: its parameters are replaced.
      kernels: backends from `pallas_kernels.backends.resolve`; weights that they can't hold stay
        as they are where the reference is one of them.
      native_e2m1: as for `pallas_kernels.packed.pack`.

    Raises:
      BackendError: they have to be packed and can't.
    """
    kernels = tuple(kernels)
    set_kernels(module, kernels)
    if kernels == (REFERENCE,):
        return
    quantized = [
        p for _, p in parameters(module) if isinstance(p.get_value(), FP8Array | MXFP4Array)
    ]
    # The smallest first, so that the holes they leave in memory are taken by others as small.
    for param in sorted(quantized, key=lambda p: p.get_value().codes.size):
        reason = _why_not(param.spec, param.get_value(), kernels)
        if reason is None:
            param.set_value(pack(param.get_value(), kernels, native_e2m1))
        elif REFERENCE not in kernels:
            raise BackendError(f"{param.spec.name}: {reason}; load it with kernels='auto'")


def set_kernels(module: nnx.Module, kernels: tuple[str, ...]) -> None:
    """Has what computes without quantised weights use kernels: norms and attention."""
    for _, part in nnx.iter_modules(module):
        if isinstance(part, Attention | RMSNorm):
            part.kernels = kernels


def pack(
    value: FP8Array | MXFP4Array, kernels: tuple[str, ...], native_e2m1: bool
) -> packed.Packed:
    """Repacks weights on one device, or each device's part of them.

    Scales first and then codes, one waiting for the other: so both fit into the hole that the
    weights before have left, of which jax's allocator would give all where less than 128 MiB were
    to remain, and devices that lag behind don't hold weights twice.
    """
    mesh = explicit_mesh(value.codes)
    parts = type(value)(*(_part(a) for a in (value.codes, value.scales)))
    places = None if mesh is None else tuple(P(*entries(a)) for a in (value.codes, value.scales))

    def array(name: str) -> jax.Array:
        program = _packing(name, kernels, native_e2m1, parts, places)
        return jax.block_until_ready(program(value))

    with contextlib.nullcontext() if mesh is None else use(value.codes.sharding.mesh):
        scales = array("scales")
        words = array("words")
    like = jax.eval_shape(functools.partial(_local, kernels, native_e2m1), parts)
    return like.with_arrays(words, scales)


@functools.cache
def _packing(
    name: str, kernels: tuple[str, ...], native_e2m1: bool, parts: Any, places: Any
) -> Callable[..., Any]:
    """What makes one of the arrays of packed weights, compiled once for all that are alike."""

    def local(w: FP8Array | MXFP4Array) -> jax.Array:
        return getattr(_local(kernels, native_e2m1, w), name)

    if places is None:
        return jax.jit(local)
    like = jax.eval_shape(functools.partial(_local, kernels, native_e2m1), parts)
    out = getattr(packed.placed(like, *places), name)
    return jax.jit(jax.shard_map(local, in_specs=(type(parts)(*places),), out_specs=out))


def _local(kernels: tuple[str, ...], native_e2m1: bool, w: Any) -> packed.Packed:
    return packed.pack(w, kernels, native_e2m1=native_e2m1)


def _part(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.sharding.shard_shape(array.shape), array.dtype)


def has_kernels(spec: ParamSpec, kernels: tuple[str, ...]) -> bool:
    """Whether some of these kernels are for a parameter in its format."""
    fp8_experts = spec.format == "fp8" and "{}" in spec.name
    return packed.for_tpu(kernels) or not fp8_experts


def _why_not(spec: ParamSpec, value: FP8Array | MXFP4Array, kernels: tuple[str, ...]) -> str | None:
    """Why weights can't be packed; None if they can."""
    if not has_kernels(spec, kernels):
        return "there are no GPU kernels for FP8 experts"
    if entries(value.codes) != entries(value.scales):
        return "its parts on the mesh share blocks of scales"
    if bool(packed.unpackable(value, kernels)):
        fp8 = isinstance(value, FP8Array)
        return "it has codes that are NaN" if fp8 else "it has group scales that are too great"
    return None
