"""The manifest beside a file of results, and the hash of a checkpoint."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny import FOLDER

import mimo_jax as mj
from mimo_jax.engine import durable
from mimo_jax.engine.manifest import (
    ensure_manifest,
    hash_checkpoint,
    make_manifest,
    manifest_path,
    read_manifest,
)
from mimo_jax.engine.requests import Shard, read_requests
from mimo_jax.engine.results import ResultsError


def manifest(tmp_path: Path, prompt: str = "x", **changes):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"prompt": prompt}) + "\n")
    fields = {
        "model": "mimo-tiny",
        "checkpoint_sha256": "abc",
        "code_version": mj.__version__,
        "mesh": {"tensor": 4},
        "rules": "latency",
        "kernels": "auto",
        "dtype": "bfloat16",
        "decoding": {"method": "dflash", "draft_width": None},
        "sampling": {"temperature": 0.5, "top_p": None},
        "seed": 0,
        "shard": Shard(1, 2),
    }
    return make_manifest(read_requests(source, {}, 0), **{**fields, **changes})


def test_what_is_in_it(tmp_path):
    made = manifest(tmp_path)
    assert made["input"]["lines"] == 1
    assert made["sampling"] == {"temperature": 0.5}
    assert made["shard"] == "1/2"
    assert {"code_version", "jax_version", "mesh", "rules", "kernels", "dtype"} <= made.keys()
    out = tmp_path / "out.jsonl"
    assert ensure_manifest(out, made, has_results=False) == []
    assert manifest_path(out).name == "out.jsonl.manifest.json"
    assert read_manifest(out) == made
    assert ensure_manifest(out, made, has_results=True) == []
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl.manifest.json"]


def test_a_run_that_differs_is_refused_and_each_entry_named(tmp_path):
    out = tmp_path / "out.jsonl"
    made = manifest(tmp_path)
    ensure_manifest(out, made, has_results=False)
    changed = manifest(
        tmp_path,
        "y",
        mesh={"expert": 2},
        seed=1,
        sampling={},
        decoding=None,
        checkpoint_sha256="abd",
    )
    with pytest.raises(ResultsError) as found:
        ensure_manifest(out, changed, has_results=True)
    message = str(found.value)
    for line in (
        f'  input.sha256: "{made["input"]["sha256"]}" -> "{changed["input"]["sha256"]}"',
        '  checkpoint.sha256: "abc" -> "abd"',
        "  mesh.tensor: 4 -> (nothing)",
        "  mesh.expert: (nothing) -> 2",
        "  seed: 0 -> 1",
        "  sampling.temperature: 0.5 -> (nothing)",
        '  decoding.method: "dflash" -> (nothing)',
    ):
        assert line in message.splitlines()
    assert "--force" in message
    assert "kernels" not in message
    assert read_manifest(out) == made

    overridden = ensure_manifest(out, changed, has_results=True, force=True)
    assert "seed: 0 -> 1" in overridden
    assert read_manifest(out) == {**changed, "forced": overridden}
    assert ensure_manifest(out, changed, has_results=True) == []
    again = ensure_manifest(out, made, has_results=True, force=True)
    assert read_manifest(out) == {**made, "forced": overridden + again}


def test_a_run_that_wrote_nothing_is_no_obstacle(tmp_path):
    out = tmp_path / "out.jsonl"
    ensure_manifest(out, manifest(tmp_path), has_results=False)
    other = manifest(tmp_path, seed=5)
    ensure_manifest(out, other, has_results=False)
    assert read_manifest(out) == other


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"format": 99}', b'{"format": 1}'])
def test_results_without_their_manifest_are_refused(tmp_path, content):
    out = tmp_path / "out.jsonl"
    made = manifest(tmp_path)
    if content is not None:
        manifest_path(out).write_bytes(content)
    message = "is missing" if content is None else "is not a manifest that this version wrote"
    with pytest.raises(ResultsError, match=message):
        ensure_manifest(out, made, has_results=True)
    forced = ensure_manifest(out, made, has_results=True, force=True)
    assert read_manifest(out) == {**made, "forced": forced}


def test_a_full_disk_leaves_the_old_one(tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    made = manifest(tmp_path)
    ensure_manifest(out, made, has_results=False)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "fsync", full)
        with pytest.raises(ResultsError, match="No space left"):
            ensure_manifest(out, manifest(tmp_path, seed=1), has_results=False)
    assert read_manifest(out) == made


# The hash of a checkpoint


def checkpoint(folder: Path, value: int = 0, shape: tuple[int, ...] = (2, 3)) -> Path:
    (folder / "dflash").mkdir(parents=True)
    save_file({"a": np.full(shape, value, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "dflash" / "mask.pt").write_bytes(b"12")
    (folder / "README.md").write_text("notes")
    return folder


def test_it_changes_with_what_decides_and_with_nothing_else(tmp_path):
    first = hash_checkpoint(checkpoint(tmp_path / "a"))
    same = checkpoint(tmp_path / "b", value=1)  # as documented: tensors' bytes don't count
    (same / ".cache").mkdir()
    (same / ".cache" / "lock.json").touch()
    (same / "README.md").write_text("other notes")
    assert hash_checkpoint(same) == first
    assert hash_checkpoint(checkpoint(tmp_path / "c", shape=(3, 2))) != first
    changes = ("config.json", b"[]"), ("dflash/mask.pt", b"123"), ("new.json", b"{}")
    for i, (name, content) in enumerate(changes):
        folder = checkpoint(tmp_path / f"changed {i}")
        (folder / name).write_bytes(content)
        assert hash_checkpoint(folder) != first
    folder = checkpoint(tmp_path / "renamed")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert hash_checkpoint(folder) != first


def test_files_behind_links_count(tmp_path):
    folder, linked = checkpoint(tmp_path / "a"), tmp_path / "links"
    (linked / "dflash").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "dflash/mask.pt"):
        (linked / name).symlink_to(folder / name)
    assert hash_checkpoint(linked) == hash_checkpoint(folder)


def test_damaged_tensors_files_are_the_loader_s_to_refuse(tmp_path):
    folder = checkpoint(tmp_path / "a")
    for content in (b"", b"123", b"\xff" * 8, (50).to_bytes(8, "little")):
        (folder / "model.safetensors").write_bytes(content)
        assert len(hash_checkpoint(folder)) == 64
    with pytest.raises(ValueError, match="has no files"):
        hash_checkpoint(tmp_path / "none")


def test_of_the_bundled_model():
    assert len(hash_checkpoint(FOLDER)) == 64
