"""Several files of results become one."""

import errno
import os
from pathlib import Path

import pytest
from engine.outcomes import done, failed

from mimo_jax.engine import durable
from mimo_jax.engine.manifest import make_manifest, read_manifest, write_manifest
from mimo_jax.engine.merging import merge
from mimo_jax.engine.requests import RequestFile, Shard
from mimo_jax.engine.results import Results, ResultsError


def part(folder: Path, name: str, *records, shard: Shard | None = None, lines: int = 6) -> Path:
    """A file of results; with a shard it has a manifest."""
    path = folder / name
    with Results(path) as results:
        results.append(*records)
    if shard is not None:
        source = RequestFile([], [], "abc", lines)
        manifest = make_manifest(
            source, model="m", checkpoint_sha256="c", code_version="0", shard=shard
        )
        write_manifest(path, manifest)
    return path


def test_in_the_order_of_the_input(tmp_path):
    records = {i: failed(i) if i == 4 else done(i) for i in range(1, 7)}
    a = part(tmp_path, "a.jsonl", records[5], records[1], records[3])
    b = part(tmp_path, "b.jsonl", records[4], records[6])
    c = part(tmp_path, "c.jsonl", records[2])
    out = tmp_path / "new" / "out.jsonl"
    assert merge([a, b, c], out) == 6
    whole = part(tmp_path, "whole.jsonl", *records.values())
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(os.listdir(out.parent)) == ["out.jsonl"]


def test_empty_lines_of_the_input_are_no_gaps_where_manifests_count(tmp_path):
    a = part(tmp_path, "a.jsonl", done(5), done(1), shard=Shard(1, 2), lines=3)
    b = part(tmp_path, "b.jsonl", done(8), shard=Shard(2, 2), lines=3)
    out = tmp_path / "out.jsonl"
    assert merge([b, a], out) == 3
    manifest = read_manifest(out)
    assert manifest is not None
    assert "forced" not in manifest
    assert manifest["shard"] is None
    assert manifest["input"] == {"sha256": "abc", "lines": 3}
    assert merge([out], tmp_path / "again.jsonl") == 3


def test_what_was_forced_is_not_forgotten(tmp_path):
    parts = [part(tmp_path, f"{i}.jsonl", done(i), shard=Shard(i, 2), lines=2) for i in (1, 2)]
    for i, path in enumerate(parts):
        manifest = read_manifest(path)
        assert manifest is not None
        write_manifest(path, {**manifest, "forced": [f"seed: {i} -> 9"]})
    merge(parts, tmp_path / "out.jsonl")
    manifest = read_manifest(tmp_path / "out.jsonl")
    assert manifest is not None
    assert manifest["forced"] == ["seed: 0 -> 9", "seed: 1 -> 9"]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((1, 2), (2, 3), r"line 2 has a result in .*a.jsonl and in .*b.jsonl \(1 such"),
        ((1, 2), (4, 5), r"there are 4 results, but the last is of line 5; without .* lines 3:"),
        ((3,), (7,), r"lines 1-2, 4-6: run the parts to their ends"),
    ],
)
def test_missing_and_duplicate_lines_are_refused(tmp_path, first, second, message):
    a = part(tmp_path, "a.jsonl", *map(done, first))
    b = part(tmp_path, "b.jsonl", *map(done, second))
    with pytest.raises(ResultsError, match=message):
        merge([a, b], tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_an_unfinished_part_is_refused(tmp_path):
    a = part(tmp_path, "a.jsonl", done(1), shard=Shard(1, 2), lines=4)
    b = part(tmp_path, "b.jsonl", done(2), shard=Shard(2, 2), lines=4)
    out = tmp_path / "out.jsonl"
    with pytest.raises(ResultsError, match=r"but the input has 4 lines; .*those after 2"):
        merge([a, b], out)
    b.write_bytes(b.read_bytes()[:-9])
    with pytest.raises(ResultsError, match=r"line 1 of .*b.jsonl is half a line"):
        merge([a, b], out)
    b.write_bytes(b"notes\n")
    with pytest.raises(ResultsError, match="no result of a batch"):
        merge([a, b], out)
    b.write_bytes(b"")
    with pytest.raises(ResultsError, match="but the input has 4 lines"):
        merge([a, b], out)


def test_shards_that_do_not_fit(tmp_path):
    a = part(tmp_path, "a.jsonl", done(1), shard=Shard(1, 2), lines=2)
    b = part(tmp_path, "b.jsonl", done(2), shard=Shard(2, 2), lines=2)
    other = part(tmp_path, "other.jsonl", done(2), shard=Shard(2, 2), lines=5)
    third = part(tmp_path, "third.jsonl", done(2), shard=Shard(2, 3), lines=2)
    bare = part(tmp_path, "bare.jsonl", done(2))
    out = tmp_path / "out.jsonl"
    for parts, message in (
        ([], "nothing to merge"),
        ([a], "the parts are 1/2; give every shard"),
        ([a, a], "the parts are 1/2, 1/2; give every shard"),
        ([a, third], "the parts are 1/2, 2/3"),
        ([a, other], r"runs that differ:\n  input.lines: 2 -> 5"),
        ([a, bare], r"bare.jsonl has no manifest"),
        ([bare, a], r"bare.jsonl has no manifest"),
        ([a, tmp_path / "none"], "none"),
    ):
        with pytest.raises(ResultsError, match=message):
            merge(parts, out)
    with pytest.raises(ResultsError, match="is there already"):
        merge([a, b], a)
    assert merge([a, b], out) == 2


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    a = part(tmp_path, "a.jsonl", done(1))

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(ResultsError, match=r"merging into .*No space left"):
        merge([a], tmp_path / "out.jsonl")
    assert os.listdir(tmp_path) == ["a.jsonl"]
