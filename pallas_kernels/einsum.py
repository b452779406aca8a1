"""The product that references and models are defined by."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def einsum32(equation: str, *operands: Array, out_sharding: Any = None) -> Array:
    """An einsum with float32 accumulation and result; float32 operands are multiplied exactly
    (GPUs and TPUs round them to fewer bits by default)."""
    exact = all(o.dtype == jnp.float32 for o in operands)
    return jnp.einsum(
        equation,
        *operands,
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
        out_sharding=out_sharding,
    )
