"""The weighted sum of experts' outputs that lie by token and slot."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def weighted_sum(
    y: Float[Array, "P X D"], weights: Float[Array, "P X"], chosen: Int[Array, "P X"], gate: Any
) -> Float[Array, "P D"]:
    """Sum over X in float32; what experts that are elsewhere left in y is not looked at."""
    here = (chosen >= 0) & (chosen < gate.shape[0])
    terms = jnp.where(here[..., None], weights[..., None] * y.astype(jnp.float32), 0)
    return terms.sum(axis=1)
