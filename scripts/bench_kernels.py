"""Checks and times the kernels on the sizes of MiMo's models: `python scripts/bench.py kernels`.

Every real case and every small, awkward one is compared with the float32 reference, on fresh random
inputs and with memory full of NaN where results will be.  Then real cases are timed as calls in one
program, each with the output of the one before (experts on a residual stream, as in a model), over
several sets of weights so that no cache holds them, everything of a size compiled before any of it
is timed.  Beside them stand plain XLA on the checkpoint's own format and what the device gives to a
copy and to a matrix product.  Bytes count each weight that is needed once; operations count no
padding.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import bench_attention
import bench_step
import jax
import jax.numpy as jnp
import numpy as np
from bench_jobs import Check, Job, n_calls, poison, supported
from bench_step import EPS, routing_check
from circumstances import circumstances
from rich.console import Console
from rich.table import Table

from mimo_jax.portability.timing import error, timed
from pallas_kernels import backends, moe, packed, quantized_matmul
from pallas_kernels.backends import REFERENCE, Target
from pallas_kernels.formats import FP8Array, MXFP4Array
from pallas_kernels.moe import cases as moe_cases
from pallas_kernels.moe import reference as moe_reference
from pallas_kernels.quantized_matmul import cases as matmul_cases
from pallas_kernels.quantized_matmul import reference as matmul_reference
from pallas_kernels.residual import added
from pallas_kernels.words import FP8Words, MXFP4Words

LIMIT = 5e-3  # of the relative error (norm) of bfloat16 results
SCORES_LIMIT = 1e-6  # of float32 ones
SAMPLE = 16  # tokens whose experts' results are compared
SCALE_BYTES = 119  # and 120, as in the releases
MATMUL_BYTES = 4e8  # of weights to take in turn: more than a cache holds


def ceilings() -> dict[str, float]:
    """Bytes a second of a copy (read and written) and operations a second of a matrix product."""
    a = jax.random.bits(jax.random.key(0), (2**29,), jnp.uint32)
    copy = timed(jax.jit(lambda a: a ^ 1), (a,), 1)
    del a
    n = 8192
    m = jax.random.normal(jax.random.key(1), (n, n), jnp.bfloat16)
    product = timed(jax.jit(lambda m: m @ m), (m,), 1)
    return {"copy_bytes_s": 2 * 4 * 2**29 / copy, "matmul_flops_s": 2 * n**3 / product}


def small_checks(args: argparse.Namespace, names: tuple[str, ...]) -> Iterator[Check]:
    """Every small case of the experts and of products, by every kernel that can do it."""
    pack = jax.jit(functools.partial(packed.pack, kernels=names))
    for name, case in {**moe_cases.SMALL, **moe_cases.SORTED}.items():
        if args.only not in f"moe {name}":
            continue
        stacks = [pack(w) for w in moe_cases.experts(case, args.seed)]
        x, weights, chosen = moe_cases.tokens(case, args.seed)
        for kernel in moe.IMPLEMENTATIONS:
            if kernel.backend in names and not kernel.unsupported(x, chosen, stacks[0]):
                given = (x, weights, chosen, *stacks)
                yield Check("moe", name, kernel, moe_reference.moe, given)
    for case in matmul_cases.AWKWARD:
        if args.only not in f"quantized_matmul {case.name}":
            continue
        w = pack(matmul_cases.weights(case, args.seed))
        for rows in case.rows:
            x = matmul_cases.activations(case, rows, args.seed)
            for kernel in quantized_matmul.IMPLEMENTATIONS:
                if kernel.backend in names and not kernel.unsupported(x, w):
                    label = ("quantized_matmul", f"{case.name} {rows}")
                    yield Check(*label, kernel, matmul_reference.quantized_matmul, (x, w))


def small_cases(args: argparse.Namespace, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Rows of the checks of every small case.

    The references are computed by the CPU, whose compiler is the fastest.
    """
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    with jax.default_device(cpu):
        parts = (small_checks, bench_attention.small_checks, bench_step.small_checks)
        todo = [check for part in parts for check in part(args, names)]

    def prepared(job: Check) -> tuple[Any, Any, Any]:
        def exact(x: Any) -> Any:
            return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x

        with jax.default_device(cpu):
            definition = jax.jit(functools.partial(job.definition, **job.options))
            expected = definition(*jax.tree.map(exact, job.args))
        there = jax.device_put(job.args, device)
        call = functools.partial(job.kernel.call, **job.options)
        return jax.jit(call).lower(*there).compile(), there, expected

    with ThreadPoolExecutor() as pool:
        for job, (program, there, expected) in zip(todo, pool.map(prepared, todo)):
            poison(1)
            form = job.kernel.call.__module__.rpartition(".")[2]  # some backends have two
            labels = {"operation": job.operation, "case": job.case, "backend": job.kernel.backend}
            pairs = zip(*map(jax.tree.leaves, (program(*there), expected)))
            yield {**labels, "form": form, "error": max(error(*pair) for pair in pairs)}


@functools.partial(jax.jit, static_argnums=(1, 2))
def bits(key: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Random bits, made on the device."""
    return jax.random.bits(key, shape, dtype)


def mxfp4_words(
    key: Any, shape: tuple[int, ...], kernels: tuple[str, ...], scale: int = SCALE_BYTES
) -> MXFP4Words:
    """Random weights, packed; `scale` is the less of their two scale bytes."""
    *lead, r, c = shape
    first, second = jax.random.split(key)
    words = bits(first, (*lead, r // 64, c // 128, 64, 32), jnp.uint16)
    which = bits(second, (*lead, r // 64, c // 128, 64), jnp.uint32) & 0x01010101
    scales = which + jnp.uint32(0x01010101 * (scale + 126))
    return MXFP4Words(words, scales, r, c, kernels)


def mxfp4_array(key: Any, shape: tuple[int, ...], scale: int = SCALE_BYTES) -> MXFP4Array:
    """Random weights in the checkpoint's format."""
    *lead, r, c = shape
    first, second = jax.random.split(key)
    scales = scale + (bits(second, (*lead, r, c // 32), jnp.uint8) & 1)
    return MXFP4Array(bits(first, (*lead, r, c // 2), jnp.uint8), scales)


def fp8_words(key: Any, shape: tuple[int, ...], kernels: tuple[str, ...]) -> FP8Words:
    """Random weights without NaN, packed."""
    *lead, r, c = shape
    codes = bits(key, (*lead, -(-r // 64), c // 128, 64, 64), jnp.uint16) & 0xBFBF
    return FP8Words(codes, _fp8_scales(key, shape), r, c, kernels)


def fp8_array(key: Any, shape: tuple[int, ...]) -> FP8Array:
    """Random weights without NaN in the checkpoint's format."""
    codes = jax.lax.bitcast_convert_type(bits(key, shape, jnp.uint8) & 0xBF, jnp.float8_e4m3fn)
    return FP8Array(codes, _fp8_scales(key, shape))


def _fp8_scales(key: Any, shape: tuple[int, ...]) -> jax.Array:
    *lead, r, c = shape
    return jax.random.uniform(key, (*lead, -(-r // 128), c // 128), minval=0.01, maxval=0.02)


def _renamed(weights: Any, kernels: tuple[str, ...]) -> Any:
    """The same packed weights for other backends."""
    return jax.tree.map(
        lambda w: dataclasses.replace(w, kernels=kernels),
        weights,
        is_leaf=lambda w: isinstance(w, MXFP4Words | FP8Words),
    )


def chain(call: Callable[..., tuple], sets: int, calls: int) -> Any:
    """Calls one after the other, each with the next set of weights."""

    def program(x: Any, given: Any, weights: Any) -> tuple[Any, tuple]:
        first = ()
        for i in range(calls):
            y, *rest = call(x, given, weights[i % sets])
            first = first or (y, *rest)
            y = y.reshape(len(x), -1)
            y = jnp.tile(y, (1, -(-x.shape[1] // y.shape[1])))[:, : x.shape[1]]
            x = (x + 1e-3 * y).astype(x.dtype)
        return x, first

    return jax.jit(program)


def layers(call: Callable[..., tuple], sets: int, calls: int) -> Any:
    """Calls that add to a residual stream, each with the next set of weights; the first one's
    result is without it."""

    def program(x: Any, given: Any, weights: Any) -> tuple[Any, tuple]:
        first = call(x, given, weights[0], None)
        x = added(x, first[0])
        for i in range(1, calls):
            x, *_ = call(x, given, weights[i % sets], x)
        return x, first

    return jax.jit(program)


def moe_jobs(args: argparse.Namespace, names: tuple[str, ...]) -> Iterator[list[Job]]:
    """Norm, routing, experts and the addition to the residual stream: those of equal weights
    together."""
    key = jax.random.key(args.seed)
    by_sizes: dict[tuple[int, int, int], dict[str, moe_cases.Case]] = {}
    for name, case in moe_cases.REAL.items():
        if args.only in f"moe {name}":
            sizes = (case.experts, case.width, case.dim)
            by_sizes.setdefault(sizes, {})[name] = case
    for (e, f, d), group in by_sizes.items():
        shapes = [(e, f, d), (e, f, d), (e, d, f)]
        # So little is added to the residual stream that all calls choose the same experts.
        bytes_of = [SCALE_BYTES, SCALE_BYTES, SCALE_BYTES - 8]
        keys = [[jax.random.fold_in(key, 3 * i + j) for j in range(3)] for i in range(args.sets)]
        stacks = [
            [mxfp4_words(k, s, names, b) for k, s, b in zip(ks, shapes, bytes_of)] for ks in keys
        ]
        plain = [[mxfp4_array(k, s, b) for k, s, b in zip(keys[0], shapes, bytes_of)]]
        router = jax.random.normal(key, (e, d)) / math.sqrt(d)
        bias = jax.random.normal(key, (e,)) * 1e-3  # hardly any expert is more wanted
        norm = 1 + 0.1 * jax.random.normal(key, (d,), jnp.bfloat16)
        jobs = []
        for name, case in group.items():
            x, _, chosen = moe_cases.tokens(case, args.seed)
            scores = moe.normed_scores(x, norm, router, eps=EPS)[1]
            ids = np.asarray(moe.route(scores, bias, case.top_k, normalize=True, scale=None)[1])
            read = 3 * d * f * (0.5 + 1 / 32) * len(np.unique(ids)) + 4 * router.size
            flops = 6 * d * f * case.tokens * case.top_k
            calls = n_calls(read, flops)
            call = functools.partial(routed, top_k=case.top_k)
            given = (norm, router, bias)
            check = functools.partial(moe_check, x=x, given=given, layer=stacks[0])
            for backend in names:
                if supported(moe.IMPLEMENTATIONS, backend, (x, chosen, stacks[0][0])):
                    program = layers(call, args.sets, calls)
                    held = (x, given, _renamed(stacks, (backend,)))
                    jobs.append(Job("moe", name, backend, program, held, calls, read, flops, check))
            if case.tokens <= args.reference_tokens:
                program, held = layers(call, 1, 2), (x, given, plain)
                jobs.append(Job("moe", name, "plain XLA", program, held, 2, read, flops))
        yield jobs


def routed(x: Any, given: Any, layer: Any, residual: Any, *, top_k: int) -> tuple[Any, ...]:
    """The second half of a layer: what it gives, weights and experts, the normalised tokens and
    their scores."""
    norm, router, bias = given
    kernels = backends.kernels_of(layer[0])
    y, scores = moe.normed_scores(x, norm, router, eps=EPS, kernels=kernels)
    options = {"top_k": top_k, "normalize": True, "scale": None, "residual": residual}
    return *moe.routed_moe(y, scores, bias, *layer, **options), y, scores


_moe = jax.jit(moe_reference.moe)


def moe_check(
    y: Any, weights: Any, chosen: Any, normed: Any, scores: Any, *, x: Any, given: Any, layer: Any
) -> dict[str, Any]:
    """Experts against the reference for some of the tokens; `routing_check` of all of them."""
    norm, router, bias = given
    some = slice(None, None, -(-len(x) // SAMPLE))  # All would take minutes in float32.
    expected = _moe(normed[some].astype(jnp.float32), weights[some], chosen[some], *layer)
    results = (normed, scores, weights, chosen)
    return {
        "error": error(y[some], expected),
        **routing_check(results, x=x, norm=norm, router=router, bias=bias),
    }


def matmul_jobs(args: argparse.Namespace, names: tuple[str, ...]) -> Iterator[list[Job]]:
    """Products with quantised weights: those of equal weights together."""
    key = jax.random.key(args.seed)
    makers: dict[str, tuple[Any, Any, float]] = {
        "fp8": (fp8_words, fp8_array, 1 + 4 / 128**2),
        "mxfp4": (mxfp4_words, mxfp4_array, 0.5 + 1 / 32),
    }
    for case in matmul_cases.REAL:
        if args.only not in f"quantized_matmul {case.name}":
            continue
        make_packed, make_plain, size = makers[case.format]
        n = math.prod(case.weights)
        sets = min(16, math.ceil(MATMUL_BYTES / (n * size)))
        keys = [jax.random.fold_in(key, i) for i in range(sets)]
        held = [make_packed(k, case.weights, names) for k in keys]
        plain = [make_plain(k, case.weights) for k in keys]
        jobs = []
        for rows in case.rows:
            x = matmul_cases.activations(case, rows, args.seed)
            counts = (n * size + 2 * x.size + 2 * rows * n / case.weights[-1], 2.0 * rows * n)
            calls = n_calls(*counts)
            check = functools.partial(matmul_check, x=x, w=held[0])
            for backend in (*names, "plain XLA"):
                weights, checked = plain, None
                if backend in names:
                    if not supported(quantized_matmul.IMPLEMENTATIONS, backend, (x, held[0])):
                        continue
                    weights, checked = _renamed(held, (backend,)), check
                program = chain(
                    lambda x, _, w: (quantized_matmul.quantized_matmul(x, w),), sets, calls
                )
                label = ("quantized_matmul", f"{case.name} {rows}", backend)
                jobs.append(Job(*label, program, (x, None, weights), calls, *counts, checked))
        yield jobs


_matmul = jax.jit(matmul_reference.quantized_matmul)


def matmul_check(y: Any, *, x: Any, w: Any) -> dict[str, Any]:
    """A product against the reference, for some of the rows."""
    some = slice(None, None, -(-len(x) // SAMPLE))
    return {"error": error(y[some], _matmul(x[some].astype(jnp.float32), w))}


def _right(row: dict[str, Any]) -> bool:
    """Whether a check's errors are within their limits."""
    scores = row.get("scores_error", 0.0) <= SCORES_LIMIT
    return scores and row["error"] <= LIMIT and not row.get("other_experts")


def compiled(job: Job) -> Any:
    """A job's program, or why what others made can't do it."""
    try:
        return job.program.lower(*job.args).compile()
    except Exception as e:
        if job.check is not None:
            raise
        return e


def measure(args: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Checks and times everything; returns what is written as JSON.

    Args:
      args: the options.
      save: is given what there is after each case.
    """
    names = tuple(n for n in backends.resolve("auto", Target.of()) if n != REFERENCE)
    result: dict[str, Any] = {"benchmark": "kernels", **circumstances(args)}
    result["ceilings"] = ceilings()
    result["checks"], result["rows"], result["failed"] = [], [], []
    kinds = (
        *(moe_jobs, matmul_jobs, bench_step.jobs),
        *(bench_attention.decode_jobs, bench_attention.attention_jobs),
    )
    for jobs in itertools.chain.from_iterable(jobs_of(args, names) for jobs_of in kinds):
        with ThreadPoolExecutor() as pool:
            programs = list(pool.map(compiled, jobs))
        for job, program in zip(jobs, programs):
            row = {k: getattr(job, k) for k in ("operation", "case", "backend", "bytes", "flops")}
            if isinstance(program, Exception):
                result["failed"].append({**row, "reason": str(program)[:300]})
                continue
            if job.check is not None:
                poison(4)
                row |= job.check(*program(*job.args)[1])
            row["seconds"] = timed(program, job.args, job.calls)
            result["rows"].append(row)
            save(result)
        del jobs, job, programs, program  # and with them the weights
    for row in small_cases(args, names):
        result["checks"].append(row)
    save(result)
    return result


def show(result: dict[str, Any]) -> None:
    """Prints a result."""
    limits = result["ceilings"]
    table = Table(title=f"{result['device']}, jax {result['versions']['jax']}")
    for column in ("operation", "case", "backend"):
        table.add_column(column)
    for column in ("us", "TB/s", "of copy", "TFLOP/s", "of matmul", "error"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        s = row["seconds"]
        table.add_row(
            *(row["operation"], row["case"], row["backend"]),
            f"{s * 1e6:.1f}",
            f"{row['bytes'] / s / 1e12:.2f}",
            f"{row['bytes'] / s / limits['copy_bytes_s']:.0%}",
            f"{row['flops'] / s / 1e12:.1f}",
            f"{row['flops'] / s / limits['matmul_flops_s']:.0%}",
            f"{row['error']:.1e}" if "error" in row else "",
        )
    console = Console(width=120)
    console.print(table)
    console.print(
        f"copy {limits['copy_bytes_s'] / 1e12:.2f} TB/s, 8192^3 bf16 matmul "
        f"{limits['matmul_flops_s'] / 1e12:.0f} TFLOP/s"
    )
    checked = [row for row in (*result["checks"], *result["rows"]) if "error" in row]
    bad = [row for row in checked if not _right(row)]
    console.print(
        f"{len(checked)} cases compared with the float32 reference; worst error "
        f"{max((row['error'] for row in checked), default=0.0):.1e}, limit {LIMIT:.0e}"
    )
    for row in bad:
        console.print(f"WRONG: {row}")
    for row in result["failed"]:
        console.print(f"not timed: {row['case']} by {row['backend']}: {row['reason']}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench.py kernels`."""
    parser.add_argument("--only", default="", help="cases whose name contains this, as 'moe pro 8'")
    parser.add_argument("--sets", type=int, default=3, help="sets of experts to rotate")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    parser.add_argument(
        "--reference-tokens", type=int, default=64, help="time plain XLA's experts up to this many"
    )
