"""One file of results from those of several runs, each of which did a shard of the input."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

from mimo_jax.engine.durable import replacing
from mimo_jax.engine.manifest import differences, read_manifest, write_manifest
from mimo_jax.engine.requests import Shard
from mimo_jax.engine.results import ResultsError, advice, read_raw

_LISTED = 5


def merge(parts: Sequence[Path], out: Path) -> int:
    """Merges files of results into one, in the order of the input's lines.

    Where the parts have manifests these must agree, cover all shards, and say how many results
    there are to be; the merged file gets one, too.  Without manifests lines must be numbered
    from 1 without a gap.  Only where each record is, is held in memory.

    Args:
      parts: files of results, complete ones.
      out: the file to write; it must not be there.

    Returns:
      How many results there are.

    Raises:
      ResultsError: a part is unfinished or no file of results, a line has no result or two, the
        manifests don't fit together, or something can't be read or written.  Nothing is left in
        the place of `out` then.
    """
    if not parts:
        raise ResultsError("there is nothing to merge; give the files of results")
    missing = [part for part in parts if not part.is_file()]
    if missing:
        raise ResultsError(f"{missing[0]} is no file; give the files of results of all shards")
    if out.exists():
        raise ResultsError(f"{out} is there already; give another name, or move it away")
    manifest = _merged_manifest(parts)
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(part, "rb")) for part in parts]
            index = _index(parts, files)
            _check_lines(parts, index, None if manifest is None else manifest["input"]["lines"])
            out.parent.mkdir(parents=True, exist_ok=True)
            with replacing(out) as merged:
                for part, offset, size in zip(*index[1:], strict=True):
                    files[part].seek(offset)
                    merged.write(files[part].read(size))
    except OSError as error:
        raise ResultsError(f"merging into {out} failed: {error}; {advice(error)}") from error
    if manifest is not None:
        write_manifest(out, manifest)
    return len(index[0])


def _index(parts: Sequence[Path], files: Sequence[BinaryIO]) -> np.ndarray:
    """Line, part, offset and size of every record, int64 [4, n], sorted by line."""
    columns = [array("q") for _ in range(4)]
    for i, (part, file) in enumerate(zip(parts, files, strict=True)):
        for offset, raw, record in read_raw(file, part):
            for column, value in zip(columns, (record["line"], i, offset, len(raw)), strict=True):
                column.append(value)
    index = np.array([np.frombuffer(column, np.int64) for column in columns])
    return index[:, np.argsort(index[0], kind="stable")]


def _check_lines(parts: Sequence[Path], index: np.ndarray, expected: int | None) -> None:
    lines = index[0]
    twice = np.flatnonzero(lines[1:] == lines[:-1])
    if twice.size:
        first, second = (parts[i] for i in index[1, twice[0] : twice[0] + 2])
        where = f"twice in {first}" if first == second else f"in {first} and in {second}"
        raise ResultsError(
            f"line {lines[twice[0]]} has a result {where} ({twice.size} such lines); give each "
            "part once"
        )
    gaps = _gaps(lines)
    found = f"{lines.size} results"
    if expected is None and gaps:
        _missing(f"{found}, but the last is of line {lines[-1]}", gaps)
    if expected is not None and expected != lines.size:
        last = f"those after {lines[-1:].max(initial=0)}"
        _missing(f"{found}, but the input has {expected} lines", gaps or [last])


def _gaps(lines: np.ndarray) -> list[str]:
    """The first ranges of line numbers that have no results, as text."""
    before = np.concatenate([[0], lines[:-1]])
    at = np.flatnonzero(lines - before > 1)[:_LISTED]
    ranges = [(int(before[i]) + 1, int(lines[i]) - 1) for i in at]
    return [str(a) if a == b else f"{a}-{b}" for a, b in ranges]


def _missing(found: str, gaps: list[str]) -> NoReturn:
    raise ResultsError(
        f"there are {found}; without one are (or empty were) lines {', '.join(gaps)}: run the "
        "parts to their ends, and give all of them"
    )


def _merged_manifest(parts: Sequence[Path]) -> dict | None:
    """The manifest of all parts together; None if no part has one."""
    manifests = [read_manifest(part) for part in parts]
    first = manifests[0]
    if all(manifest is None for manifest in manifests):
        return None
    for part, manifest in zip(parts, manifests, strict=True):
        if manifest is None or first is None:
            without = part if manifest is None else parts[0]
            raise ResultsError(f"{without} has no manifest, though others have; give it its own")
        other = differences({**first, "shard": None}, {**manifest, "shard": None})
        if other:
            listed = "".join(f"\n  {problem}" for problem in other)
            raise ResultsError(f"{parts[0]} and {part} are of runs that differ:{listed}")
    shards = [manifest["shard"] for manifest in manifests if manifest]
    all_shards = [str(Shard(i, len(parts))) for i in range(1, len(parts) + 1)]
    if shards != [None] and sorted(map(str, shards)) != sorted(all_shards):
        have = ", ".join("the whole input" if s is None else str(s) for s in shards)
        raise ResultsError(f"the parts are {have}; give every shard of one run once")
    forced = [problem for manifest in manifests for problem in (manifest or {}).get("forced", [])]
    merged = {**(first or {}), "shard": None}
    return {**merged, "forced": forced} if forced else merged
