"""Compares a mesh of real devices with one of them, and the ragged token exchange with the padded.

    python scripts/bench_exchange.py --mesh expert=2 --out exchange.json

First the logits of a few layers with random weights are computed on one device and under every set
of rules on the mesh, in float32.  Then `collectives.dispatch` and `combine` are timed over all of
the devices, with every token going everywhere and with every token going to one device.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from circumstances import circumstances, write_result
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

import mimo_jax as mj
from mimo_jax.cli.console import run_program
from sharding import collectives
from sharding.mesh import make_mesh, use
from sharding.rules import PRESETS

DIM = 6144  # of Pro
CHAIN = 20  # exchanges a measurement


def compare(args: argparse.Namespace) -> dict[str, float]:
    """By rules, the relative error (norm) of the mesh's logits against one device's."""
    ids = np.random.default_rng(args.seed).integers(0, 1000, (4, 64))

    def logits(**where: Any) -> np.ndarray:
        lm = mj.load(
            args.model, random_weights=args.seed, layers=args.layers, dtype="float32", **where
        )
        return np.asarray(lm.logits(ids), np.float64)

    want = logits()
    return {
        rules: float(np.linalg.norm(logits(mesh=args.mesh, rules=rules) - want))
        / float(np.linalg.norm(want))
        for rules in PRESETS
        if rules != "single"
    }


def exchange(
    x: Float[Array, "P D"], wanted: Bool[Array, "P n"], *, ragged: bool
) -> Float[Array, "P D"]:
    """A chain of exchanges, each of which brings x back as it was."""
    visits = wanted.sum(axis=1, keepdims=True).astype(x.dtype)

    def once(_: Any, x: Array) -> Array:
        (rows,), _, route = collectives.dispatch((x,), wanted, "expert", ragged=ragged)
        return collectives.combine(rows, route) / visits

    return jax.lax.fori_loop(0, CHAIN, once, x)


def time_exchange(tokens: int, n: int, everywhere: bool, seed: int) -> dict[str, Any]:
    """Seconds of a dispatch with its combine, ragged and padded, on `tokens` tokens a device."""
    mesh = make_mesh(f"expert={n}")
    rng = np.random.default_rng(seed)
    x = rng.integers(-8, 8, (n * tokens, DIM)).astype(jnp.bfloat16)
    wanted = np.ones((n * tokens, n), bool)
    if not everywhere:
        wanted = np.arange(n) == rng.integers(0, n, (n * tokens, 1))
    result: dict[str, Any] = {"tokens": tokens, "everywhere": everywhere}
    platform = jax.devices()[0].platform
    with use(mesh):
        placed = [jax.device_put(a, jax.NamedSharding(mesh, P("expert"))) for a in (x, wanted)]
        for name, ragged in (("padded_s", False), ("ragged_s", True)):
            if ragged and not collectives.supports_ragged(platform):
                continue
            call = jax.jit(
                jax.shard_map(
                    partial(exchange, ragged=ragged),
                    in_specs=P("expert"),
                    out_specs=P("expert"),
                    check_vma=False,
                )
            )
            got = np.asarray(call(*placed))
            if not np.array_equal(got.astype(np.float32), x.astype(np.float32)):
                raise AssertionError(f"{name}: tokens came back changed")
            times = []
            for _ in range(7):
                started = time.perf_counter()
                call(*placed).block_until_ready()
                times.append((time.perf_counter() - started) / CHAIN)
            result[name] = statistics.median(times)
    return result


def main() -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="MiMo-V2.6-Flash-RL", help="a preset")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--mesh", default=f"expert={jax.device_count()}")
    parser.add_argument("--tokens", type=int, nargs="*", default=[8, 64, 512, 4096])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    args = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "exchange", **circumstances(args)}
    result["logits_relative_error"] = compare(args)
    for rules, error in result["logits_relative_error"].items():
        print(f"{args.layers} layers on {args.mesh}, {rules}: relative error {error:.1e}")
    result["exchange"] = [
        time_exchange(tokens, jax.device_count(), everywhere, args.seed)
        for tokens in args.tokens
        for everywhere in (True, False)
    ]
    for row in result["exchange"]:
        where = "every device" if row["everywhere"] else "one device"
        times = "  ".join(f"{k[:-2]} {row[k] * 1e6:.0f} us" for k in row if k.endswith("_s"))
        print(f"{row['tokens']} tokens of {DIM} to {where}: {times}")
    if args.out is not None:
        write_result(result, args.out)


if __name__ == "__main__":
    run_program(main)
