"""No file name in a checkpoint leads out of the checkpoint's folder."""

import json
from pathlib import Path

import pytest
from checkpoint.release_bytes import safetensors_bytes
from checkpoint.release_format import make_release

from mimo_jax import checkpoint
from mimo_jax.checkpoint.errors import Problem

FIRST = "model_pp0_ep0_shard0.safetensors"
SECOND = "model_pp0_ep1_shard0.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.layers.1.input_layernorm.weight"


def problems(folder: Path) -> tuple[Problem, ...]:
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(folder)
    return caught.value.problems


@pytest.mark.parametrize("name", ["../outside.safetensors", "{absolute}", "a/../../x", "", "a\0b"])
def test_index_cannot_lead_out_of_the_folder(name: str, tmp_path: Path) -> None:
    release = make_release(mtp=1)
    folder = release.write(tmp_path / "checkpoint")
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(safetensors_bytes({NORM: release.tensors[FIRST][NORM]}))
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][NORM] = name.replace("{absolute}", str(outside))
    (folder / INDEX).write_text(json.dumps(index))
    found = problems(folder)
    assert "unsafe path" in {p.kind for p in found}
    assert {p.kind for p in found} == {"unsafe path", "misplaced tensor"}


@pytest.mark.parametrize("name", [FIRST, "config.json", INDEX, "dflash/mask_embedding.pt"])
def test_links_cannot_lead_out_of_the_folder(name: str, tmp_path: Path) -> None:
    folder = make_release(mtp=1, drafter=True).write(tmp_path / "checkpoint")
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    found = problems(folder)
    assert "unsafe path" in {p.kind for p in found}
    assert any(str(outside) in p.found for p in found)


def test_linked_drafter_folder_is_refused(tmp_path: Path) -> None:
    folder = make_release(mtp=1, drafter=True).write(tmp_path / "checkpoint")
    (folder / "dflash").rename(tmp_path / "elsewhere")
    (folder / "dflash").symlink_to(tmp_path / "elsewhere")
    assert [(p.kind, p.file) for p in problems(folder)] == [("unsafe path", "dflash")]


def test_the_hubs_cache_is_made_of_links(tmp_path: Path) -> None:
    """A snapshot's files are links into the same repository's blobs: allowed, and nothing else."""
    snapshot = tmp_path / "models--x--y" / "snapshots" / "0123"
    make_release(mtp=1, drafter=True).write(snapshot)
    blobs = tmp_path / "models--x--y" / "blobs"
    blobs.mkdir()
    for i, path in enumerate(sorted(p for p in snapshot.rglob("*") if p.is_file())):
        path.rename(blobs / str(i))
        path.symlink_to(blobs / str(i))
    checkpoint.load(snapshot)
    index = (snapshot / INDEX).read_text()
    (snapshot / INDEX).write_text(index.replace(SECOND, "../../blobs/0"))
    assert "unsafe path" in {p.kind for p in problems(snapshot)}
    (snapshot / INDEX).write_text(index)
    other = tmp_path / "models--x--y" / "refs"
    (snapshot / "config.json").resolve().rename(other)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(other)
    assert [p.kind for p in problems(snapshot)] == ["unsafe path"]
