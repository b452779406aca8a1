"""What only hardware can tell: numbers beside those of the float32 reference, and time."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mimo_jax.portability.attempts import describe
from mimo_jax.portability.operations import Operation
from mimo_jax.portability.places import Place
from mimo_jax.portability.results import Agreement, Speed, Stage
from mimo_jax.portability.timing import chain, error, timed
from pallas_kernels import backends
from sharding.plan import roofline

LIMIT = 5e-3  # of the relative error of an operation's bfloat16 results
_ROTATED = 1.2e8  # bytes to read in turn: more than a cache holds
_PEAK = 3e12, 8e14  # bytes and FLOPs a second of the fastest device, for the number of calls


def arguments(operation: Operation, place: Place, backend: str, seed: int) -> tuple[tuple, tuple]:
    """Random arguments, and the same with weights in the backend's order."""
    args = jax.jit(operation.make)(jax.random.key(seed))
    packing = jax.jit(lambda a: operation.packed(a, backend, native_e2m1=place.native_e2m1))
    return args, packing(args)


def agree(
    operation: Operation, place: Place, backend: str, call: Callable[..., Any]
) -> tuple[Stage, Agreement | None]:
    """Compares an operation with the float32 reference, on the last of its tokens.

    Args:
      operation, place, backend: what, where, by what.
      call: the operation of packed arguments.
    """
    started = time.perf_counter()
    try:
        args, packed = arguments(operation, place, backend, seed=1)
        got = operation.tail(jax.jit(call)(*packed))
        exact = [
            a.astype(jnp.float32) if getattr(a, "dtype", None) == jnp.bfloat16 else a
            for a in operation.last(args)
        ]
        with jax.default_matmul_precision("highest"):
            expected = operation.tail(jax.jit(operation.define)(*exact))
        found = error(got, expected)
    except Exception as problem:  # whatever a device says is a result
        return Stage("failed", describe(problem), time.perf_counter() - started), None
    seconds = time.perf_counter() - started
    compared = f"{got.dtype} results of random arguments"
    if not found <= LIMIT:  # NaN too
        reason = f"the relative error is {found:.2g}, more than {LIMIT:.2g}"
        return Stage("failed", reason, seconds), Agreement(found, LIMIT, compared)
    return Stage("ok", seconds=seconds), Agreement(found, LIMIT, compared)


def time_operation(
    operation: Operation, place: Place, backend: str, call: Callable[..., Any]
) -> tuple[Stage, Speed | None]:
    """Times an operation, its weights or keys and values read from memory and not from a cache."""
    started = time.perf_counter()
    try:
        n = operation.read
        _, (q, *rest) = arguments(operation, place, backend, seed=0)
        size = sum(a.nbytes for a in jax.tree.leaves(rest[len(rest) - n :]))
        count = min(64, max(1, math.ceil(_ROTATED / size)))
        first = tuple(rest[len(rest) - n :])
        held = [first, *(jax.tree.map(jnp.copy, first) for _ in range(count - 1))]
        given = tuple(rest[: len(rest) - n])
        shortest = operation.bytes / _PEAK[0] + operation.flops / _PEAK[1] + 5e-6
        program, calls = chain(lambda q, given, one: call(q, *given, *one), count, shortest)
        seconds = timed(program, (q, given, held), calls)
    except Exception as problem:
        return Stage("failed", describe(problem), time.perf_counter() - started), None
    speed = Speed(seconds, operation.bytes, operation.flops, bound(place, operation))
    return Stage("ok", seconds=time.perf_counter() - started), speed


def bound(place: Place, operation: Operation) -> float | None:
    """Seconds that an operation takes at the full speed of a device; None where unknown."""
    device = place.device
    limits = device and roofline(operation.bytes, operation.flops, device)
    return limits.seconds if limits else None


def called(operation: Operation, backend: str) -> Callable[..., Any]:
    """The operation by one backend, of packed arguments."""

    def call(*args: Any) -> Any:
        return operation.call(*args, kernels=(backend,))

    return call


def interpreting(interpreted: bool) -> Any:
    """The context in which kernels are interpreted, or one in which they aren't."""
    return backends.interpreted() if interpreted else contextlib.nullcontext()
