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


def chain(call: Callable[..., Any], sets: int, shortest: float) -> tuple[Any, int]:
    """A program of calls, each on the next set of what is read, and how many calls there are.

    Args:
      call: from q, what is the same in all calls, and a set.
      sets: how many sets there are.
      shortest: seconds of a call, about: a program takes some milliseconds.
    """
    trips = max(1, math.ceil(3e-3 / (shortest * sets)))

    def program(q: Any, given: Any, held: Any) -> tuple[Any, tuple]:
        # All results are kept, or XLA would leave out those that only the barrier needs.
        def trip(_: Any, carry: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
            q, results = carry[0], []
            for one in held:
                q, y = jax.lax.optimization_barrier((q, call(q, given, one)))
                results.append(y)
            return q, results

        kinds = jax.eval_shape(call, q, given, held[0])
        empty = [jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), kinds) for _ in held]
        results = jax.lax.fori_loop(0, trips, trip, (q, empty))[1]
        return results, (results[0],)

    return jax.jit(program), trips * sets


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
