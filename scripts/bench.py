"""Measures mimo-jax; results go to benchmarks/results (see benchmarks/README.md).

    python scripts/bench.py decode                          # mimo-tiny, on the current device
    python scripts/bench.py decode --torch-python PYTHON    # beside transformers
    python scripts/bench.py kernels                         # where they run
    python scripts/bench.py show benchmarks/results/decode_cpu.json

`decode` times greedy generation a token, without the prompt, at each dtype and batch size: with
weights as stored (quantised) and with `dequantize=True`.  When torch and transformers can be
imported, here or by the interpreter that --torch-python names, transformers'
`MiMoV2FlashForCausalLM` generates with the same weights after the same prompts in the same run,
with torch's default number of threads and with one.  Everything that is compared takes turns, so
that a disturbance of the machine meets all of it.  In float32 both must produce the same tokens.

`kernels` checks and times the kernels on the sizes of MiMo's models (bench_kernels.py).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bench_kernels
import jax
import numpy as np
from circumstances import circumstances, write_result
from rich.console import Console
from rich.table import Table
from transformers_beside import Transformers, transformers_beside

import mimo_jax as mj
from mimo_jax.cli.console import run_program

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# Between two engines' turns: thread pools spin for a while after their last work.
PAUSE_S = 0.5
# Logits closer than this can be ordered differently by another float32 implementation.
TIE = 1e-3
# The prompts: pieces of a text that every Python has.
PROMPT_TEXT = Path(argparse.__file__)


@dataclasses.dataclass(frozen=True)
class Run:
    """One timed generation.

    Attributes:
      ms_per_token: of a step, which gives each row of the batch a token; the first is not counted.
      first_ms: from the call to the first token: the prompt, and weights expanded for the run.
      cores: processor time over wall time.
      tokens: what was generated, a list a row.
    """

    ms_per_token: float
    first_ms: float
    cores: float
    tokens: list[list[int]]


@dataclasses.dataclass(frozen=True)
class Engine:
    """Something that generates: how it is called in results, and `run(prompts, n)`."""

    name: str
    weights: str
    threads: int
    run: Callable[[list[list[int]], int], Run]


def jax_engine(lm: mj.LanguageModel, weights: str) -> Engine:
    """mimo-jax by its public `generate`, timed by the metrics it reports."""

    def run(prompts: list[list[int]], n: int) -> Run:
        params = mj.SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True)
        wall, cpu = time.perf_counter(), time.process_time()
        outs = lm.generate(prompts, params, batch_size=len(prompts))
        cores = (time.process_time() - cpu) / (time.perf_counter() - wall)
        metrics, tokens = outs[0].metrics, [out.token_ids for out in outs]
        return Run(1000 * metrics.tpot_s, 1000 * metrics.ttft_s, cores, tokens)

    run(some_prompts(lm, 1, 8), 2)  # XLA makes its threads when it is first needed
    return Engine("mimo-jax", weights, xla_threads(), run)


def torch_engine(other: Transformers, dtype: str, threads: int) -> Engine:
    """transformers' `generate` with this many threads."""

    def run(prompts: list[list[int]], n: int) -> Run:
        return Run(**other.generate(dtype, threads, prompts, n))

    return Engine("transformers", "dense", threads, run)


def torch_python(args: argparse.Namespace) -> str | None:
    """The interpreter to run transformers with, if there is one."""
    if args.torch_python is None and all(map(importlib.util.find_spec, ("torch", "transformers"))):
        return sys.executable
    return args.torch_python


def xla_threads() -> int:
    """Threads of XLA's pool on the CPU: those that exist, or (other systems than Linux) cores."""
    tasks = Path("/proc/self/task").glob("*/comm")
    return sum(t.read_text().startswith("tf_XLAEigen") for t in tasks) or os.cpu_count() or 1


def some_prompts(lm: mj.LanguageModel, batch: int, length: int) -> list[list[int]]:
    """`batch` different prompts of `length` tokens."""
    ids = lm.encode(PROMPT_TEXT.read_text(encoding="utf-8"))
    if len(ids) < batch * length:
        raise ValueError(f"the prompt text has {len(ids)} tokens, not {batch} x {length}")
    return [ids[i * length : (i + 1) * length] for i in range(batch)]


def decode(args: argparse.Namespace) -> dict[str, Any]:
    """The decode benchmark; returns what is written as JSON."""
    result = {"benchmark": "decode", **circumstances(args)}
    python = torch_python(args)
    if python is None:
        print("no torch here: mimo-jax alone (--torch-python names an interpreter that has it)")
        beside = contextlib.nullcontext()
    else:
        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        beside = transformers_beside(python, args.model, device)
    runs: list[dict[str, Any]] = []
    with beside as other:
        result["transformers"] = None if other is None else other.info
        for dtype in args.dtype:
            models = {
                "quantised": mj.load(args.model, dtype=dtype),
                "dense": mj.load(args.model, dtype=dtype, dequantize=True),
            }
            engines = [jax_engine(lm, weights) for weights, lm in models.items()]
            if other is not None:
                threads = sorted({other.info["default_threads"], 1}, reverse=True)
                engines += [torch_engine(other, dtype, n) for n in threads]
            for batch in args.batch:
                prompts = some_prompts(models["dense"], batch, args.prompt_tokens)
                taken = take_turns(engines, prompts, args.tokens, args.repeat)
                if dtype == "float32":
                    check_same(models["dense"], prompts, [turns[0].tokens for turns in taken])
                new = [
                    {"dtype": dtype, "batch": batch, **summary(engine, turns, taken[0][0].tokens)}
                    for engine, turns in zip(engines, taken, strict=True)
                ]
                runs += with_speed_ups(new)
    return {**result, "load_average_after": os.getloadavg(), "runs": runs}


def take_turns(
    engines: Sequence[Engine], prompts: list[list[int]], n: int, repeat: int
) -> list[list[Run]]:
    """`repeat` runs of each engine, in turns, after one of each that is not counted."""
    turns: list[list[Run]] = [[] for _ in engines]
    for i in range(repeat + 1):
        for engine, done in zip(engines, turns, strict=True):
            time.sleep(PAUSE_S)
            run = engine.run(prompts, n)
            if any(len(tokens) != n for tokens in run.tokens):
                raise RuntimeError(f"{engine.name} stopped before {n} tokens")
            if i:
                done.append(run)
    return turns


def check_same(
    lm: mj.LanguageModel, prompts: list[list[int]], outputs: Sequence[list[list[int]]]
) -> None:
    """Compares each engine's tokens with the first one's.

    Raises:
      RuntimeError: they differ where logits in float32 are not as good as equal.
    """
    for output in outputs[1:]:
        for prompt, a, b in zip(prompts, outputs[0], output, strict=True):
            at = agreeing(a, b)
            if at == len(a):
                continue
            logits = np.asarray(lm.logits([prompt + a[:at]]))[0, -1]
            if abs(logits[a[at]] - logits[b[at]]) > TIE:
                raise RuntimeError(
                    f"token {at} is {a[at]} of one engine and {b[at]} of another, with logits "
                    f"{logits[a[at]]} and {logits[b[at]]}; engines that compute different things "
                    "cannot be compared"
                )


def agreeing(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens from the start are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def summary(engine: Engine, turns: Sequence[Run], reference: list[list[int]]) -> dict[str, Any]:
    """An engine's entry in the results; `reference` is what the first engine generated."""
    times = [run.ms_per_token for run in turns]
    agreed = [agreeing(a, b) for a, b in zip(reference, turns[0].tokens, strict=True)]
    return {
        "engine": engine.name,
        "weights": engine.weights,
        "threads": engine.threads,
        "cores_busy": round(statistics.median(run.cores for run in turns), 2),
        "ms_per_token": round(statistics.median(times), 4),
        "first_ms": round(statistics.median(run.first_ms for run in turns), 1),
        "ms_per_token_each": [round(t, 4) for t in times],
        "same_tokens": sum(agreed),
        "tokens": len(agreed) * len(reference[0]),
    }


def with_speed_ups(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """mimo-jax's entries get how many times as fast they are as each of transformers'."""
    others = {r["threads"]: r["ms_per_token"] for r in runs if r["engine"] == "transformers"}
    for run in runs:
        if run["engine"] == "mimo-jax":
            run["speed_up_over_threads"] = {
                str(n): round(ms / run["ms_per_token"], 2) for n, ms in others.items()
            }
    return list(runs)


def read_result(file: Path) -> dict[str, Any]:
    """A result that this program wrote.

    Raises:
      OSError: it can't be read.
      ValueError: it is something else.
    """
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); give a file of results") from None
    if not isinstance(result, dict) or result.get("benchmark") not in ("decode", "kernels"):
        raise ValueError(f"{file} has no results of this program's decode or kernels; give one")
    return result


def show(result: dict[str, Any]) -> None:
    """Prints a result as a table."""
    table = Table(title=f"{result['benchmark']}: {result['arguments']['model']}, {result['cpu']}")
    for column in ("dtype", "batch", "engine"):
        table.add_column(column)
    for column in ("ms/token", "best", "first", "tokens/s", "cores", "same", "speed-up"):
        table.add_column(column, justify="right")
    for run in result["runs"]:
        threads = f"{run['threads']} thread{'s' * (run['threads'] > 1)}"
        kind = run["weights"] if run["engine"] == "mimo-jax" else threads
        table.add_row(
            run["dtype"],
            str(run["batch"]),
            f"{run['engine']} {kind}",
            f"{run['ms_per_token']:.2f}",
            f"{min(run['ms_per_token_each']):.2f}",
            f"{run['first_ms']:.0f}",
            f"{1000 * run['batch'] / run['ms_per_token']:.0f}",
            f"{run['cores_busy']:.1f}",
            f"{100 * run['same_tokens'] / run['tokens']:.0f}%",
            " / ".join(f"{x:.3g}" for x in run.get("speed_up_over_threads", {}).values()),
        )
    console = Console(width=120)
    console.print(table)
    console.print(
        "ms/token: median of runs that took turns (tokens/s counts the whole batch); best: their "
        "minimum; first: ms to the first token; cores: processor time over wall time; same: tokens "
        "before the first that differs from the first row's; speed-up: over transformers' rows, "
        "in order."
    )
    sides = {
        "mimo-jax": {"threads": result["runs"][0]["threads"], **result["versions"]},
        "transformers": result["transformers"] or {"not": "run"},
    }
    for side, facts in sides.items():
        console.print(f"{side}: {', '.join(f'{k} {v}' for k, v in facts.items())}.")
    before, after = result["load_average_before"][0], result["load_average_after"][0]
    console.print(f"Load average {before:.1f} before, {after:.1f} after.")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="run", required=True)
    sub = commands.add_parser("decode", help="time a token of generation")
    sub.add_argument("--model", default="mimo-tiny", help="bundled name, folder or hub id")
    sub.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    sub.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    sub.add_argument("--prompt-tokens", type=int, default=64)
    sub.add_argument("--tokens", type=int, default=128, help="tokens to generate")
    sub.add_argument("--repeat", type=int, default=5)
    sub.add_argument("--torch-python", help="a Python that has torch and transformers")
    sub.add_argument("--out", type=Path, help="default: benchmarks/results/decode_<backend>.json")
    sub = commands.add_parser("kernels", help="check and time the kernels")
    bench_kernels.add_arguments(sub)
    sub.add_argument("--out", type=Path, help="default: benchmarks/results/kernels_<device>.json")
    sub = commands.add_parser("show", help="print a result")
    sub.add_argument("file", type=Path)
    args = parser.parse_args()
    if args.run == "show":
        result = read_result(args.file)
    elif args.run == "kernels":
        device = jax.devices()[0].device_kind.lower().replace(" ", "_")
        out = args.out or RESULTS / f"kernels_{device}.json"
        result = bench_kernels.measure(args, lambda result: write_result(result, out))
    else:
        result = decode(args)
        write_result(result, args.out or RESULTS / f"decode_{jax.default_backend()}.json")
    (bench_kernels.show if result["benchmark"] == "kernels" else show)(result)


if __name__ == "__main__":
    run_program(main)
