"""Measures how fast a checkpoint is loaded, beside plain reads of the same files in the same run.

    python scripts/bench_load.py /tmp/checkpoint --gigabytes 20 --cold
    python scripts/bench_load.py /tmp/checkpoint --layers 2 --experts 8       # to try it

Writes a synthetic checkpoint in the release's format: a preset with its first layers, as many as
have the bytes wanted, of random codes, scales and weights.  Then, in turns: all files read by as
many threads as `load` uses, into buffers that they use again; by one thread; and by
`checkpoint.load` onto the device or mesh, while the resident memory of the process is noted every
50 ms.  With --cold the operating system forgets the files before each turn (needs root).  At last
every tensor's checksum is compared between the files and the devices.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import gc
import json
import math
import os
import re
import statistics
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from circumstances import circumstances, write_result
from rich.console import Console
from rich.table import Table

from mimo_jax import checkpoint
from mimo_jax.checkpoint.export import export
from mimo_jax.checkpoint.files import INDEX
from mimo_jax.checkpoint.layout import ignored_modules, release_layout
from mimo_jax.checkpoint.names import (
    SCALE_SUFFIX,
    Wanted,
    backbone_specs,
    dtype_name,
    format_of,
    wanted_tensors,
)
from mimo_jax.checkpoint.safetensors_file import (
    DTYPES,
    Entry,
    StoredTensor,
    open_file,
    write_file,
)
from mimo_jax.checkpoint.streaming import PIECE, scratch, threads
from mimo_jax.cli.console import run_program
from mimo_jax.config import MiMoConfig
from mimo_jax.model.parameters import parameters
from sharding.mesh import make_mesh

SHARD_BYTES = 5_000_000_000
POOL_BYTES = 64 << 20  # random bytes of a kind, of which each tensor takes others
SAMPLE_S = 0.05


def wanted_by_name(config: MiMoConfig) -> dict[str, Wanted]:
    """All tensors of a release with this config, expert by expert as in its files."""
    layout, ignored = release_layout(config), ignored_modules(config)
    wanted: dict[str, Wanted] = {}
    for spec in backbone_specs(config):
        fmt = format_of(spec, layout, ignored)
        wanted |= wanted_tensors(spec, layout, fmt, (dtype_name(config.dtype),))

    def numbers(name: str) -> list[Any]:
        return [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)]

    return {name: wanted[name] for name in sorted(wanted, key=numbers)}


def size(wanted: Wanted) -> int:
    """Bytes of a tensor."""
    return math.prod(wanted.shape) * DTYPES[wanted.dtypes[0]].itemsize


def chosen_config(args: argparse.Namespace) -> MiMoConfig:
    """The preset with as many layers as asked for, or as have the bytes asked for."""
    config = MiMoConfig.from_pretrained(args.preset)
    if args.experts is not None:
        config = dataclasses.replace(config, n_routed_experts=args.experts)
    if args.layers is not None:
        return config.truncated(args.layers)
    for layers in range(1, config.num_hidden_layers + 1):
        cut = config.truncated(layers)
        if sum(map(size, wanted_by_name(cut).values())) >= args.gigabytes * 1e9:
            return cut
    raise SystemExit(f"all of {args.preset} has less than {args.gigabytes} GB; ask for less")


def random_pools() -> dict[str, np.ndarray]:
    """Random values of every kind that is stored."""
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, POOL_BYTES, np.uint8)
    floats = rng.uniform(0.001, 0.05, POOL_BYTES // 4).astype(np.float32)
    return {
        "U8": raw,
        "exponents": (0x76 + (raw & 7)).astype(np.uint8),
        "F8_E4M3": np.where(raw & 0x7F == 0x7F, raw - 1, raw).view(ml_dtypes.float8_e4m3fn),
        "F32": floats,
        "BF16": floats.astype(ml_dtypes.bfloat16),
    }


def write_checkpoint(folder: Path, config: MiMoConfig) -> None:
    """Writes files of up to 5 GB, several at a time, then the index and config.json."""
    pools = random_pools()

    def entry(name: str, wanted: Wanted) -> Entry:
        dtype, count = wanted.dtypes[0], math.prod(wanted.shape)
        exponents = dtype == "U8" and name.endswith(SCALE_SUFFIX["mxfp4"])
        pool = pools["exponents" if exponents else dtype]

        def read() -> np.ndarray:
            begin = zlib.crc32(name.encode()) % len(pool)
            times = -(-(begin + count) // len(pool))
            values = pool if times == 1 else np.tile(pool, times)
            return values[begin : begin + count].reshape(wanted.shape)

        return Entry(name, DTYPES[dtype], wanted.shape, read)

    entries = [entry(*item) for item in wanted_by_name(config).items()]
    shards: list[list[Entry]] = [[]]
    for e in entries:
        if shards[-1] and sum(x.nbytes for x in shards[-1]) + e.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(e)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    with concurrent.futures.ThreadPoolExecutor(threads()) as executor:
        paths = [folder / name for name in names]
        list(executor.map(lambda path, shard: write_file(path, shard, {}), paths, shards))
    weight_map = {e.name: name for name, shard in zip(names, shards, strict=True) for e in shard}
    metadata = {"tp_size": config.qkv_chunks}
    (folder / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


def read_files(folder: Path, workers: int) -> float:
    """Seconds in which threads read all bytes of all files into buffers of their own."""
    files = [os.open(path, os.O_RDONLY) for path in sorted(folder.glob("*.safetensors"))]
    pieces = [(f, at) for f in files for at in range(0, os.fstat(f).st_size, PIECE)]

    def read(piece: tuple[int, int]) -> None:
        file, at = piece
        left = memoryview(scratch((PIECE,), np.dtype(np.uint8)))
        while left and (count := os.preadv(file, [left], at)):
            left, at = left[count:], at + count

    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(workers) as executor:
        list(executor.map(read, pieces))
    seconds = time.perf_counter() - started
    for file in files:
        os.close(file)
    return seconds


def memory() -> dict[str, int]:
    """Resident bytes of this process: all, those that are its own, and those of mapped files."""
    text = Path("/proc/self/status").read_text()
    return {k: 1024 * int(n) for k, n in re.findall(r"(VmRSS|RssAnon|RssFile):\s+(\d+) kB", text)}


def sampled(work: Callable[[], Any]) -> tuple[Any, float, list[tuple[float, int]]]:
    """A function's result, its seconds, and resident bytes every 50 ms of them."""
    curve: list[tuple[float, int]] = []
    started, ended = time.perf_counter(), threading.Event()

    def sample() -> None:
        while True:
            curve.append((round(time.perf_counter() - started, 3), memory()["VmRSS"]))
            if ended.wait(SAMPLE_S):
                return

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        result = work()
        seconds = time.perf_counter() - started
    finally:
        ended.set()
        sampler.join()
    return result, seconds, curve


def load(args: argparse.Namespace) -> checkpoint.Loaded:
    """The model, all of it on the devices."""
    mesh = None if args.mesh is None else make_mesh(args.mesh)
    loaded = checkpoint.load(args.folder, mesh=mesh, rules=args.rules)
    jax.block_until_ready(jax.tree.leaves(loaded.model))
    return loaded


def different(folder: Path, loaded: checkpoint.Loaded) -> list[str]:
    """Names of the tensors that are not the same bytes in the files and on the devices."""
    stored: dict[str, StoredTensor] = {}
    for path in folder.glob("*.safetensors"):
        stored |= open_file(path, path.name)[0].tensors
    values = {p.spec.name: (p.spec, p.get_value()) for _, p in parameters(loaded.model)}
    entries, _ = export(values, loaded.layout)

    def same(entry: Entry) -> bool:
        tensor = stored[entry.name]
        read = np.empty(tensor.shape, DTYPES[tensor.dtype])
        tensor.read_into(0, read)
        held = np.ascontiguousarray(entry.read())
        sums = [zlib.crc32(a.reshape(-1).view(np.uint8).data) for a in (read, held)]
        return sums[0] == sums[1]

    with concurrent.futures.ThreadPoolExecutor(threads()) as executor:
        equal = list(executor.map(same, entries))
    missing = stored.keys() - {e.name for e in entries}
    return sorted(missing) + [e.name for e, ok in zip(entries, equal, strict=True) if not ok]


def forget(cold: bool) -> None:
    """Lets the operating system forget the files it has in memory."""
    if cold:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3\n")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs everything; returns what is written as JSON."""
    result: dict[str, Any] = {"benchmark": "load", **circumstances(args)}
    del result["arguments"]["folder"]
    folder, config = args.folder, chosen_config(args)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    if not (folder / "config.json").exists():
        write_checkpoint(folder, config)
    elif checkpoint.inspect(folder).config != config:
        raise SystemExit(f"{folder} has another checkpoint; give a new folder")
    result["write_s"] = time.perf_counter() - started
    total = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    result |= {"bytes": total, "layers": config.num_hidden_layers, "threads": threads()}

    turns: dict[str, Callable[[], Any]] = {
        "plain_s": functools.partial(read_files, folder, threads()),
        "sequential_s": functools.partial(read_files, folder, 1),
    }
    loads: list[dict[str, Any]] = []
    loaded = None
    for _ in range(args.repeat):
        for name, turn in turns.items():
            forget(args.cold)
            result.setdefault(name, []).append(turn())
        loaded = None
        gc.collect()
        forget(args.cold)
        before = memory()
        loaded, seconds, curve = sampled(functools.partial(load, args))
        loads.append({"seconds": seconds, "rss_before": before, "rss": curve})
    assert loaded is not None
    result["loads"] = loads
    result["load_s"] = [run["seconds"] for run in loads]
    arrays = jax.tree.leaves(loaded.model)
    held = sum(
        {
            s.data.unsafe_buffer_pointer(): s.data.nbytes
            for a in arrays
            for s in a.addressable_shards
        }.values()
    )
    on_host = held if jax.default_backend() == "cpu" else 0
    result["array_bytes"] = held
    result["host_bytes_above_arrays"] = max(
        max(rss for _, rss in run["rss"]) - run["rss_before"]["VmRSS"] - on_host for run in loads
    )
    result["different_tensors"] = different(folder, loaded)
    return result


def show(result: dict[str, Any]) -> None:
    """Prints a result."""
    a, total = result["arguments"], result["bytes"]
    where = f"{result['devices']} x {result['device']}" if a["mesh"] else result["device"]
    title = f"{a['preset']}, {result['layers']} layers, {total / 1e9:.2f} GB, {where}"
    table = Table("", "median s", "GB/s", "of a plain read", title=title)
    plain = statistics.median(result["plain_s"])
    rows = {
        f"plain read, {result['threads']} threads": "plain_s",
        "plain read, 1 thread": "sequential_s",
        f"load, mesh {a['mesh']}": "load_s",
    }
    for what, key in rows.items():
        seconds = statistics.median(result[key])
        table.add_row(
            what, f"{seconds:.2f}", f"{total / seconds / 1e9:.2f}", f"{plain / seconds:.0%}"
        )
    console = Console()
    console.print(table)
    console.print(f"files {'forgotten' if a['cold'] else 'kept'} by the operating system")
    above = result["host_bytes_above_arrays"] / 1e9
    console.print(f"host memory, above what the devices hold: at most {above:.2f} GB")
    wrong = result["different_tensors"]
    console.print(f"different tensors: {', '.join(wrong[:5])}" if wrong else "all tensors equal")


def main() -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the checkpoint, which is kept")
    parser.add_argument("--preset", default="MiMo-V2.5-Pro-FP4-DFlash")
    parser.add_argument("--gigabytes", type=float, default=20, help="at least so many")
    parser.add_argument("--layers", type=int, help="so many layers instead")
    parser.add_argument("--experts", type=int, help="fewer experts a layer, to try it")
    parser.add_argument("--mesh", help="such as expert=2,tensor=2; one device by default")
    parser.add_argument("--rules", default="latency", help="how to split it")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="forget the files before each turn")
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    args = parser.parse_args()
    result = measure(args)
    show(result)
    if args.out is not None:
        write_result(result, args.out)
    if result["different_tensors"]:
        raise SystemExit("tensors differ between files and devices")


if __name__ == "__main__":
    run_program(main)
