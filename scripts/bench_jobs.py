"""What the benchmarks of kernels share: jobs, clocks and errors."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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


def timed(program: Any, args: tuple, calls: int, groups: int = 5) -> float:
    """Seconds of a call: the median of several groups of runs of a compiled program."""
    jax.block_until_ready(program(*args))
    started = time.perf_counter()
    jax.block_until_ready(program(*args))
    runs = max(1, min(8, int(0.05 / (time.perf_counter() - started))))
    times = []
    for _ in range(groups):
        started = time.perf_counter()
        for _ in range(runs):
            out = program(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - started) / runs / calls)
    return statistics.median(times)


def poison(gib: int) -> None:
    """Fills free memory with NaN, so that results which aren't written show."""
    jax.block_until_ready([jnp.full(2**28, jnp.nan, jnp.float32) for _ in range(gib)])


def error(got: Any, expected: Any) -> float:
    """Relative error, by norm."""
    got, expected = np.asarray(got, np.float32), np.asarray(expected)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def n_calls(read: float, flops: float) -> int:
    """Calls a program: so many that the host, which takes some 0.3 ms to start one, keeps ahead."""
    shortest = read / 3e12 + flops / 8e14  # on the fastest device we have measured
    return min(24, max(3, math.ceil(2e-3 / shortest)))


def supported(implementations: Any, name: str, case: tuple) -> bool:
    """Whether a backend has something for a case."""
    return backends.choose(implementations, (name,), *case)[0] is not None
