"""A model made ready for kernels: which ones it may use, and its weights in their order."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mimo_jax.config import MiMoConfig
from mimo_jax.model.attention import Attention
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.dflash import DFlashAttention
from mimo_jax.model.layers import RMSNorm, column_axes
from mimo_jax.model.parameters import ParamSpec, abstract, parameters
from mimo_jax.model.placement import Placement
from mimo_jax.quant import FP8Array, MXFP4Array
from pallas_kernels import all_reduce, packed
from pallas_kernels.all_reduce import exchange
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
    packable = []
    for _, param in parameters(module):
        if not isinstance(param.get_value(), FP8Array | MXFP4Array):
            continue
        reason = _why_not(param.spec, param.get_value(), kernels)
        if reason is None:
            packable.append(param)
        elif REFERENCE not in kernels:
            raise BackendError(f"{param.spec.name}: {reason}; load it with kernels='auto'")
    # The smallest first, so that the holes they leave in memory are taken by others as small.
    for param in sorted(packable, key=lambda p: p.get_value().codes.size):
        param.set_value(pack(param.get_value(), kernels, native_e2m1))


def use_exchange(model: MiMo, placement: Placement, kernels: Sequence[str]) -> None:
    """Has a model add up few tokens through memory that the devices of a mesh share, if they can.

    Otherwise all is left to XLA's all-reduces.

    Args:
      model: on a mesh; given an exchange.
      placement: where it is.
      kernels: backends from `pallas_kernels.backends.resolve`.
    """
    sums = _exchanged(model, placement, kernels)
    if sums is None:
        return
    try:
        model.exchange = all_reduce.tried_exchange(*sums)
    except RuntimeError as error:
        warnings.warn(f"sums over devices are left to XLA: {error}", stacklevel=2)


def _exchanged(
    model: MiMo, placement: Placement, kernels: Sequence[str]
) -> tuple[Mesh, tuple[str, ...], int] | None:
    """The mesh, axes and number of values that an exchange is for; None if there can be none."""
    mesh, axes = placement.mesh, column_axes(model.layers[0].self_attn.o_proj.get_value())
    if "mosaic_gpu" not in kernels or exchange.why_not(mesh, axes) is not None:
        return None
    return mesh, axes, exchange.most_values(exchange.group_size(mesh, axes))


def abstract_packed(
    config: MiMoConfig,
    kernels: Sequence[str],
    placement: Placement | None = None,
    *,
    native_e2m1: bool = False,
) -> MiMo:
    """A model that uses kernels as shapes, to compile for.

    Args:
      config: of the model.
      kernels: as for `use_kernels`; weights that they may hold are packed.
      placement: on a mesh, whose devices need not exist; one device by default.
      native_e2m1: as for `pallas_kernels.packed.pack`.

    Raises:
      ShardingError: the mesh does not divide the model.
    """
    kernels = tuple(kernels)
    model = abstract(lambda make: MiMo(config, make), config.dtype, quantized=True)
    set_kernels(model, kernels)
    for _, param in parameters(model):
        value = param.get_value()
        if placement is not None:
            shardings = placement.shardings(param.spec, value)
            value = jax.tree.map(lambda a, on: a.update(sharding=on), value, shardings)
        if _packs(param.spec, value, kernels):
            value = _abstract_pack(value, kernels, native_e2m1)
        param.set_value(value)
    if placement is not None and (sums := _exchanged(model, placement, kernels)) is not None:
        model.exchange = exchange.abstract(*sums)
    return model


def _packs(spec: ParamSpec, value: Any, kernels: tuple[str, ...]) -> bool:
    """Whether weights are packed, if neither their codes nor their scales forbid it."""
    quantized = isinstance(value, FP8Array | MXFP4Array) and kernels != (REFERENCE,)
    return (
        quantized and has_kernels(spec, kernels) and entries(value.codes) == entries(value.scales)
    )


def set_kernels(module: nnx.Module, kernels: tuple[str, ...]) -> None:
    """Has what computes without quantised weights use kernels: norms and attention."""
    for _, part in nnx.iter_modules(module):
        if isinstance(part, Attention | DFlashAttention | RMSNorm):
            part.kernels = kernels


def pack(
    value: FP8Array | MXFP4Array, kernels: tuple[str, ...], native_e2m1: bool
) -> packed.Packed:
    """Repacks weights on one device, or each device's part of them.

    Scales first and then codes, one waiting for the other: so both fit into the hole that the
    weights before have left, of which jax's allocator would give all where less than 128 MiB were
    to remain, and devices that lag behind don't hold weights twice.
    """
    mesh, places, parts = _parts(value)
    like, scales, words = _packing(kernels, native_e2m1, parts, places, mesh)
    with use(mesh):
        packed_scales = jax.block_until_ready(scales(value))
        return like.with_arrays(jax.block_until_ready(words(value)), packed_scales)


def _abstract_pack(
    value: FP8Array | MXFP4Array, kernels: tuple[str, ...], native_e2m1: bool
) -> packed.Packed:
    """`pack` of shapes."""
    mesh, places, parts = _parts(value)
    like, *programs = _packing(kernels, native_e2m1, parts, places, mesh)
    with use(mesh):
        scales, words = (jax.eval_shape(program, value) for program in programs)
    if places is not None:
        where = packed.placed(like, *places)
        scales = scales.update(sharding=NamedSharding(mesh, where.scales))
        words = words.update(sharding=NamedSharding(mesh, where.words))
    return like.with_arrays(words, scales)


def _parts(value: FP8Array | MXFP4Array) -> tuple[Any, Any, Any]:
    """The mesh that weights are on, their partition specs, and each device's part as shapes; the
    first two None on one device."""
    parts = type(value)(*(_part(a) for a in (value.codes, value.scales)))
    if explicit_mesh(value.codes) is None:
        return None, None, parts
    places = tuple(P(*entries(a)) for a in (value.codes, value.scales))
    return value.codes.sharding.mesh, places, parts


@functools.cache
def _packing(
    kernels: tuple[str, ...], native_e2m1: bool, parts: Any, places: Any, mesh: Any
) -> tuple[packed.Packed, Callable[..., jax.Array], Callable[..., jax.Array]]:
    """Packed weights as shapes, and what makes their scales and their words.

    Compiled once for all weights that are alike.

    Args:
      kernels, native_e2m1: as for `pack`.
      parts: each device's part of the weights, as shapes.
      places: partition specs of codes and scales; None on one device.
      mesh: that these are of; meshes of the same sizes may have other devices.
    """
    local = functools.partial(packed.pack, kernels=kernels, native_e2m1=native_e2m1)
    like = jax.eval_shape(local, parts)

    def program(name: str) -> Callable[..., jax.Array]:
        def array(w: FP8Array | MXFP4Array) -> jax.Array:
            return getattr(local(w), name)

        if places is None:
            return jax.jit(array)
        out = getattr(packed.placed(like, *places), name)
        return jax.jit(jax.shard_map(array, in_specs=(type(parts)(*places),), out_specs=out))

    return like, program("scales"), program("words")


def _part(array: Any) -> jax.ShapeDtypeStruct:
    sharding = array.sharding  # None of a shape on one device
    shape = array.shape if sharding is None else sharding.shard_shape(array.shape)
    return jax.ShapeDtypeStruct(shape, array.dtype)


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
