"""Choice of each token's experts, in Triton: one program a token, all of it in registers.

XLA sorts for its top-k on GPUs, in several kernels.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

MAX_EXPERTS = 1024
LARGEST = 2**31 - 1


def unsupported(scores: Any) -> str | None:
    """Why this kernel can't do a case; None if it can."""
    if scores.shape[-1] > MAX_EXPERTS:
        return f"{scores.shape[-1]} experts are more than {MAX_EXPERTS}"
    return None


def route(
    scores: Float[Array, "P E"],
    bias: Float[Array, " E"],
    top_k: int,
    *,
    normalize: bool,
    scale: float | None,
    interpret: bool = False,
) -> tuple[Float[Array, "P X"], Int[Array, "P X"]]:
    """`reference.route`, bit for bit.

    Raises:
      NotImplementedError: with the reason, if it can't.
    """
    if reason := unsupported(scores):
        raise NotImplementedError(reason)
    tokens, n_experts = scores.shape
    kernel = functools.partial(
        _kernel,
        n_experts=n_experts,
        top_k=top_k,
        normalize=normalize,
        scale=scale,
    )
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        kernel,
        out_shape=(
            jax.ShapeDtypeStruct((tokens, top_k), jnp.float32),
            jax.ShapeDtypeStruct((tokens, top_k), jnp.int32),
        ),
        grid=(tokens,),
        in_specs=[anywhere] * 2,
        out_specs=(anywhere, anywhere),
        # One warp: its reductions need no shared memory and no barrier.
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="moe_route",
    )(scores, bias)


def _kernel(
    scores_ref: Any,
    bias_ref: Any,
    weights_ref: Any,
    chosen_ref: Any,
    *,
    n_experts: int,
    top_k: int,
    normalize: bool,
    scale: float | None,
) -> None:
    token = pl.program_id(0)
    chosen = choice(scores_ref, bias_ref, token, n_experts=n_experts, top_k=top_k)
    mix(scores_ref, token, chosen, weights_ref, chosen_ref, normalize=normalize, scale=scale)


def choice(
    scores_ref: Any, bias_ref: Any, token: Any, *, n_experts: int, top_k: int
) -> list[Int[Array, ""]]:
    """In a kernel: the experts of a token, the best first."""
    expert = jnp.arange(pl.next_power_of_2(n_experts))
    there = expert < n_experts
    left = plt.load(scores_ref.at[token, expert], mask=there, other=0.0)
    left = left + plt.load(bias_ref.at[expert], mask=there, other=0.0)
    # In the order of the numbers, as integers: of these a warp finds the greatest in one step.
    left = jax.lax.bitcast_convert_type(left, jnp.int32)
    left = jnp.where(there, left ^ ((left >> 31) & LARGEST), -LARGEST - 1)
    chosen = []
    for _ in range(top_k):
        # Of equals the first, as in lax.top_k.
        best = jnp.min(jnp.where(left == jnp.max(left), expert, LARGEST))
        left = jnp.where(expert == best, -LARGEST - 1, left)
        chosen.append(best)
    return chosen


def mix(
    scores_ref: Any,
    token: Any,
    chosen: list[Int[Array, ""]],
    weights_ref: Any,
    chosen_ref: Any,
    *,
    normalize: bool,
    scale: float | None,
) -> None:
    """In a kernel: stores a token's experts and their weights."""
    slot = jnp.arange(pl.next_power_of_2(len(chosen)))
    total = jnp.float32(0)
    weights, experts = jnp.zeros(slot.shape, jnp.float32), jnp.zeros(slot.shape, jnp.int32)
    for k, best in enumerate(chosen):
        score = plt.load(scores_ref.at[token, best])
        total = total + score
        weights = jnp.where(slot == k, score, weights)
        experts = jnp.where(slot == k, best, experts)
    if normalize:
        weights = weights / (total + 1e-20)  # rounds as XLA:GPU does; so div.rn would not
    if scale is not None:
        weights = weights * scale
    wanted = slot < len(chosen)
    plt.store(weights_ref.at[token, slot], weights, mask=wanted)
    plt.store(chosen_ref.at[token, slot], experts, mask=wanted)
