"""Checks and times the kernels on the sizes of MiMo's models: `python scripts/bench.py kernels`.

Every case is first compared with the float32 reference, on fresh random inputs and with memory full
of NaN where results will be.  Then each backend is timed: calls in one program, over several sets
of weights so that no cache holds them, everything compiled before anything is timed.  Beside them
stand plain XLA on the checkpoint's own format and what the device gives to a copy and to a matrix
product.  Bytes count each weight that is needed once; operations count no padding.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from circumstances import circumstances
from rich.console import Console
from rich.table import Table

from pallas_kernels import backends, moe, quantized_matmul
from pallas_kernels.backends import REFERENCE, Target
from pallas_kernels.formats import FP8Array, MXFP4Array
from pallas_kernels.moe import cases as moe_cases
from pallas_kernels.moe import reference as moe_reference
from pallas_kernels.quantized_matmul import cases as matmul_cases
from pallas_kernels.quantized_matmul import reference as matmul_reference
from pallas_kernels.words import FP8Words, MXFP4Words

CALLS = 6  # in one program
LIMIT = 5e-3  # of the relative error (norm) of bfloat16 results
SAMPLE = 16  # tokens whose experts' results are compared
SCALE_BYTES = 119  # and 120, as in the releases


@dataclasses.dataclass
class Job:
    """Something to time.

    Attributes:
      operation, case, backend: for the table.
      program: CALLS calls, jitted.
      args: of it.
      bytes, flops: of one call.
      check: a jitted call and its arguments, and those that give the float32 result of its tokens
        0, n, 2 n, ...; None if it is the reference itself.
    """

    operation: str
    case: str
    backend: str
    program: Any
    args: tuple
    bytes: float
    flops: float
    check: tuple[Any, tuple, Any, tuple] | None = None


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


def ceilings() -> dict[str, float]:
    """Bytes a second of a copy (read and written) and operations a second of a matrix product."""
    a = jax.random.bits(jax.random.key(0), (2**29,), jnp.uint32)
    copy = timed(jax.jit(lambda a: a ^ 1), (a,), 1)
    del a
    n = 8192
    m = jax.random.normal(jax.random.key(1), (n, n), jnp.bfloat16)
    product = timed(jax.jit(lambda m: m @ m), (m,), 1)
    return {"copy_bytes_s": 2 * 4 * 2**29 / copy, "matmul_flops_s": 2 * n**3 / product}


def poison() -> None:
    """Fills free memory with NaN, so that results which aren't written show."""
    jax.block_until_ready([jnp.full(2**28, jnp.nan, jnp.float32) for _ in range(4)])


@functools.partial(jax.jit, static_argnums=(1, 2))
def bits(key: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Random bits, made on the device."""
    return jax.random.bits(key, shape, dtype)


def mxfp4_words(key: Any, e: int, r: int, c: int, kernels: tuple[str, ...]) -> MXFP4Words:
    """A random stack, packed."""
    first, second = jax.random.split(key)
    words = bits(first, (e, r // 64, c // 128, 64, 32), jnp.uint16)
    which = bits(second, (e, r // 64, c // 128, 64), jnp.uint32) & 0x01010101
    scales = which + jnp.uint32(0x01010101 * (SCALE_BYTES + 126))
    return MXFP4Words(words, scales, r, c, kernels)


def mxfp4_array(key: Any, e: int, r: int, c: int) -> MXFP4Array:
    """A random stack in the checkpoint's format."""
    first, second = jax.random.split(key)
    scales = SCALE_BYTES + (bits(second, (e, r, c // 32), jnp.uint8) & 1)
    return MXFP4Array(bits(first, (e, r, c // 2), jnp.uint8), scales)


def error(got: jax.Array, expected: jax.Array) -> float:
    """Relative error, by norm."""
    got = got[:: -(-len(got) // len(expected))]
    difference = jnp.linalg.norm(got.astype(jnp.float32) - expected)
    return float(difference / jnp.linalg.norm(expected))


def chain(call: Callable[..., Any], sets: int) -> Any:
    """CALLS calls one after the other, each with the next set of weights."""

    def program(x: Any, given: Any, weights: Any) -> Any:
        for i in range(CALLS):
            y = call(x, given, weights[i % sets])
            x = (x + 1e-3 * y.reshape(len(x), -1)[:, : x.shape[1]]).astype(x.dtype)
        return x

    return jax.jit(program)


def _renamed(weights: Any, kernels: tuple[str, ...]) -> Any:
    """The same packed weights for other backends."""
    return jax.tree.map(
        lambda w: dataclasses.replace(w, kernels=kernels),
        weights,
        is_leaf=lambda w: isinstance(w, MXFP4Words | FP8Words),
    )


def supported(implementations: Any, name: str, case: tuple) -> bool:
    """Whether a backend has something for a case."""
    return backends.choose(implementations, (name,), *case)[0] is not None


def moe_jobs(args: argparse.Namespace, names: tuple[str, ...]) -> Iterator[Job]:
    """The mixture of experts, routing included."""
    key = jax.random.key(args.seed)
    wanted = {n: c for n, c in moe_cases.REAL.items() if args.only in f"moe {n}"}
    by_sizes: dict[tuple[int, int, int], dict[str, moe_cases.Case]] = {}
    for name, case in wanted.items():
        by_sizes.setdefault((case.experts, case.width, case.dim), {})[name] = case
    for (e, f, d), group in by_sizes.items():
        shapes = [(f, d), (f, d), (d, f)]

        def layer(i: int, make: Any, *rest: Any, shapes: Any = shapes, e: int = e) -> list:
            keys = [jax.random.fold_in(key, 3 * i + j) for j in range(3)]
            return [make(k, e, r, c, *rest) for k, (r, c) in zip(keys, shapes)]

        packed = [layer(i, mxfp4_words, ("triton",)) for i in range(args.sets)]
        plain = [layer(0, mxfp4_array)]
        router = jax.random.normal(key, (e, d)) / math.sqrt(d)
        bias = jax.random.normal(key, (e,)) * 0.01
        for name, case in group.items():
            x, weights, chosen = moe_cases.tokens(case, args.seed)
            pair = (x, chosen, packed[0][0])
            ids = np.asarray(moe_route(x, router, bias, case.top_k, (REFERENCE,))[1])
            read = 3 * d * f * (0.5 + 1 / 32) * len(np.unique(ids)) + 4 * router.size
            flops = 6 * d * f * case.tokens * case.top_k
            definition, call = (
                jax.jit(moe_reference.moe),
                functools.partial(routed, top_k=case.top_k),
            )
            sample = [a[:: _stride(case.tokens)] for a in (x, weights, chosen)]
            sample[0] = sample[0].astype(jnp.float32)
            for backend in names:
                if not supported(moe.IMPLEMENTATIONS, backend, pair):
                    continue
                held = _renamed(packed, (backend,))
                yield Job(
                    *("moe", name, backend),
                    chain(call, args.sets),
                    (x, (router, bias), held),
                    *(read, flops),
                    (
                        *(jax.jit(moe.moe), (x, weights, chosen, *held[0])),
                        *(definition, (*sample, *packed[0])),
                    ),
                )
            if case.tokens <= args.reference_tokens:
                given = (x, (router, bias), plain)
                yield Job("moe", name, "plain XLA", chain(call, 1), given, read, flops)
        del packed, plain


def _stride(rows: int) -> int:
    """For about SAMPLE tokens: all of them take minutes in float32."""
    return -(-rows // SAMPLE)


def moe_route(x: Any, router: Any, bias: Any, top_k: int, kernels: tuple[str, ...]) -> Any:
    """Scores and choice of experts."""
    scores = moe.scores(x, router, kernels=kernels)
    return moe.route(scores, bias, top_k, normalize=True, scale=None, kernels=kernels)


def routed(x: Any, given: Any, layer: Any, *, top_k: int) -> Any:
    """A whole layer's feed-forward."""
    router, bias = given
    chosen = moe_route(x, router, bias, top_k, backends.kernels_of(layer[0]))
    return moe.moe(x, *chosen, *layer)


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


def matmul_jobs(args: argparse.Namespace, names: tuple[str, ...]) -> Iterator[Job]:
    """Products with quantised weights."""
    key = jax.random.key(args.seed)
    for case in matmul_cases.REAL:
        if args.only not in f"quantized_matmul {case.name}" or case.format != "fp8":
            continue
        # More than the 50 MB of an H100's second-level cache.
        sets = min(16, max(2, math.ceil(4e8 / math.prod(case.weights))))
        keys = [jax.random.fold_in(key, i) for i in range(sets)]
        packed = [fp8_words(k, case.weights, ("triton",)) for k in keys]
        plain = [fp8_array(k, case.weights) for k in keys]
        size = math.prod(case.weights)
        for rows in case.rows:
            x = jax.random.normal(jax.random.fold_in(key, rows), (rows, case.weights[-1]))
            x = x.astype(jnp.bfloat16)
            read = size * (1 + 4 / 128**2) + 2 * x.size + 2 * rows * size / case.weights[-1]
            name = f"{case.name} {rows}"
            call = chain(lambda x, _, w: quantized_matmul.quantized_matmul(x, w), sets)
            definition = jax.jit(matmul_reference.quantized_matmul)
            for backend in names:
                if not supported(quantized_matmul.IMPLEMENTATIONS, backend, (x, packed[0])):
                    continue
                held = _renamed(packed, (backend,))
                product = jax.jit(quantized_matmul.quantized_matmul)
                yield Job(
                    *("quantized_matmul", name, backend),
                    call,
                    (x, None, held),
                    *(read, 2.0 * rows * size),
                    (product, (x, held[0]), definition, (x.astype(jnp.float32), packed[0])),
                )
            yield Job(
                *("quantized_matmul", name, "plain XLA"),
                call,
                (x, None, plain),
                *(read, 2.0 * rows * size),
            )


def measure(args: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Compiles, then checks and times everything; returns what is written as JSON.

    Args:
      save: is given what there is after each case.
    """
    names = tuple(n for n in backends.resolve("auto", Target.of()) if n != REFERENCE)
    result: dict[str, Any] = {"benchmark": "kernels", **circumstances(args)}
    result["ceilings"] = ceilings()
    rows: list[dict[str, Any]] = []
    result["rows"] = rows
    for jobs in (moe_jobs(args, names), matmul_jobs(args, names)):
        prepared = list(jobs)
        with ThreadPoolExecutor() as pool:
            compiled = list(pool.map(_compiled, prepared))
        for job, (program, check) in zip(prepared, compiled):
            row = {k: getattr(job, k) for k in ("operation", "case", "backend", "bytes", "flops")}
            if job.check is not None:
                expected = check[1](*job.check[3])
                poison()
                row["error"] = error(check[0](*job.check[1]), expected)
            row["seconds"] = timed(program, job.args, CALLS)
            rows.append(row)
            save(result)
        del prepared, compiled
    return result


def _compiled(job: Job) -> tuple[Any, tuple]:
    def compiled(program: Any, args: tuple) -> Any:
        return program.lower(*args).compile()

    check = job.check or ()
    pairs = zip(check[0::2], check[1::2])
    return compiled(job.program, job.args), tuple(compiled(*pair) for pair in pairs)


def show(result: dict[str, Any]) -> None:
    """Prints a result."""
    limits = result["ceilings"]
    table = Table(title=f"{result['device']}, jax {result['versions']['jax']}")
    for column in ("operation", "case", "backend"):
        table.add_column(column)
    for column in ("us", "TB/s", "of copy", "TFLOP/s", "of matmul", "error"):
        table.add_column(column, justify="right")
    for row in sorted(result["rows"], key=lambda r: (r["operation"], r["case"])):
        s, wrong = row["seconds"], row.get("error", 0.0) > LIMIT
        table.add_row(
            *(row["operation"], row["case"], row["backend"]),
            f"{s * 1e6:.1f}",
            f"{row['bytes'] / s / 1e12:.2f}",
            f"{row['bytes'] / s / limits['copy_bytes_s']:.0%}",
            f"{row['flops'] / s / 1e12:.1f}",
            f"{row['flops'] / s / limits['matmul_flops_s']:.0%}",
            f"{row['error']:.1e}{' WRONG' if wrong else ''}" if "error" in row else "",
        )
    console = Console(width=120)
    console.print(table)
    console.print(
        f"copy {limits['copy_bytes_s'] / 1e12:.2f} TB/s, 8192^3 bf16 matmul "
        f"{limits['matmul_flops_s'] / 1e12:.0f} TFLOP/s"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench.py kernels`."""
    parser.add_argument("--only", default="", help="cases whose name contains this, as 'moe pro 8'")
    parser.add_argument("--sets", type=int, default=3, help="sets of experts to rotate")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    parser.add_argument(
        "--reference-tokens", type=int, default=64, help="time plain XLA's experts up to this many"
    )
