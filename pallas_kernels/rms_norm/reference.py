"""Root-mean-square norm in plain jnp: the definition of the operation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*b D"], weight: Float[Array, " D"], *, eps: float
) -> Float[Array, "*b D"]:
    """x / sqrt(mean(x^2) + eps) in float32, and times the weight after the cast back to x's
    dtype."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype) * weight.astype(x.dtype)
