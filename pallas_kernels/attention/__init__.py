"""Attention of many new tokens."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array, Float, Int

from pallas_kernels import backends
from pallas_kernels.attention import mosaic_gpu, mosaic_tpu, reference, triton
from pallas_kernels.backends import REFERENCE, Implementation

# Preferred first.
IMPLEMENTATIONS = (
    Implementation("mosaic_gpu", mosaic_gpu.unsupported, mosaic_gpu.attention),
    Implementation("triton", triton.unsupported, triton.attention),
    Implementation("mosaic_tpu", mosaic_tpu.unsupported, mosaic_tpu.attention),
    Implementation(REFERENCE, lambda *_: None, reference.attention),
)


def attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    first_query: Int[Array, " B"],
    first_key: Int[Array, " B"],
    newest: Int[Array, " B"],
    sink: Float[Array, "K G"] | None = None,
    *,
    window: int | None = None,
    kernels: Sequence[str] = (REFERENCE,),
) -> Float[Array, "B T K G V"]:
    """Causal softmax attention of successive tokens over successive keys.

    `reference.attention` defines it and has the other arguments.

    Args:
      kernels: backends that may be used.

    Raises:
      NotImplementedError: none of the backends can do this; differentiating a kernel.
    """
    case, args = (q, k, v, window), (q, k, v, first_query, first_key, newest, sink)
    return backends.call("attention", IMPLEMENTATIONS, kernels, case, *args, window=window)
