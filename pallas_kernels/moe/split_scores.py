"""Router scores of many tokens: a float32 product at the rate of bfloat16's matrix instructions.

bfloat16 activations times a float32 router, exactly: a float32 number is the sum of three bfloat16
numbers, and products of two bfloat16 numbers are float32 numbers.  A router that is stored in
bfloat16, as V2.6's are, is one part.  Only the order of the additions is another than in XLA's
float32 product, which GPUs do without matrix units and TPUs in six passes.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Columns that matrix instructions sum, since those of GPUs round each addition towards zero.
LONGEST = 2048
UPPER_HALF = -(2**16)  # of 32 bits: sign, exponent and 7 bits of mantissa of a float32 number


def unsupported(x: Any, router: Any) -> str | None:
    """Why this can't do a case; None if it can."""
    del router
    return None if x.dtype == jnp.bfloat16 else f"activations are {x.dtype} and not bfloat16"


def scores(
    x: Float[Array, "P D"], router: Float[Array, "E D"], *, interpret: bool = False
) -> Float[Array, "P E"]:
    """`reference.scores`.

    Raises:
      NotImplementedError: with the reason, if it can't.
    """
    del interpret  # nothing to interpret
    if reason := unsupported(x, router):
        raise NotImplementedError(reason)
    split = parts(router)
    weights = jnp.concatenate(split)
    products = sum(
        jnp.einsum(
            "pd,ed->pe",
            x[:, start : start + LONGEST],
            weights[:, start : start + LONGEST],
            preferred_element_type=jnp.float32,
        )
        for start in range(0, x.shape[1], LONGEST)
    )
    return jax.nn.sigmoid(total(jnp.split(products, len(split), axis=1)))


def parts(router: Float[Array, "E D"]) -> list[Float[Array, "E D"]]:
    """bfloat16 arrays whose sum is the router, the largest first."""
    return [router] if router.dtype == jnp.bfloat16 else thirds(router.astype(jnp.float32))


def total(products: Sequence[Float[Array, ...]]) -> Float[Array, ...]:
    """The sum of the products with `parts`, the smallest first."""
    return functools.reduce(operator.add, reversed(products))


def thirds(w: Float[Array, "E D"]) -> list[Float[Array, "E D"]]:
    """Three bfloat16 arrays whose sum is a float32 array: its mantissa's 24 bits by eights.

    Exactly, but for numbers below 2^-102, whose last part may be no normal number.
    """
    parts = []
    for _ in range(3):
        # Bits, and not a cast and a cast back, which XLA leaves out.
        upper = jax.lax.bitcast_convert_type(w, jnp.int32) & UPPER_HALF
        part = jax.lax.bitcast_convert_type(upper, jnp.float32)
        parts.append(part.astype(jnp.bfloat16))
        w = w - part
    return parts
