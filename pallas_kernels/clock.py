"""The device's clock, read in the middle of a program.

A compiled loop has parts that the host can't time, as it sees only the whole.  NVIDIA GPUs have a
register that counts nanoseconds; a kernel of one warp reads it, in 1.4 us.  Other devices have
nothing of the kind that a program could read.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Int32

from pallas_kernels.triton import ANYWHERE

# Seconds of a tick.
TICK = 1024e-9
# Ticks are counted up to this, 37 minutes, then from 0 again.
WRAP = 2**31
LANES = 32  # of a warp, which all read it
_READ = """{
  .reg .u64 now;
  mov.u64 now, %globaltimer;
  shr.u64 now, now, 10;
  cvt.u32.u64 $0, now;
  and.b32 $0, $0, 0x7fffffff;
}"""


def read(x: Int32[Array, "*b"]) -> tuple[Int32[Array, "*b"], Int32[Array, ""]]:
    """Integers, and the time when they had been computed.

    What is computed from the integers returned is computed after that time.

    Args:
      x: any; in a `shard_map`, a device's own.

    Returns:
      The same integers, and ticks; 0 where a program can't read the time.
    """
    return jax.lax.platform_dependent(x, cuda=_read, default=lambda x: (x, jnp.int32(0)))


def elapsed(begin: Int32[Array, "*b"], end: Int32[Array, "*b"]) -> Int32[Array, "*b"]:
    """Ticks from one time to a later one, less than WRAP."""
    return (end - begin) & (WRAP - 1)


def _read(x: Array) -> tuple[Array, Array]:
    now = pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct((LANES,), jnp.int32),
        in_specs=[ANYWHERE],
        out_specs=ANYWHERE,
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        name="clock",
    )(x.reshape(-1))[0]
    # Ticks are not negative, which the compiler doesn't know.
    return x + jnp.minimum(now, 0), now


def _kernel(x_ref: Any, now_ref: Any) -> None:
    lane = jnp.arange(LANES)
    some = plt.load(x_ref.at[jnp.zeros_like(lane)])
    ticks = jax.ShapeDtypeStruct((LANES,), jnp.int32)
    (now,) = plt.elementwise_inline_asm(
        _READ, args=[some], constraints="=r,r", pack=1, result_shape_dtypes=[ticks]
    )
    plt.store(now_ref.at[lane], now)
