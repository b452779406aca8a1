"""What the benchmarks of kernels share: jobs and checks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import backends


@dataclasses.dataclass(frozen=True)
class Job:
    """Something to check and to time.

    Attributes:
      operation, case, backend: for the table.
      program: several calls, jitted; returns its last activations and all of the first call.
      args: of it.
      calls: how many.
      bytes, flops: of one call.
      check: from the results of the first call to what the table says of them; None for plain XLA
        and what others made, which may also fail.
    """

    operation: str
    case: str
    backend: str
    program: Any
    args: tuple
    calls: int
    bytes: float
    flops: float
    check: Callable[..., dict[str, Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Check:
    """A small case to check.

    Attributes:
      operation, case: for the table.
      kernel: what is to do it.
      definition: the reference; given the arguments with all bfloat16 as float32.
      args, options: of both.
    """

    operation: str
    case: str
    kernel: backends.Implementation
    definition: Callable[..., Any]
    args: tuple
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def poison(gib: int) -> None:
    """Fills free memory with NaN, so that results which aren't written show."""
    jax.block_until_ready([jnp.full(2**28, jnp.nan, jnp.float32) for _ in range(gib)])


def n_calls(read: float, flops: float) -> int:
    """Calls a program: so many that the host, which takes some 0.3 ms to start one, keeps ahead."""
    shortest = read / 3e12 + flops / 8e14  # on the fastest device we have measured
    return min(24, max(3, math.ceil(2e-3 / shortest)))


def supported(implementations: Any, name: str, case: tuple) -> bool:
    """Whether a backend has something for a case."""
    return backends.choose(implementations, (name,), *case)[0] is not None
