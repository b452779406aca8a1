"""Router scores in Triton, in float32: of few tokens the router is read once, as it is.

Up to eight tokens, a program an expert multiplies and adds.  More have matrix instructions, for the
bfloat16 `split_scores.parts` of the router, which are made in registers here.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.moe.split_scores import LONGEST, parts, total
from pallas_kernels.triton import ANYWHERE

# Up to which they were faster than `split_scores`, of a bfloat16 and of a float32 router.
MAX_TOKENS, MAX_TOKENS_FLOAT32 = 4096, 1024
FEW_TOKENS = 8  # up to which they are multiplied without matrix instructions
BLOCK = 1024  # columns at a time


@dataclasses.dataclass(frozen=True)
class Config:
    """How the product of more than `FEW_TOKENS` is cut.

    Attributes:
      tokens, experts: of a program.
      columns: at a time.
      splits: programs that share the columns; XLA adds up their sums.
      stages, warps: for Triton.
    """

    tokens: int
    experts: int
    splits: int
    columns: int = 64
    stages: int = 3
    warps: int = 2


def configure(tokens: int, dim: int, router_dtype: Any) -> Config:
    """What was fastest on an H100 (benchmarks/LOG.md)."""
    if tokens <= 64:
        return Config(max(16, pl.next_power_of_2(tokens)), experts=16, splits=16)
    splits = pl.cdiv(dim, LONGEST)
    if router_dtype == jnp.bfloat16:
        return Config(128, experts=64, splits=splits, stages=4, warps=8)
    return Config(64, experts=64, splits=2 * splits, stages=4, warps=4)


def unsupported(x: Any, router: Any) -> str | None:
    """Why these kernels can't do a case; None if they can."""
    most = MAX_TOKENS if router.dtype == jnp.bfloat16 else MAX_TOKENS_FLOAT32
    if len(x) > most:
        return f"{len(x)} tokens are more than {most}"
    if len(x) > FEW_TOKENS and x.dtype != jnp.bfloat16:
        return f"activations are {x.dtype} and not bfloat16, and more than {FEW_TOKENS}"
    return None


def scores(
    x: Float[Array, "P D"],
    router: Float[Array, "E D"],
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "P E"]:
    """`reference.scores`.

    Raises:
      NotImplementedError: with the reason, if it can't.
    """
    if reason := unsupported(x, router):
        raise NotImplementedError(reason)
    if len(x) > FEW_TOKENS:
        config = config or configure(len(x), x.shape[1], router.dtype)
        return _by_matrix_instructions(x, router, config, interpret)
    return pl.pallas_call(
        functools.partial(_kernel, tokens=len(x), dim=x.shape[1]),
        out_shape=jax.ShapeDtypeStruct((len(x), len(router)), jnp.float32),
        grid=(len(router),),
        in_specs=[ANYWHERE] * 2,
        out_specs=ANYWHERE,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="moe_scores",
    )(x, router)


def unsupported_normed(x: Any, router: Any) -> str | None:
    """Why norm and scores can't be one kernel; None if they can."""
    del router
    if x.dtype != jnp.bfloat16:
        return f"activations are {x.dtype} and not bfloat16"
    return None if len(x) == 1 else f"{len(x)} tokens are more than one"


def normed_scores(
    x: Float[Array, "P D"],
    weight: Float[Array, " D"],
    router: Float[Array, "E D"],
    *,
    eps: float,
    interpret: bool = False,
) -> tuple[Float[Array, "P D"], Float[Array, "P E"]]:
    """`moe.normed_scores`, of one token: every program normalises it for itself.

    Raises:
      NotImplementedError: with the reason, if it can't.
    """
    if reason := unsupported_normed(x, router):
        raise NotImplementedError(reason)
    dim = x.shape[1]
    y, of_all = pl.pallas_call(
        functools.partial(_normed_kernel, eps=eps),
        out_shape=(
            jax.ShapeDtypeStruct((dim,), x.dtype),
            jax.ShapeDtypeStruct((len(router),), jnp.float32),
        ),
        grid=(len(router),),
        in_specs=[ANYWHERE] * 3,
        out_specs=(ANYWHERE,) * 2,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="moe_normed_scores",
    )(x.reshape(-1), weight, router)
    return y[None], of_all[None]


def _normed_kernel(
    x_ref: Any, weight_ref: Any, router_ref: Any, y_ref: Any, scores_ref: Any, *, eps: float
) -> None:
    expert, [dim] = pl.program_id(0), x_ref.shape
    block = min(BLOCK, pl.next_power_of_2(dim))
    columns = [start + jnp.arange(block) for start in range(0, dim, block)]

    def load(ref: Any, *at: Any) -> list[Array]:
        return [plt.load(ref.at[*at, c], mask=c < dim, other=0.0) for c in columns]

    router, x, weight = load(router_ref, expert), load(x_ref), load(weight_ref)
    x = [part.astype(jnp.float32) for part in x]
    scale = jax.lax.rsqrt(jnp.sum(sum(part * part for part in x)) / dim + eps)
    y = [(part * scale).astype(y_ref.dtype) * w.astype(y_ref.dtype) for part, w in zip(x, weight)]

    @pl.when(expert == 0)
    def _() -> None:
        for c, part in zip(columns, y):
            plt.store(y_ref.at[c], part, mask=c < dim)

    products = sum(a.astype(jnp.float32) * b.astype(jnp.float32) for a, b in zip(y, router))
    plt.store(scores_ref.at[expert], jax.nn.sigmoid(jnp.sum(products)))


def _kernel(x_ref: Any, router_ref: Any, out_ref: Any, *, tokens: int, dim: int) -> None:
    expert = pl.program_id(0)
    block = min(BLOCK, pl.next_power_of_2(dim))
    sums = [jnp.zeros(block, jnp.float32) for _ in range(tokens)]
    for start in range(0, dim, block):
        column = start + jnp.arange(block)
        there = column < dim
        weight = plt.load(router_ref.at[expert, column], mask=there, other=0.0)
        for t in range(tokens):
            value = plt.load(x_ref.at[t, column], mask=there, other=0.0)
            sums[t] += weight.astype(jnp.float32) * value.astype(jnp.float32)
    token = jnp.arange(FEW_TOKENS)
    logits = sum(jnp.where(token == t, jnp.sum(sums[t]), 0.0) for t in range(tokens))
    plt.store(out_ref.at[token, expert], jax.nn.sigmoid(logits), mask=token < tokens)


def _by_matrix_instructions(
    x: Float[Array, "P D"], router: Float[Array, "E D"], config: Config, interpret: bool
) -> Float[Array, "P E"]:
    tokens, dim = x.shape
    n_experts = len(router)
    steps = pl.cdiv(dim, config.columns * config.splits)
    n_parts = len(jax.eval_shape(parts, router))

    def kernel(x_ref: Any, router_ref: Any, out_ref: Any) -> None:
        expert = pl.program_id(0) * config.experts + jnp.arange(config.experts)
        token = pl.program_id(1) * config.tokens + jnp.arange(config.tokens)
        split = pl.program_id(2)

        def body(step: Any, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            column = (split * steps + step) * config.columns + jnp.arange(config.columns)
            weights = plt.load(
                router_ref.at[expert[:, None], column[None, :]],
                mask=(expert < n_experts)[:, None] & (column < dim)[None, :],
                other=0.0,
            )
            values = plt.load(
                x_ref.at[token[None, :], column[:, None]],
                mask=(token < tokens)[None, :] & (column < dim)[:, None],
                other=0.0,
            )
            return tuple(y + plt.dot(part, values) for y, part in zip(sums, parts(weights)))

        zeros = jnp.zeros((len(expert), len(token)), jnp.float32)
        products = jax.lax.fori_loop(0, steps, body, (zeros,) * n_parts)
        plt.store(
            out_ref.at[split, token[None, :], expert[:, None]],
            total(products),
            mask=(token < tokens)[None, :] & (expert < n_experts)[:, None],
        )

    shares = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((config.splits, tokens, n_experts), jnp.float32),
        grid=(pl.cdiv(n_experts, config.experts), pl.cdiv(tokens, config.tokens), config.splits),
        in_specs=[ANYWHERE] * 2,
        out_specs=ANYWHERE,
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret,
        name="moe_scores_matrix",
    )(x, router)
    return jax.nn.sigmoid(shares.sum(axis=0))
