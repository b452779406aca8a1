"""One declaration a parameter, from which everything else about it follows.

A module declares each of its parameters once as a `ParamSpec`: shape, logical axes, initialiser,
storage format and the name it has in a checkpoint.  It passes the spec to the `Make` function it
was built with, which decides what the value is: random numbers, a shape only, or what a checkpoint
holds.  The spec stays with the parameter (`param.spec`), so that saving, sharding and inspection
need no second table.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mimo_jax.quant import FP8Array, MXFP4Array, quantize_fp8, quantize_mxfp4
from pallas_kernels.packed import FP8Columns, FP8Words, MXFP4Columns, MXFP4Words

Format = Literal["plain", "fp8", "mxfp4"]


@dataclasses.dataclass(frozen=True)
class QKVRows:
    """Rows of one chunk of a fused QKV matrix: queries, then keys, then values."""

    q: int
    k: int
    v: int

    @property
    def total(self) -> int:
        """Rows of a chunk."""
        return self.q + self.k + self.v


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Declaration of one parameter.

    Attributes:
      name: tensor name in a checkpoint.  `{}` stands for the expert index where the parameter
        stacks one tensor an expert in its first dimension.
      shape: logical shape, whatever the storage format.
      axes: a logical axis name (or None) a dimension, for `ShardingRules`.
      init: "normal" (standard deviation `std`), "zeros" or "ones".
      dtype: storage dtype of a plain parameter; None means the model's.
      format: how the release stores it.
      qkv: set for fused QKV matrices [C, R, D]: the rows of each of the C chunks.
      stored_shape: shape of the tensor in a checkpoint, where it has fewer dimensions.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Literal["normal", "zeros", "ones"] = "normal"
    std: float = 0.02
    dtype: str | None = None
    format: Format = "plain"
    qkv: QKVRows | None = None
    stored_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"{self.name}: {len(self.axes)} axes for shape {self.shape}")

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of the tensor (of one expert's, where they are stacked) in a checkpoint."""
        if self.stored_shape is not None:
            return self.stored_shape
        return self.shape[1:] if "{}" in self.name else self.shape

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def value_format(value: Any) -> Format:
    """How a parameter's value is held in memory."""
    if isinstance(value, FP8Array | FP8Words | FP8Columns):
        return "fp8"
    return "mxfp4" if isinstance(value, MXFP4Array | MXFP4Words | MXFP4Columns) else "plain"


Make = Callable[[ParamSpec], Any]


def declare(make: Make, spec: ParamSpec) -> nnx.Param:
    """The parameter that `spec` declares, with the value `make` gives it."""
    return nnx.Param(make(spec), spec=spec)


def random_init(key: jax.Array, dtype: Any, *, quantized: bool = False) -> Make:
    """A `Make` that draws initial weights; the same key and name give the same weights.

    Args:
      key: PRNG key.
      dtype: dtype of parameters that do not set their own.
      quantized: store weights in the release's format instead of `dtype`.
    """

    def make(spec: ParamSpec) -> Any:
        plain_dtype = jnp.dtype(spec.dtype or dtype)
        if spec.init != "normal":
            fill = jnp.ones if spec.init == "ones" else jnp.zeros
            return fill(spec.shape, plain_dtype)
        own_key = jax.random.fold_in(key, stable_hash(spec.name))
        w = spec.std * jax.random.normal(own_key, spec.shape, jnp.float32)
        if quantized and spec.format == "fp8":
            return quantize_fp8(w)
        if quantized and spec.format == "mxfp4":
            return quantize_mxfp4(w)
        return w.astype(plain_dtype)

    return make


def abstract(build: Callable[[Make], nnx.Module], dtype: Any, *, quantized: bool = False) -> Any:
    """The module that `build` makes, with `jax.ShapeDtypeStruct` for every array."""
    return nnx.eval_shape(lambda: build(random_init(jax.random.key(0), dtype, quantized=quantized)))


def parameters(module: nnx.Module) -> Iterator[tuple[str, nnx.Param]]:
    """Every parameter of a module with its path, in a stable order."""
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        yield ".".join(map(str, path)), variable


def parameter_count(module: nnx.Module) -> int:
    """Number of weights, counted in logical shapes."""
    return sum(param.spec.size for _, param in parameters(module))


def parameter_bytes(module: nnx.Module) -> int:
    """Bytes of all arrays in their storage formats (works on abstract modules)."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(module))


def stable_hash(name: str) -> int:
    """A 31-bit FNV-1a hash of a parameter's name: Python's own differs between processes."""
    h = 0x811C9DC5
    for byte in name.encode():
        h = ((h ^ byte) * 0x01000193) & 0xFFFFFFFF
    return h >> 1
