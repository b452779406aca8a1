"""Attention of a few new tokens over a cache."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array, Float, Int

from pallas_kernels import backends
from pallas_kernels.backends import REFERENCE, Implementation
from pallas_kernels.decode_attention import mosaic_tpu, reference, triton

# Preferred first.
IMPLEMENTATIONS = (
    Implementation("triton", triton.unsupported, triton.decode_attention),
    Implementation("mosaic_tpu", mosaic_tpu.unsupported, mosaic_tpu.decode_attention),
    Implementation(REFERENCE, lambda *_: None, reference.decode_attention),
)


def decode_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    positions: Int[Array, "B T"],
    *,
    window: int | None = None,
    sink: Float[Array, "K G"] | None = None,
    causal: bool = True,
    kernels: Sequence[str] = (REFERENCE,),
) -> Float[Array, "B T K G V"]:
    """Softmax attention over a cache that has the tokens' own keys and values already.

    `reference.decode_attention` defines it and has the other arguments.

    Args:
      kernels: backends that may be used.

    Raises:
      NotImplementedError: none of the backends can do this; differentiating a kernel.
    """
    options = {"window": window, "causal": causal}
    args = (q, k, v, positions, sink)
    return backends.call(
        "decode_attention", IMPLEMENTATIONS, kernels, (q, k, v, window), *args, **options
    )
