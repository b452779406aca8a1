"""Attention of many tokens in Mosaic GPU, for Hopper: a kernel over all keys, one in a window."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import mosaic_gpu_blocks as over_blocks
from pallas_kernels.attention import mosaic_gpu_window as in_window
from pallas_kernels.attention.mosaic_gpu_blocks import TOKENS, Config
from pallas_kernels.attention.mosaic_gpu_parts import ALIGNED, LOG2E, ROWS, Span
from pallas_kernels.attention.mosaic_gpu_window import MAX_WINDOW, WINDOW_KEYS
from pallas_kernels.mosaic_gpu import SHARED_MEMORY

MAX_VALUE = 128  # a head's values; more lack the registers


def unsupported(q: Any, k: Any, v: Any, window: int | None = None) -> str | None:
    """Why this kernel can't do a case of arrays, or of their shapes; None if it can."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != jnp.bfloat16:
            return f"{name} is {x.dtype}, not bfloat16"
    head, value = q.shape[-1], v.shape[-1]
    if head % 64 or value % 64:
        return f"head sizes {head} and {value} are not multiples of 64"
    if value > MAX_VALUE:
        return f"values of {value} are larger than {MAX_VALUE}"
    config = Config()
    needed = 2 * (TOKENS * max(head, value) + config.stages * config.keys * (head + value))
    if needed > SHARED_MEMORY:
        return f"head sizes {head} and {value} need {needed} bytes of shared memory"
    if window is not None and window < 1:
        return f"a window of {window} has no positions"
    return None


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
    config: Config | None = None,
    interpret: Any = False,
) -> Float[Array, "B T K G V"]:
    """`reference.attention`, of bfloat16; keys and values must be finite, also unseen ones.

    Numbers of tokens and keys that are no multiples of 8 cost copies of the arrays.

    Args:
      config: of the kernel over all keys; by default what was fastest in a study.
      interpret: True, or `InterpretGPUParams`, to simulate on a CPU.

    Raises:
      NotImplementedError: with the reason, if it can't.
    """
    if reason := unsupported(q, k, v, window):
        raise NotImplementedError(reason)
    if interpret is True:
        interpret = plgpu.InterpretGPUParams()
    config = config or Config()
    b, t, kv_heads, group, head = q.shape
    n_keys, value = k.shape[1], v.shape[-1]
    scratch = over_blocks.scratch_types(head, value, config)
    tiles, shared = -(-t // TOKENS), False
    if window is not None and window <= MAX_WINDOW and in_window.fits(head, value):
        scratch = in_window.scratch_types(head, value)
        tiles, shared = -(-t // in_window.stride_of(window)), True
    if interpret:  # which doesn't know weights in registers
        keys = WINDOW_KEYS if shared else config.keys
        scratch["weights"] = plgpu.SMEM((2, ROWS, keys), jnp.bfloat16)

    def aligned(x: Array) -> Array:
        padding = -x.shape[1] % ALIGNED
        return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) if padding else x

    q, k, v = aligned(q.reshape(b, t, kv_heads * group, head)), aligned(k), aligned(v)
    operands = [first_query, first_key, newest]
    if sink is not None:
        # Exponents are of 2: scores and the sink are multiplied by log2(e).
        operands.append(sink.astype(jnp.float32).reshape(-1) * LOG2E)

    def body(first_query_ref: Any, first_key_ref: Any, newest_ref: Any, *refs: Any, **scratch: Any):
        refs = refs if sink is not None else (None, *refs)
        sequence = lax.axis_index("sequence")
        position = first_key_ref[sequence]
        offset = first_query_ref[sequence] - position
        span = Span(offset, position, newest_ref[sequence], n_keys, window)
        if shared:
            in_window.program(span, sequence, t, group, refs, scratch)
        else:
            over_blocks.program(span, sequence, tiles, group, refs, scratch, config)

    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((*q.shape[:3], value), jnp.bfloat16),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        # The last axis varies fastest.
        grid=(tiles, b, kv_heads if shared else kv_heads * group),
        grid_names=("tile", "sequence", "head"),
        num_threads=2 if shared else 3,
        thread_name="warpgroup",
        kernel_name="attention_window" if shared else "attention",
        interpret=interpret or None,
    )(*operands, q, k, v)
    return out[:, :t].reshape(b, t, kv_heads, group, value)
