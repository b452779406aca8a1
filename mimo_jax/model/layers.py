"""Norms, linear maps and the dense feed-forward (MODEL_SPEC 2.3, 2.11)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from mimo_jax.model.packed_linear import packed_linear
from mimo_jax.model.parameters import Format, Make, ParamSpec, declare
from mimo_jax.quant import dequantize
from pallas_kernels import backends, residual_matmul
from pallas_kernels.all_reduce import all_reduce
from pallas_kernels.all_reduce.exchange import Exchange
from pallas_kernels.backends import REFERENCE
from pallas_kernels.einsum import einsum32
from pallas_kernels.packed import Packed
from pallas_kernels.residual import added
from pallas_kernels.rms_norm import rms_norm
from sharding.types import axes_of, entries, on_mesh, reshard, sharding


def linear(x: Float[Array, "*b D"], w: Any, *, like: Array | None = None) -> Float[Array, "*b *F"]:
    """x W^T for a plain or quantised W [F, D] or [C, R, D], whose result ends in C, R.

    Accumulates in float32 and returns x's dtype.  `like` is as in `contract`.
    """
    if isinstance(w, Packed):
        return packed_linear(x, w)
    dense = dequantize(w, x.dtype)
    equation = "...d,fd->...f" if dense.ndim == 2 else "...d,crd->...cr"
    return contract(equation, x, dense, like=like).astype(x.dtype)


def contract(equation: str, *operands: Array, like: Array | None = None) -> Array:
    """`einsum32` on any mesh.

    Args:
      equation: as in jnp.einsum.
      operands: as in jnp.einsum.
      like: on a mesh, the array whose sharding the result gets.  Needed where dimensions are
        summed that are split, and then what the devices have is summed as well.
    """
    placed = None if like is None else sharding(like, *entries(like))
    return einsum32(equation, *operands, out_sharding=placed)


def output_projection(
    out: Float[Array, "B T K G V"],
    w: Float[Array, "D K F"],
    residual: Float[Array, "B T D"],
    *,
    kernels: Sequence[str],
    exchange: Exchange | None = None,
) -> Float[Array, "B T D"]:
    """The residual plus the product of an attention's results with its output projection.

    Args:
      out: for each KV head, values of its group of query heads; on a mesh split as W is.
      w: dense weights.
      residual: what the product is added to.
      kernels: backends that may be used.
      exchange: what devices of a mesh may add up through.
    """
    w = w.astype(out.dtype)
    out = out.reshape(*out.shape[:3], -1, out_sharding=sharding(out, *entries(out)[:4]))
    rows, columns = math.prod(out.shape[:2]), math.prod(out.shape[2:])
    shapes = ((rows, columns), (len(w), columns))
    case = (jax.ShapeDtypeStruct(shape, out.dtype) for shape in shapes)
    kernel = backends.choose(residual_matmul.IMPLEMENTATIONS, kernels, *case)[0]
    split = entries(w)
    by_xla = exchange is None and (kernel is None or kernel.backend == REFERENCE)
    if by_xla or split[0] is not None:
        return added(residual, contract("btkf,dkf->btd", out, w, like=residual))
    summed = column_axes(w)

    def local(out: Array, w: Array, residual: Array, exchange: Exchange | None) -> Array:
        flat = out.reshape(-1, math.prod(out.shape[2:])), w.reshape(len(w), -1)
        to = None if summed else residual.reshape(-1, residual.shape[-1])
        y = residual_matmul.residual_matmul(*flat, to, kernels=kernels).reshape(residual.shape)
        return all_reduce(y, residual, exchange, axes=summed, kernels=kernels) if summed else y

    return on_mesh(local, P(*entries(residual)), out, w, residual, exchange)


def column_axes(w: Any) -> tuple[str, ...]:
    """The mesh axes over which products with the parts of an output projection [D, K, F], an array
    or a shape, are added up."""
    return tuple(axis for entry in entries(w)[1:] for axis in axes_of(entry))


def joined_linear(
    x: Float[Array, "B T F"], w: Float[Array, "D F"], *, like: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    """x W^T of several things side by side, whose columns of W may be split; sharded as `like`."""
    x = reshard(x, *entries(x)[:2], entries(w)[1])
    return contract("btf,df->btd", x, w.astype(x.dtype), like=like).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm by one of `kernels` (`mimo_jax.model.packing`)."""

    def __init__(self, dim: int, eps: float, name: str, make: Make):
        self.eps = eps
        self.kernels: tuple[str, ...] = (REFERENCE,)
        self.weight = declare(make, ParamSpec(f"{name}.weight", (dim,), ("norm",), init="ones"))

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        """Normalises the last dimension in float32; returns x's dtype."""
        norm = functools.partial(rms_norm, eps=self.eps, kernels=self.kernels)
        return on_mesh(norm, P(*entries(x)), x, self.weight[...])


class MLP(nnx.Module):
    """Dense SwiGLU feed-forward, not clamped."""

    def __init__(self, dim: int, width: int, name: str, fmt: Format, make: Make):
        def spec(projection: str, shape: tuple[int, int], axes: tuple[str, str]) -> ParamSpec:
            return ParamSpec(f"{name}.{projection}.weight", shape, axes, format=fmt)

        self.gate_proj = declare(make, spec("gate_proj", (width, dim), ("mlp", "embed")))
        self.up_proj = declare(make, spec("up_proj", (width, dim), ("mlp", "embed")))
        self.down_proj = declare(make, spec("down_proj", (dim, width), ("embed", "mlp")))

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        """down(silu(gate x) * (up x))."""
        gate = linear(x, self.gate_proj.get_value())
        up = linear(x, self.up_proj.get_value())
        return linear(jax.nn.silu(gate) * up, self.down_proj.get_value(), like=x)


def declare_o_proj(
    make: Make, name: str, dim: int, kv_heads: int, group: int, v_head_dim: int
) -> nnx.Param:
    """An attention's output projection [D, K, G * V], split by KV head or by group on a mesh."""
    spec = ParamSpec(
        f"{name}.o_proj.weight",
        (dim, kv_heads, group * v_head_dim),
        ("embed", "kv_heads", "group"),
        stored_shape=(dim, kv_heads * group * v_head_dim),
    )
    return declare(make, spec)


def declare_sink(make: Make, name: str, kv_heads: int, group: int) -> nnx.Param:
    """The sink logits of an attention's query heads [K, G] (MODEL_SPEC 2.9)."""
    spec = ParamSpec(
        f"{name}.attention_sink_bias",
        (kv_heads, group),
        ("kv_heads", "group"),
        init="zeros",
        stored_shape=(kv_heads * group,),
    )
    return declare(make, spec)
