"""Timing what a device does: calls in one program, each waiting for the one before."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TRIPS = 10  # at least


def chain(call: Callable[..., Any], sets: int, shortest: float) -> tuple[Any, int]:
    """A program of calls, each on the next set of what is read, and how many calls there are.

    Args:
      call: from q, what is the same in all calls, and a set.
      sets: how many sets there are.
      shortest: seconds of a call, about: a program takes some milliseconds.

    Returns:
      The program, whose last result is a tuple with that of the first call, and how many calls it
      makes.
    """
    # Results are cleared before and some are copied at the end, which many calls make up for.
    trips = max(TRIPS, math.ceil(3e-3 / (shortest * sets)))

    def program(q: Any, given: Any, held: Any) -> tuple[list, tuple]:
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
        return results[1:], (results[0],)  # once each: what is returned twice is copied

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


def error(got: Any, expected: Any) -> float:
    """Relative error, by norm."""
    got, expected = np.asarray(got, np.float32), np.asarray(expected)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
