"""Checks and times the sum of a hidden state over the GPUs of one host.

    python scripts/bench_all_reduce.py --out benchmarks/results/all_reduce_h200x4.json

The kernel beside XLA's all-reduce: on random values against float64, all devices with the same
bits; then in a chain of a hundred sums within a loop, as in a decoding step.  What is between two
sums, a conversion to float32, is also timed by itself and is part of both times.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from circumstances import circumstances, write_result
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mimo_jax.cli.console import run_program
from pallas_kernels import all_reduce as operation
from pallas_kernels.all_reduce import exchange as exchanges

CHAIN, LOOPS, ROUNDS = 100, 8, 12


def on_each(mesh: Mesh, f: Callable[..., Any]) -> Callable[..., Any]:
    """f of every device's part [...] of arrays [devices, ...]."""

    def local(*args: Any) -> Any:
        arrays = [a[0] if isinstance(a, jax.Array) else a for a in args]
        return f(*arrays)[None]

    return jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=P("tensor"), out_specs=P("tensor"), check_vma=False
        )
    )


def chained(add: Callable[..., Any], residual: Any, exchange: Any) -> Any:
    """A hundred sums, each of what the one before has given, several times."""

    def loop(_: Any, x: Any) -> Any:
        for k in range(CHAIN):
            x = add(x.astype(jnp.float32) * (0.25 + k / 1024), x, exchange) * 0.5
        return x

    return lax.fori_loop(0, LOOPS, loop, residual)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs everything; returns what is written as JSON."""
    devices = jax.devices()
    mesh = Mesh(np.array(devices), ("tensor",), axis_types=(AxisType.Auto,))
    reason = exchanges.why_not(mesh, ("tensor",))
    if reason is not None:
        raise SystemExit(f"{reason}: run this on a host with Hopper GPUs")
    values = max(args.tokens) * args.dim
    exchange = operation.tried_exchange(mesh, ("tensor",), values)
    ways: dict[str, Callable[..., Any]] = {
        name: functools.partial(operation.all_reduce, axes=("tensor",), kernels=(name,))
        for name in ("mosaic_gpu", "reference")
    }
    placed = NamedSharding(mesh, P("tensor"))
    rng = np.random.default_rng(args.seed)
    rows = []
    for tokens in args.tokens:
        shape = (len(devices), tokens, args.dim)
        programs = {name: on_each(mesh, way) for name, way in ways.items()}
        errors: dict[str, float] = dict.fromkeys(ways, 0.0)
        for _ in range(args.checks):
            y = rng.standard_normal(shape, np.float32)
            residual = np.broadcast_to(rng.standard_normal(shape[1:], np.float32), shape)
            given = jax.device_put((y, residual.astype(jnp.bfloat16)), placed)
            want = np.asarray(given[1], np.float64)[0] + y.astype(np.float64).sum(0)
            for name, program in programs.items():
                got = np.asarray(program(*given, exchange))
                if not (got == got[:1]).all():
                    raise RuntimeError(f"{name}: devices have different results")
                error = np.linalg.norm(got[0].astype(np.float64) - want) / np.linalg.norm(want)
                errors[name] = max(errors[name], float(error))
        chains = {
            name: on_each(mesh, functools.partial(chained, way)) for name, way in ways.items()
        }
        chains["conversion"] = on_each(
            mesh, functools.partial(chained, lambda y, x, _: (x + y).astype(x.dtype))
        )
        times: dict[str, list[float]] = {name: [] for name in chains}
        for k in range(ROUNDS):
            for name, chain in chains.items():
                started = time.perf_counter()
                jax.block_until_ready(chain(given[1], exchange))
                if k:  # the first time compiles
                    times[name].append((time.perf_counter() - started) / CHAIN / LOOPS)
        row = {
            "tokens": tokens,
            "seconds": {name: statistics.median(of) for name, of in times.items()},
            "errors": errors,
        }
        rows.append(row)
        us = {name: f"{1e6 * s:.1f} us" for name, s in row["seconds"].items()}
        print(f"{tokens:3d} x {args.dim}: {us}, errors {errors}", flush=True)
    return {"benchmark": "all_reduce", **circumstances(args), "rows": rows}


def main() -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--dim", type=int, default=6144)
    parser.add_argument("--checks", type=int, default=20, help="random sums of each size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    args = parser.parse_args()
    result = measure(args)
    if args.out is not None:
        write_result(result, args.out)


if __name__ == "__main__":
    run_program(main)
