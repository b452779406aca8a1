"""What a decoding step has between its great reads: a part of `python scripts/bench.py kernels`."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from bench_jobs import Check, Job, supported

from mimo_jax.portability.timing import chain, error
from pallas_kernels import moe, residual_matmul, rotate_and_store
from pallas_kernels.backends import REFERENCE
from pallas_kernels.moe import reference as moe_reference
from pallas_kernels.residual_matmul import cases as projections
from pallas_kernels.residual_matmul import reference as projection_reference
from pallas_kernels.rms_norm import reference as norm_reference
from pallas_kernels.rotate_and_store import cases, reference

EPS, TOP_K = 1e-5, 8
WEIGHTS = 4e8  # bytes of projections to take in turn: more than a cache holds
DIM, EXPERTS, ROUTERS = 6144, 384, 13  # of Pro; 120 MB of routers to take in turn


def small_checks(args: argparse.Namespace, names: tuple[str, ...]) -> Iterator[Check]:
    """Every small case by every kernel that can do it."""
    for name, case in cases.SMALL.items():
        if args.only not in f"step rotate_and_store {name}":
            continue
        given, options = cases.arrays(case, args.seed)
        for kernel in rotate_and_store.IMPLEMENTATIONS:
            able = not kernel.unsupported(given[0], given[2], case.heads, case.ring)
            if kernel.backend in names and able:
                yield Check(
                    "rotate_and_store", name, kernel, reference.rotate_and_store, given, options
                )
    for name, case in projections.SMALL.items():
        if args.only not in f"step residual_matmul {name}":
            continue
        given = projections.arrays(case, args.seed)
        for kernel in residual_matmul.IMPLEMENTATIONS:
            if kernel.backend in names and not kernel.unsupported(*given[:2]):
                definition = projection_reference.residual_matmul
                yield Check("residual_matmul", name, kernel, definition, given)


def jobs(args: argparse.Namespace, names: tuple[str, ...]) -> Iterator[list[Job]]:
    """From a projection to queries and a cache; an attention's output projection and what it is
    added to; and norm, scores and choice of experts."""
    for name, case in cases.REAL.items():
        if args.only in f"step rotate_and_store {name}":
            yield list(_rotate_jobs(name, case, names, args.seed))
    for name, case in projections.REAL.items():
        if args.only in f"step residual_matmul {name}":
            yield list(_projection_jobs(name, case, names, args.seed))
    for rows in (1, 8):
        name = f"norm and routing {rows}"
        if args.only in f"step {name}":
            yield list(_routing_jobs(name, rows, names, args.seed))


def _rotate_jobs(name: str, case: cases.Case, names: tuple[str, ...], seed: int) -> Iterator[Job]:
    (fused, positions, *caches), options = cases.arrays(case, seed)
    read = 2.0 * 2 * fused.size
    check = functools.partial(_rotate_check, given=(fused, positions, *caches), options=options)
    trips, unrolled = 15, 20  # A turn of a loop costs as much as some calls.
    for backend in (*names, REFERENCE):
        of_ours = backend != REFERENCE
        kernel_case = (fused, caches[0], case.heads, case.ring)
        if of_ours and not supported(rotate_and_store.IMPLEMENTATIONS, backend, kernel_case):
            continue

        def program(fused: Any, positions: Any, k: Any, v: Any, backend: str = backend) -> Any:
            def call(k: Any, v: Any) -> Any:
                return rotate_and_store.rotate_and_store(
                    fused, positions, k, v, kernels=(backend,), **options
                )

            def trip(_: Any, carry: tuple[Any, Any, Any]) -> Any:
                results, caches = [], carry[1:]
                for _ in range(unrolled):
                    q, *caches = call(*caches)
                    results.append(q)
                return results, *caches

            first = call(k, v)
            empty = [jnp.zeros_like(first[0]) for _ in range(unrolled)]
            return jax.lax.fori_loop(0, trips, trip, (empty, k, v)), first

        given = (fused, positions, *caches)
        label, checked = (backend, check) if of_ours else ("plain XLA", None)
        yield Job(
            *("rotate_and_store", name, label, jax.jit(program), given),
            *(1 + trips * unrolled, read, 0.0, checked),
        )


def _rotate_check(*results: Any, given: tuple, options: dict[str, Any]) -> dict[str, Any]:
    exact = [a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a for a in given]
    call = functools.partial(reference.rotate_and_store, **options)
    pairs = zip(results, jax.jit(call)(*exact), strict=True)
    return {"error": max(error(got, expected) for got, expected in pairs)}


def _projection_jobs(
    name: str, case: projections.Case, names: tuple[str, ...], seed: int
) -> Iterator[Job]:
    x, w, residual = projections.arrays(case, seed)
    read, flops = 2.0 * w.size, 2.0 * case.tokens * w.size
    keys = jax.random.split(jax.random.key(seed), math.ceil(WEIGHTS / read) - 1)
    held = [w, *(jax.random.normal(key, w.shape, w.dtype) for key in keys)]
    check = functools.partial(_projection_check, given=(x, w, residual))
    for backend in (*names, REFERENCE):
        of_ours = backend != REFERENCE
        if of_ours and not supported(residual_matmul.IMPLEMENTATIONS, backend, (x, w)):
            continue

        def call(x: Any, residual: Any, w: Any, kernels: tuple[str, ...] = (backend,)) -> Any:
            return residual_matmul.residual_matmul(x, w, residual, kernels=kernels)

        program, calls = chain(call, len(held), read / 3e12)
        label, checked = (backend, check) if of_ours else ("plain XLA", None)
        yield Job(
            *("residual_matmul", name, label, program, (x, residual, held)),
            *(calls, read, flops, checked),
        )


def _projection_check(y: Any, *, given: tuple) -> dict[str, Any]:
    exact = (a.astype(jnp.float32) for a in given)
    return {"error": error(y, jax.jit(projection_reference.residual_matmul)(*exact))}


def _routing_jobs(name: str, rows: int, names: tuple[str, ...], seed: int) -> Iterator[Job]:
    keys = jax.random.split(jax.random.key(seed), 3 + ROUTERS)
    x = jax.random.normal(keys[0], (rows, DIM), jnp.bfloat16)
    weight = 1 + 0.1 * jax.random.normal(keys[1], (DIM,), jnp.bfloat16)
    bias = 0.01 * jax.random.normal(keys[2], (EXPERTS,))
    routers = [jax.random.normal(key, (EXPERTS, DIM)) / math.sqrt(DIM) for key in keys[3:]]

    def check(results: Any) -> dict[str, Any]:
        errors = routing_check(results, x=x, norm=weight, router=routers[0], bias=bias)
        return {"error": errors.pop("norm_error"), **errors}

    read, flops = 4.0 * EXPERTS * DIM, 2.0 * rows * EXPERTS * DIM
    for backend in (*names, REFERENCE):
        if backend not in ("triton", REFERENCE):
            continue

        def call(x: Any, given: Any, router: Any, kernels: tuple[str, ...] = (backend,)) -> Any:
            weight, bias = given
            y, scores = moe.normed_scores(x, weight, router, eps=EPS, kernels=kernels)
            options = {"normalize": True, "scale": None, "kernels": kernels}
            return y, scores, *moe.route(scores, bias, TOP_K, **options)

        program, calls = chain(call, ROUTERS, 1e-5)
        given = (x, (weight, bias), routers)
        label, checked = (backend, check) if backend != REFERENCE else ("plain XLA", None)
        yield Job("routing", name, label, program, given, calls, read, flops, checked)


_norm = jax.jit(functools.partial(norm_reference.rms_norm, eps=EPS))
_scores = jax.jit(moe_reference.scores)
_route = jax.jit(
    functools.partial(moe_reference.route, normalize=True, scale=None), static_argnums=2
)


def routing_check(
    results: tuple[Any, ...], *, x: Any, norm: Any, router: Any, bias: Any
) -> dict[str, Any]:
    """Normalised tokens and their scores against the reference, and the choice by these scores."""
    normed, scores, weights, chosen = results
    weights_expected, chosen_expected = _route(scores, bias, chosen.shape[1])
    return {
        "norm_error": error(normed, _norm(x.astype(jnp.float32), norm.astype(jnp.float32))),
        "scores_error": error(scores, _scores(normed, router)),
        "other_experts": int((chosen != chosen_expected).any(axis=1).sum()),
        "weights_error": error(weights, weights_expected),
    }
