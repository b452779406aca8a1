"""From a fused QKV projection to queries and a cache."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array, Float, Int

from pallas_kernels import backends
from pallas_kernels.backends import REFERENCE, Implementation
from pallas_kernels.rotate_and_store import mosaic_tpu, reference, triton
from pallas_kernels.rotate_and_store.reference import Heads

# Preferred first.
IMPLEMENTATIONS = (
    Implementation("triton", triton.unsupported, triton.rotate_and_store),
    Implementation("mosaic_tpu", mosaic_tpu.unsupported, mosaic_tpu.rotate_and_store),
    Implementation(REFERENCE, lambda *_: None, reference.rotate_and_store),
)


def rotate_and_store(
    fused: Float[Array, "B T C R"],
    positions: Int[Array, "B T"],
    k_cache: Float[Array, "B S K H"],
    v_cache: Float[Array, "B S K V"],
    *,
    heads: Heads,
    ring: bool,
    kernels: Sequence[str] = (REFERENCE,),
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B S K H"], Float[Array, "B S K V"]]:
    """Rotated queries of new tokens, and a cache with their keys and values in it.

    `reference.rotate_and_store` defines it and has the other arguments.

    Args:
      kernels: backends that may be used; the reference is used where none of them has this.

    Raises:
      NotImplementedError: differentiating a kernel.
    """
    args = (fused, positions, k_cache, v_cache)
    case, options = (fused, k_cache, heads, ring), {"heads": heads, "ring": ring}
    allowed = (*kernels, REFERENCE)
    return backends.call("rotate_and_store", IMPLEMENTATIONS, allowed, case, *args, **options)
