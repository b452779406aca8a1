"""Times whole steps and prompts of a model with random weights, beside transformers.

    python scripts/bench_model.py MiMo-V2.6-Flash-RL --layers 20 10 --torch-python python3

The model is the first layers of a preset in its release's quantised formats, on one device.  At
each batch size it reads prompts and generates greedily, and it reads one long prompt.  Beside it
stand the roofline of `mimo-jax plan` (with the device's bandwidth and FLOP/s as its maker gives
them) and transformers' `MiMoV2FlashForCausalLM`, in a process of its own and before: in bfloat16,
of the same widths, and with fewer layers, as more would not fit.  So times are compared by layer,
in two ways: all of the time divided by the layers, which counts the head among them, and what
a layer adds, from the times of two numbers of layers.
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import re
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tables
from bench_mesh import generate
from circumstances import circumstances, write_result
from transformers_beside import Transformers, native_config

import mimo_jax as mj
from mimo_jax import checkpoint
from mimo_jax.cli.console import run_program
from mimo_jax.config import MiMoConfig
from mimo_jax.decoding.autoregressive import STEPS
from mimo_jax.engine.metrics import CompileClock
from mimo_jax.planning import make_plan
from pallas_kernels.filling import up

DISPATCHES = 6


def prompts(rows: int, length: int) -> list[list[int]]:
    """Random token ids."""
    return np.random.default_rng(0).integers(0, 1000, (rows, length)).tolist()


def of_transformers(args: argparse.Namespace, config: MiMoConfig) -> dict[str, Any]:
    """Milliseconds a step at each batch size, and of a prompt, by `--beside` layers."""

    def of(layers: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            cut = native_config(config.truncated(layers))
            Path(folder, "config.json").write_text(json.dumps(cut))
            process = Transformers(args.torch_python, Path(folder), "cuda", "bfloat16")
            try:

                def run(rows: int, length: int, tokens: int) -> dict[str, float]:
                    ids = prompts(rows, length)
                    process.generate("bfloat16", 0, ids, tokens)  # The second counts, as of ours.
                    return process.generate("bfloat16", 0, ids, tokens)

                steps = {str(n): run(n, args.prompt, 33)["ms_per_token"] for n in args.batch}
                first = run(1, args.prefill, 2)["first_ms"]
                return {**process.info, "layers": layers, "step_ms": steps, "prefill_ms": first}
            finally:
                process.close()

    return _nested([of(layers) for layers in args.beside])


def _nested(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """The first of what was measured with different numbers of layers, the rest under `fewer`."""
    first, *rest = measured
    return {**first, "fewer": rest}


def launches(lm: mj.LanguageModel, ids: list[list[int]], max_len: int) -> list[dict[str, Any]]:
    """What a step launches, as the profiler says: names, calls a step and microseconds a call.

    The prompt's pass is profiled by itself and taken off.
    """

    def profiled(tokens: int) -> collections.Counter[str]:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                generate(lm, ids, tokens, max_len)
            [path] = Path(folder).rglob("*.xplane.pb")
            data = jax.profiler.ProfileData.from_file(str(path))
        spent: collections.Counter[str] = collections.Counter()
        for plane in data.planes:
            for line in plane.lines if plane.name.startswith("/device:GPU") else ():
                for event in line.events:
                    name = re.sub(r"[._]*\d*$", "", re.sub(r"\.\d+", "", event.name))
                    spent[f"{name} ns"] += event.duration_ns
                    spent[f"{name} n"] += 1
        return spent

    n = 2 * STEPS
    spent, of_prompt = profiled(1 + n), profiled(1)
    spent.subtract(of_prompt)
    names = {name.rpartition(" ")[0] for name, count in spent.items() if count > 0}
    rows = [
        {"name": k, "calls": spent[f"{k} n"] / n, "us": spent[f"{k} ns"] / 1e3 / n} for k in names
    ]
    return sorted((r for r in rows if r["calls"] > 0), key=lambda r: -r["us"])


def of_ours(args: argparse.Namespace, layers: int | None, profile: bool) -> dict[str, Any]:
    """Milliseconds of prompts and steps with so many layers, compilation and roofline."""
    lm = mj.load(args.model, random_weights=args.seed, layers=layers, kernels=args.kernels)
    result: dict[str, Any] = {"layers": lm.config.num_hidden_layers, "steps": []}
    cases = [(n, args.prompt, 1 + STEPS * DISPATCHES) for n in args.batch]
    for rows, length, tokens in (*cases, (1, args.prefill, 1)):
        ids, max_len = prompts(rows, length), up(length + tokens, 32)
        with CompileClock() as clock:
            generate(lm, ids, tokens, max_len)
        blocks = [generate(lm, ids, tokens, max_len) for _ in range(3)]
        plan = make_plan(
            lm.config, device=args.device, mesh="", rules="single", batch=rows, context=length
        )
        row = {"rows": rows, "prompt": length, "compile_s": clock.seconds()}
        row["prefill_ms"] = 1e3 * statistics.median(b[0] for b in blocks)
        if plan.prefill.limits is not None and rows == 1:
            row["prefill_roofline_ms"] = 1e3 * plan.prefill.limits.seconds
        if tokens > 1:
            later = [s for b in blocks for s in b[1:]]
            row["step_ms"] = 1e3 * statistics.median(later) / STEPS
            if plan.token.limits is not None:
                row["roofline_ms"] = 1e3 * plan.token.limits.seconds
        if profile and rows == args.profile and tokens > 1:
            row["launches"] = launches(lm, ids, max_len)
        result["steps"].append(row)
    return result


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs everything; returns what is written as JSON."""
    config = MiMoConfig.from_pretrained(checkpoint.bundled().get(args.model) or args.model)
    result: dict[str, Any] = {"benchmark": "model"}
    if args.torch_python:  # before jax takes the device's memory
        result["transformers"] = of_transformers(args, config)
    result |= circumstances(args)
    measured = []
    for layers in args.layers:
        measured.append(of_ours(args, layers, profile=not measured))
        gc.collect()  # A model and what runs it refer to each other; the next needs its memory.
    return result | _nested(measured)


def show(result: dict[str, Any]) -> None:
    """Prints a result."""
    print(f"{result['arguments']['model']}, {result['device']}")
    print(tables.steps(result))
    for row in result["steps"]:
        for launch in row.get("launches", ())[:25]:
            print(f"  {launch['us']:8.1f} us a step, {launch['calls']:6.2f} x  {launch['name']}")


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="a preset, or a folder with a config.json")
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        default=[None],
        help="only so many of its layers; a second number tells what a layer adds",
    )
    parser.add_argument("--kernels", default="auto", help="auto, reference or a backend")
    parser.add_argument("--device", default="h100", help="kind of device, for the roofline")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--prompt", type=int, default=928, help="tokens before the steps")
    parser.add_argument("--prefill", type=int, default=2048, help="tokens of the long prompt")
    parser.add_argument("--profile", type=int, help="profile the steps of this many rows")
    parser.add_argument("--torch-python", help="an interpreter with torch and transformers")
    parser.add_argument(
        "--beside", type=int, nargs="+", default=[5, 3], help="layers that transformers gets"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    result = measure(args)
    write_result(result, args.out)
    show(result)


if __name__ == "__main__":
    run_program(main)
