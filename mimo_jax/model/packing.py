"""A model made ready for kernels: which ones it may use, and its weights in their order."""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
    for _, param in parameters(module):
        value = param.get_value()
        if not isinstance(value, FP8Array | MXFP4Array):
            continue
        reason = _why_not(param.spec, value, kernels)
        if reason is None:
            # Devices that lag behind would hold what they have not packed yet twice.
            param.set_value(jax.block_until_ready(pack(value, kernels, native_e2m1)))
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
    """Repacks weights on one device, or each device's part of them."""
    mesh = explicit_mesh(value.codes)
    if mesh is None:
        return _pack(value, kernels, native_e2m1=native_e2m1)
    codes, scales = P(*entries(value.codes)), P(*entries(value.scales))
    parts = type(value)(*(_part(a) for a in (value.codes, value.scales)))
    with use(value.codes.sharding.mesh):
        return _pack_parts(kernels, native_e2m1, parts, codes, scales)(value)


@functools.cache
def _pack_parts(
    kernels: tuple[str, ...], native_e2m1: bool, parts: Any, codes: Any, scales: Any
) -> Any:
    """What packs the parts of devices: compiled once for all parameters that are split alike."""
    local = functools.partial(packed.pack, kernels=kernels, native_e2m1=native_e2m1)
    in_specs = (type(parts)(codes, scales),)
    out_specs = packed.placed(jax.eval_shape(local, parts), codes, scales)
    return jax.jit(jax.shard_map(local, in_specs=in_specs, out_specs=out_specs))


_pack = jax.jit(packed.pack, static_argnums=1, static_argnames="native_e2m1")


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
