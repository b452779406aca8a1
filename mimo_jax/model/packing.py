"""Quantised parameters in the order that kernels want, and back."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from mimo_jax.model.parameters import ParamSpec, parameters
from mimo_jax.quant import FP8Array, MXFP4Array
from pallas_kernels import words
from pallas_kernels.backends import REFERENCE, BackendError
from sharding.mesh import use
from sharding.types import entries, explicit_mesh


def pack_parameters(module: nnx.Module, kernels: Sequence[str]) -> None:
    """Repacks a module's quantised parameters one after the other, each in place of the original.

    Args:
      module: its parameters are replaced.
      kernels: backends from `pallas_kernels.backends.resolve`; weights that they can't hold stay
        as they are where the reference is one of them.

    Raises:
      BackendError: they have to be packed and can't.
    """
    kernels = tuple(kernels)
    if kernels == (REFERENCE,):
        return
    for _, param in parameters(module):
        value = param.get_value()
        if not isinstance(value, FP8Array | MXFP4Array):
            continue
        reason = _why_not(param.spec, value)
        if reason is None:
            param.set_value(pack(value, kernels))
        elif REFERENCE not in kernels:
            raise BackendError(f"{param.spec.name}: {reason}; load it with kernels='auto'")


def pack(value: FP8Array | MXFP4Array, kernels: tuple[str, ...]) -> words.Words:
    """Repacks weights on one device, or each device's part of them."""
    mesh = explicit_mesh(value.codes)
    if mesh is None:
        return _pack(value, kernels)
    codes, scales = entries(value.codes), entries(value.scales)
    part = type(value)(*(_part(a) for a in (value.codes, value.scales)))
    shapes = jax.eval_shape(functools.partial(words.pack, kernels=kernels), part)
    more = (None,) * (shapes.scales.ndim - len(scales))
    specs = _replaced(shapes, P(*codes, None, None), P(*scales, *more))
    with use(value.codes.sharding.mesh):
        return jax.jit(
            jax.shard_map(
                functools.partial(words.pack, kernels=kernels),
                in_specs=(type(value)(P(*codes), P(*scales)),),
                out_specs=specs,
            )
        )(value)


_pack = jax.jit(words.pack, static_argnums=1)


def _part(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.sharding.shard_shape(array.shape), array.dtype)


def _replaced(w: words.Words, codes: Any, scales: Any) -> words.Words:
    return type(w)(codes, scales, w.rows, w.columns, w.kernels)


def has_kernels(spec: ParamSpec) -> bool:
    """Whether there are kernels for a parameter in its format."""
    return spec.format == "mxfp4" or "{}" not in spec.name


def _why_not(spec: ParamSpec, value: FP8Array | MXFP4Array) -> str | None:
    """Why weights can't be packed; None if they can."""
    if not has_kernels(spec):
        return f"there are no kernels for {spec.format} experts"
    if entries(value.codes) != entries(value.scales):
        return "its parts on the mesh share blocks of scales"
    if bool(words.unpackable(value)):
        return "it has " + (
            "codes that are NaN" if isinstance(value, FP8Array) else "group scales above 2"
        )
    return None
