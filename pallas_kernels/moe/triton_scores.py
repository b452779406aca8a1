"""Router scores of few tokens, in Triton: one program an expert, in float32.

XLA's exact product for one token and the sigmoid after it take several kernels.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

MAX_TOKENS = 8
BLOCK = 1024  # columns at a time


def unsupported(x: Any, router: Any) -> str | None:
    """Why this kernel can't do a case; None if it can."""
    del router
    return f"{len(x)} tokens are more than {MAX_TOKENS}" if len(x) > MAX_TOKENS else None


def scores(
    x: Float[Array, "P D"], router: Float[Array, "E D"], *, interpret: bool = False
) -> Float[Array, "P E"]:
    """`reference.scores`.

    Raises:
      NotImplementedError: with the reason, if it can't.
    """
    if reason := unsupported(x, router):
        raise NotImplementedError(reason)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(_kernel, tokens=len(x), dim=x.shape[1]),
        out_shape=jax.ShapeDtypeStruct((len(x), len(router)), jnp.float32),
        grid=(len(router),),
        in_specs=[anywhere] * 2,
        out_specs=anywhere,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="moe_scores",
    )(x, router)


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
    token = jnp.arange(MAX_TOKENS)
    logits = sum(jnp.where(token == t, jnp.sum(sums[t]), 0.0) for t in range(tokens))
    plt.store(out_ref.at[token, expert], jax.nn.sigmoid(logits), mask=token < tokens)
