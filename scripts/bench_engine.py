"""Times continuous batching beside static batches and transformers, on the same requests.

    python scripts/bench_engine.py MiMo-V2.6-Flash-RL --layers 5 --torch-python python3 --out e.json

The model has random weights.  Requests are of mixed lengths, all there at the start.  Static
batches take them in their order, as many at a time, and last as long as their longest request, with
or without steps of the rows that are done before; transformers' `generate` does the same with the
first of them, in a process of its own and before, with the same widths and layers in bfloat16.  Of
the engine's run it is told what the device did while requests waited: each kind of dispatch is
timed by itself, many in a row, and what is left of the time is the host's.

In the end some of the requests run again, in another order and with other neighbours: what they
produce has to be the same, also in bfloat16.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tables
from circumstances import circumstances, write_result
from transformers_beside import Transformers, native_config

import mimo_jax as mj
from mimo_jax import checkpoint
from mimo_jax.cli.console import run_program
from mimo_jax.config import MiMoConfig
from mimo_jax.decoding.sampling import SamplingParams
from mimo_jax.decoding.slots import Piece, Slots
from mimo_jax.engine.loop import Engine, Work
from mimo_jax.engine.workload import Lengths, Workload

# Calls in a row that are timed together.
TIMES = 8


def batches(works: Sequence[Work], size: int) -> list[Sequence[Work]]:
    """The requests in order, so many at a time."""
    return [works[i : i + size] for i in range(0, len(works), size)]


def of_transformers(
    args: argparse.Namespace, config: MiMoConfig, works: Sequence[Work]
) -> dict[str, Any]:
    """Seconds of the first static batches by `MiMoV2FlashForCausalLM.generate`."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(native_config(config)))
        process = Transformers(args.torch_python, Path(folder), "cuda", "bfloat16")
        try:

            def seconds(batch: Sequence[Work], tokens: int) -> float:
                prompts = [work.tokens for work in batch]
                return process.generate("bfloat16", 0, prompts, tokens)["seconds"]

            size, cut = args.batch[0], batches(works, args.batch[0])[: args.torch_batches]
            seconds(cut[0], 4)
            spent = [seconds(batch, max(w.params.max_tokens for w in batch)) for batch in cut]
            tokens = sum(work.params.max_tokens for batch in cut for work in batch)
            return {
                **process.info,
                "batch": size,
                "batches": len(cut),
                "seconds": sum(spent),
                "output_tokens": tokens,
            }
        finally:
            process.close()


def static(
    lm: mj.LanguageModel, works: Sequence[Work], size: int, max_len: int, whole: bool
) -> float:
    """Seconds of static batches; if `whole`, all rows go on until the longest one of a batch ends,
    for which a mixture of experts takes longer."""

    def run(batch: Sequence[Work], most: int) -> None:
        prompts, each = [w.tokens for w in batch], [w.params.max_tokens for w in batch]
        each = [min(most, max(each) if whole else n) for n in each]
        params = [dataclasses.replace(batch[0].params, max_tokens=n) for n in each]
        for _ in lm.decoder.blocks(prompts, params, [0] * len(batch), max_len=max_len):
            pass

    for batch in batches(works, size):  # compiles what there is to compile
        run(batch, 2)
    started = time.perf_counter()
    for batch in batches(works, size):
        run(batch, max_len)
    return time.perf_counter() - started


class Log:
    """What an engine sends to its device, in order: names of programs."""

    def __init__(self, engine: Engine):
        self.sent: list[str] = []
        device = engine._device
        device.read = self._logging(device.read, lambda pieces, length: f"read {length}")
        device.insert = self._logging(device.insert, lambda *of: "insert")
        device.decode = self._logging(device.decode, lambda: "decode")

    def _logging(self, call: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def logged(*arguments: Any) -> Any:
            self.sent.append(name(*arguments))
            return call(*arguments)

        return logged


def continuous(engine: Engine, works: Sequence[Work]) -> dict[str, Any]:
    """Seconds of an engine that has run before, and of its steady state: from the first tokens
    until no request waits any more."""
    log, tokens = Log(engine), {}
    started = time.perf_counter()
    begin = end = None
    for ended in engine.run(works):
        tokens |= {key: output.token_ids for key, output in ended}
        now = (time.perf_counter(), len(log.sent))
        begin = begin or now
        if engine.stats.waiting:
            end = now
    seconds = time.perf_counter() - started
    result: dict[str, Any] = {"seconds": seconds, "tokens": tokens}
    if begin and end and end > begin:
        result["steady_s"] = end[0] - begin[0]
        sent = log.sent[begin[1] : end[1]]
        result["steady"] = {name: sent.count(name) for name in sorted(set(sent))}
    return result


def alone(engine: Engine, lengths: Sequence[int], max_len: int) -> dict[str, float]:
    """Seconds of each kind of dispatch by itself, with all slots full."""
    device: Slots = engine._device
    params = SamplingParams(temperature=0.0, max_tokens=max_len, ignore_eos=True)
    rng = np.random.default_rng(0)

    def prompt(length: int, lane: int) -> Piece:
        ids = rng.integers(1000, size=length + 1).tolist()
        return Piece(lane, 0, ids[:-1], ids[-1])

    def read(length: int) -> Callable[[], object]:
        pieces = [prompt(length, lane) for lane in range(device.lanes)]
        return lambda: device.read(pieces, length)

    def insert(slot: int = 0) -> None:
        device.insert(slot, slot % device.lanes, (7 + slot, 128), params, 0, max_len - 129)

    def seconds(call: Callable[[], object]) -> float:
        spent = 0.0
        for _ in range(2):  # the second time counts
            jax.block_until_ready((device._lanes, device._state))
            started = time.perf_counter()
            for _ in range(TIMES):
                call()
            jax.block_until_ready((device._lanes, device._state))
            spent = (time.perf_counter() - started) / TIMES
        return spent

    found = {f"read {length}": seconds(read(length)) for length in lengths}
    found["insert"] = seconds(insert)
    for slot in range(device.slots):
        insert(slot)
    found["decode"] = seconds(device.decode)
    device.end(range(device.slots))
    return found


def of_engine(
    lm: mj.LanguageModel, works: Sequence[Work], size: int, max_len: int
) -> dict[str, Any]:
    """What an engine of so many rows does with the requests."""
    engine = lm.engine(batch_size=size, max_len=max_len)
    for _ in engine.run(works):  # compiles what there is to compile
        pass
    result = continuous(engine, works)
    again = continuous(engine, [works[i] for i in range(len(works) - 1, 0, -3)])["tokens"]
    result["repeated"] = len(again)
    result["repeated_same"] = sum(result["tokens"][key] == ids for key, ids in again.items())
    del result["tokens"]
    if steady := result.get("steady"):
        reads = [int(name.split()[1]) for name in steady if name.startswith("read")]
        result["alone_s"] = by_itself = alone(engine, reads, max_len)
        shares = {n: steady[n] * by_itself[n] / result["steady_s"] for n in steady}
        result["shares"] = shares | {"host": 1 - sum(shares.values())}
    return result


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs everything; writes the result as it grows, and returns it."""
    config = MiMoConfig.from_pretrained(checkpoint.bundled().get(args.model) or args.model)
    config = config.truncated(args.layers) if args.layers else config
    workload = Workload(
        Lengths.parse(args.prompt_len), Lengths.parse(args.output_len), args.requests
    )
    works = [work for _, work in workload.works(1000)]
    result: dict[str, Any] = {"benchmark": "engine", "workload": workload.to_dict()}
    if args.torch_python:  # before jax takes the device's memory
        result["transformers"] = of_transformers(args, config, works)
    result |= circumstances(args)
    result["output_tokens"] = sum(work.params.max_tokens for work in works)
    result["prompt_tokens"] = sum(len(work.tokens) for work in works)
    lm = mj.load(args.model, random_weights=0, layers=args.layers, kernels=args.kernels)
    max_len = lm.cache_length(workload.longest)
    result |= {"layers": lm.config.num_hidden_layers, "max_len": max_len, "rows": []}
    for size in args.batch:
        row: dict[str, Any] = {"batch": size, **of_engine(lm, works, size, max_len)}
        row["static_s"] = static(lm, works, size, max_len, whole=False)
        row["static_whole_s"] = static(lm, works, size, max_len, whole=True)
        result["rows"].append(row)
        write_result(result, args.out)
        print(json.dumps(row), flush=True)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="a preset, or a folder with a config.json")
    parser.add_argument("--layers", type=int, help="only so many of its layers")
    parser.add_argument("--kernels", default="auto", help="auto, reference or a backend")
    parser.add_argument("--batch", type=int, nargs="+", default=[16])
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--prompt-len", default="lognormal:128,0.8,1024")
    parser.add_argument("--output-len", default="lognormal:100,1.2,2048")
    parser.add_argument("--torch-python", help="an interpreter with torch and transformers")
    parser.add_argument("--torch-batches", type=int, default=2, help="static batches it gets")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    result = measure(args)
    print(f"{args.model}, {result['layers']} layers, {result['device']}")
    print(tables.engine(result))


if __name__ == "__main__":
    run_program(main)
