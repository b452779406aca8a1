"""Measures a model with random weights on a mesh: memory, time to make it, to compile and to step.

    python scripts/bench_mesh.py MiMo-V2.5-Pro-FP4-DFlash --mesh tensor=4
    python scripts/bench_mesh.py MiMo-V2.6-Flash-RL --layers 20 --prompt 512

The model is one of the presets, cut to its first --layers if it would not fit, in its release's
quantised formats.  It reads a prompt and generates greedily twice; the first time compiles.  The
result has the bytes that the plan said beside those that the devices report.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from circumstances import circumstances, write_result

import mimo_jax as mj
from mimo_jax.cli.console import run_program
from mimo_jax.decoding.autoregressive import STEPS
from mimo_jax.engine.metrics import CompileClock
from mimo_jax.model.cache import init_cache
from mimo_jax.model.parameters import parameters
from mimo_jax.planning import make_plan

GIB = 2**30


def device_memory() -> list[dict[str, int]]:
    """What each local device says of its memory, in bytes; nothing on CPUs."""
    keys = ("bytes_in_use", "peak_bytes_in_use", "bytes_limit")
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return [{k: s[k] for k in keys if k in s} for s in stats]


def largest(memory: list[dict[str, int]], key: str) -> int | None:
    """The largest of the devices' numbers; None where they have none."""
    return max((m[key] for m in memory if key in m), default=None)


def array_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays on the device that has most of them."""
    by_device: dict[Any, int] = {}
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            by_device[shard.device] = by_device.get(shard.device, 0) + shard.data.nbytes
    return max(by_device.values())


def generate(lm: mj.LanguageModel, prompts: list[list[int]], n: int, max_len: int) -> list[float]:
    """Times in seconds at which blocks of tokens were there; the first is the prompt's."""
    params = [mj.SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True)] * len(prompts)
    times = [time.perf_counter()]
    for _ in lm.decoder.blocks(prompts, params, [0] * len(prompts), max_len=max_len):
        times.append(time.perf_counter())
    return [b - a for a, b in itertools.pairwise(times)]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs everything; returns what is written as JSON."""
    result: dict[str, Any] = {"benchmark": "mesh", **circumstances(args)}
    with CompileClock() as clock:
        started = time.perf_counter()
        lm = mj.load(
            args.model,
            random_weights=args.seed,
            layers=args.layers,
            mesh=args.mesh,
            rules=args.rules,
            kernels=args.kernels,
        )
        jax.block_until_ready(jax.tree.leaves(lm.model))
        result["init_s"] = time.perf_counter() - started
        result["init_compile_s"] = clock.seconds()
    result["layers"] = lm.config.num_hidden_layers
    result["rules"] = str(lm.placement.rules) if lm.placement else "one device"
    result["parameters"] = sum(p.spec.size for _, p in parameters(lm.model))
    result["weight_bytes"] = array_bytes([p.get_value() for _, p in parameters(lm.model)])
    result["memory_after_init"] = device_memory()
    plan = make_plan(
        lm.config,
        device=args.device,
        mesh=args.mesh or "",
        rules=args.rules if args.mesh else "single",
        batch=args.batch,
        context=args.max_len,
        prompt=args.prompt,
    )
    result["plan"] = plan.to_dict()
    result["cache_bytes"] = array_bytes(
        init_cache(lm.config, args.batch, args.max_len, placement=lm.placement)
    )

    ids = np.random.default_rng(args.seed).integers(0, 1000, (args.batch, args.prompt)).tolist()
    n = 1 + STEPS * args.dispatches
    with CompileClock() as clock:
        started = time.perf_counter()
        generate(lm, ids, n, args.max_len)
        result["first_run_s"] = time.perf_counter() - started
        result["compile_s"] = clock.seconds()
    blocks = generate(lm, ids, n, args.max_len)
    result["prefill_s"] = blocks[0]
    result["step_ms"] = 1000 * statistics.median(blocks[1:]) / STEPS
    result["steps_ms"] = [1000 * b / STEPS for b in blocks[1:]]
    result["memory_after_run"] = device_memory()
    return result


def show(result: dict[str, Any]) -> None:
    """Prints a result."""
    a = result["arguments"]
    print(f"{a['model']}, {result['layers']} layers, {result['parameters'] / 1e9:.1f} B parameters")
    print(f"{result['devices']} x {result['device']}, mesh {a['mesh']}, {result['rules']}")
    spent = result["plan"]["memory"]
    for what, name in (("weights", "weight_bytes"), ("KV cache", "cache_bytes")):
        planned, real = spent[what] / GIB, result[name] / GIB
        print(f"{what} a device: {real:.3f} GiB, planned {planned:.3f} GiB")
    in_use = largest(result["memory_after_init"], "bytes_in_use")
    if in_use is not None:
        print(f"in use after init, as the device says: {in_use / GIB:.3f} GiB")
        peak = largest(result["memory_after_run"], "peak_bytes_in_use") or 0
        limit = largest(result["memory_after_run"], "bytes_limit") or 0
        print(f"peak: {peak / GIB:.2f} GiB of {limit / GIB:.2f} GiB; planned, with an estimate of")
        print(f"  the workspace, {spent['needed'] / GIB:.2f} GiB")
    print(f"made in {result['init_s']:.1f} s, {result['init_compile_s']:.1f} s of it compiling")
    print(f"first run {result['first_run_s']:.1f} s, {result['compile_s']:.1f} s of it compiling")
    tokens = a["batch"] * a["prompt"]
    print(f"prefill of {tokens} tokens: {result['prefill_s']:.3f} s")
    print(f"decode step of {a['batch']} rows: {result['step_ms']:.2f} ms")


def main() -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="a preset, or a folder with a config.json")
    parser.add_argument("--layers", type=int, help="only so many of its layers")
    parser.add_argument("--mesh", help="such as expert=2,tensor=2; one device by default")
    parser.add_argument("--rules", default="latency", help="how to split it")
    parser.add_argument("--kernels", default="auto", help="auto, reference or a backend")
    parser.add_argument("--device", default="h100", help="kind of device, for the plan")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512, help="tokens a row")
    parser.add_argument("--max-len", type=int, default=1024, help="length of the cache")
    parser.add_argument("--dispatches", type=int, default=4, help=f"of {STEPS} steps each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    args = parser.parse_args()
    result = measure(args)
    show(result)
    if args.out is not None:
        write_result(result, args.out)


if __name__ == "__main__":
    run_program(main)
