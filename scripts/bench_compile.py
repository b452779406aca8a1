"""Times compiling the programs of a whole model on the current device, cold and from the cache.

    python scripts/bench_compile.py MiMo-V2.5-Pro-FP4-DFlash --out pro.json

The model is of shapes, so it need not fit.  Each time is of a process of its own: one finds an
empty compilation cache, the next what the first left there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from circumstances import circumstances, write_result

from mimo_jax.cli.console import run_program
from mimo_jax.config import MiMoConfig
from mimo_jax.decoding.autoregressive import Decoder
from mimo_jax.model.packing import abstract_packed
from pallas_kernels.backends import Target, resolve


def times(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds to lower and to compile in this process."""
    jax.config.update("jax_compilation_cache_dir", args.cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    config = MiMoConfig.from_pretrained(args.model)
    if args.layers:
        config = config.truncated(args.layers)
    started = time.perf_counter()
    model = abstract_packed(config, resolve(args.kernels, Target.of()))
    decoder = Decoder(model, valid_vocabulary=config.vocab_size, eos_ids=())
    programs = decoder.lowered(args.batch, args.prefill, args.max_len)
    result: dict[str, Any] = {
        "layers": config.num_hidden_layers,
        "lower_s": time.perf_counter() - started,
    }
    for name, program in zip(("prompt", "steps"), programs):
        started = time.perf_counter()
        program.compile()
        result[f"compile_{name}_s"] = time.perf_counter() - started
    return result


def measure(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Both processes' times."""
    result: dict[str, Any] = {"benchmark": "compile"}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "cached"):
            command = [sys.executable, __file__, *argv, "--cache", folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(done.returncode)  # it has said why
            result[name] = json.loads(done.stdout)
        result["cache_bytes"] = sum(p.stat().st_size for p in Path(folder).rglob("*"))
    return result | circumstances(args)


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and runs."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="a preset, or a folder with a config.json")
    parser.add_argument("--layers", type=int, help="only so many of its layers")
    parser.add_argument("--kernels", default="auto", help="auto, reference or a backend")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prefill", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--max-len", type=int, default=2048, help="positions of the cache")
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.cache:
        print(json.dumps(times(args)))
        return
    result = measure(args, argv)
    write_result(result, args.out)
    for name in ("cold", "cached"):
        print(name, {k: round(v, 1) for k, v in result[name].items()})


if __name__ == "__main__":
    run_program(main)
