"""Converted checkpoints have the same bytes on any mesh, and are there whole or not at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from checkpoint.comparing import read_tensors, stored_tensors
from checkpoint.release_format import make_release
from checkpoint.test_layouts import FORMATS
from checkpoint.test_sharded_loading import LATENCY, THROUGHPUT, assert_placed, assert_same_bytes

from mimo_jax import checkpoint
from mimo_jax.checkpoint import converted
from mimo_jax.checkpoint.errors import Problem
from sharding.mesh import make_mesh
from sharding.rules import ShardingError


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_release(drafter=True, mtp=2).write(tmp_path_factory.mktemp("original"))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    return folder


@pytest.fixture(scope="module")
def whole(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "new"
    mesh = make_mesh("expert=2,tensor=2")
    checkpoint.convert(checkpoint.load(original, mesh=mesh), folder)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """One to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def problems(folder: Path, **options: Any) -> tuple[Problem, ...]:
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(folder, **options)
    return caught.value.problems


@pytest.mark.parametrize(("rules", "mesh"), [("single", None), LATENCY, THROUGHPUT])
def test_same_bytes_on_any_mesh(rules: str, mesh: str | None, original: Path, whole: Path) -> None:
    first = checkpoint.load(original)
    if mesh is None:
        again = checkpoint.load(whole)
        assert again.placement is None
    else:
        on_mesh = make_mesh(mesh)
        again = checkpoint.load(whole, mesh=on_mesh, rules=rules)
        assert_placed(again, on_mesh)
    assert_same_bytes(first, again)
    assert (again.config, again.layout) == (first.config, first.layout)
    assert again.layout.reasons == first.layout.reasons
    assert again.drafter is not None
    assert first.drafter is not None
    assert again.drafter.config == first.drafter.config
    assert again.folder == whole


@pytest.mark.parametrize("name", FORMATS)
def test_every_layout(name: str, tmp_path: Path) -> None:
    """Back to the original's own bytes."""
    release = make_release(**FORMATS[name])
    loaded = checkpoint.load(release.write(tmp_path / "in"))
    checkpoint.convert(loaded, tmp_path / "converted")
    again = checkpoint.load(tmp_path / "converted")
    assert_same_bytes(loaded, again)
    checkpoint.save(tmp_path / "out", again)
    assert read_tensors(tmp_path / "out") == stored_tensors(release)


def test_folder(original: Path, whole: Path) -> None:
    for name in ("tokenizer.json", "generation_config.json"):
        assert (whole / name).read_bytes() == (original / name).read_bytes()
    description = json.loads((whole / converted.DESCRIPTION).read_text())
    assert description["format"] == 1
    assert description["mtp_blocks"] == 2
    assert description["versions"]["jax"] == jax.__version__
    assert sorted(p.name for p in whole.parent.iterdir()) == ["new"]


def test_parts_can_be_left_out(whole: Path) -> None:
    less = checkpoint.load(whole, mtp=False, drafter=False)
    assert less.mtp is None
    assert less.drafter is None


def test_what_was_decided_when_converting_stays(whole: Path) -> None:
    for options in ({"dtype": "float32"}, {"dequantize": True}, {"qkv": "split"}):
        (problem,) = problems(whole, **options)
        assert problem.kind == "already converted"
        assert "give them when converting, or load the original" in problem.expected


def test_a_mesh_that_does_not_divide_the_model(whole: Path) -> None:
    with pytest.raises(ShardingError, match="choose a mesh that divides it"):
        checkpoint.load(whole, mesh=make_mesh("tensor=8"))


def test_inspect(original: Path, whole: Path, copy: Path) -> None:
    first, again = checkpoint.inspect(original), checkpoint.inspect(whole)
    for same in ("config", "layout", "parameters", "mtp_parameters", "mtp_blocks", "drafter"):
        assert getattr(first, same) == getattr(again, same)
    assert first.drafter_parameters == again.drafter_parameters
    assert sum(g.nbytes for g in first.groups) + 320 == sum(g.nbytes for g in again.groups)
    assert {(g.group, g.dtype) for g in first.groups} == {(g.group, g.dtype) for g in again.groups}
    assert again.problems == ()
    (copy / converted.DESCRIPTION).unlink()
    assert checkpoint.inspect(copy).problems == problems(copy)
    assert "unfinished conversion" in str(checkpoint.inspect(copy))


def test_only_into_an_empty_folder(original: Path, tmp_path: Path) -> None:
    loaded = checkpoint.load(original)
    (tmp_path / "x").write_text("")
    with pytest.raises(FileExistsError, match="is not empty; convert into a new folder"):
        checkpoint.convert(loaded, tmp_path)
    (tmp_path / "empty").mkdir()
    checkpoint.convert(loaded, tmp_path / "empty")
    assert_same_bytes(loaded, checkpoint.load(tmp_path / "empty"))


def test_failure_leaves_nothing(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(converted, "_write_json", full)
    with pytest.raises(OSError, match="no space"):
        checkpoint.convert(checkpoint.load(original), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from mimo_jax import checkpoint
from mimo_jax.checkpoint import converted
real = getattr(converted, sys.argv[3])
def die(*args):
    if sys.argv[3] == "save_arrays":
        real(*args)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(converted, sys.argv[3], die)
checkpoint.convert(checkpoint.load(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.parametrize("step", ["save_arrays", "_description", "_sync_one"])
def test_a_killed_conversion_is_refused_and_done_again(
    step: str, original: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    run = [sys.executable, "-c", KILLED, str(original), str(target), step]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    assert subprocess.run(run, env=env, check=False).returncode == -signal.SIGKILL
    assert not target.exists()
    (left,) = tmp_path.iterdir()
    (problem,) = problems(left)
    assert problem.kind == "unfinished conversion"
    assert "convert the checkpoint again" in problem.expected
    loaded = checkpoint.load(original)
    checkpoint.convert(loaded, target)
    assert list(tmp_path.iterdir()) == [target]
    assert_same_bytes(loaded, checkpoint.load(target))


def data_files(folder: Path) -> list[Path]:
    return [p for p in (folder / converted.ARRAYS).rglob("d/*") if p.is_file()]


def test_a_copy_that_lacks_files_or_ends_of_them(copy: Path) -> None:
    first, second, *_ = sorted(data_files(copy), key=lambda p: -p.stat().st_size)
    size = first.stat().st_size
    os.truncate(first, size - 1)
    second.unlink()
    found = {(p.file, p.found) for p in problems(copy)}
    assert found == {
        (str(first.relative_to(copy)), f"{size - 1} bytes"),
        (str(second.relative_to(copy)), "nothing"),
    }


@pytest.mark.parametrize(
    ("edit", "kind"),
    [
        (lambda d: d.update(format=2), "unknown format"),
        (lambda d: d.pop("layout"), "broken JSON"),
        (lambda d: d.update(layout={"qkv": "plain"}), "broken JSON"),
        (lambda d: d.update(drafter={"hidden_size": 3}), "broken JSON"),
        (lambda d: d.update(mtp_blocks="many"), "broken JSON"),
        (lambda d: d.update(files=[1]), "broken JSON"),
        (lambda d: d.update(mtp_blocks=3), "does not fit the config"),
        (lambda d: d.update(mtp_blocks=1), "does not fit the config"),
        (lambda d: d["layout"].update(chunks=1), "does not fit the config"),
    ],
)
def test_damaged_description(edit: Callable[[dict[str, Any]], Any], kind: str, copy: Path) -> None:
    path = copy / converted.DESCRIPTION
    description = json.loads(path.read_text())
    edit(description)
    path.write_text(json.dumps(description))
    assert {p.kind for p in problems(copy)} == {kind}


@pytest.mark.parametrize("text", ["", "[]", "{", "\0"])
@pytest.mark.parametrize("name", [converted.DESCRIPTION, converted.CONFIG])
def test_broken_json(name: str, text: str, copy: Path) -> None:
    (copy / name).write_text(text)
    assert name in {p.file for p in problems(copy)}


def test_another_models_config(original: Path, copy: Path) -> None:
    config = json.loads((copy / converted.CONFIG).read_text())
    (copy / converted.CONFIG).write_text(json.dumps(config | {"hidden_size": 320}))
    found = {p.tensor: p for p in problems(copy)}
    assert "(40, 160)" in found["lm_head.weight"].found
    assert "(40, 320)" in found["lm_head.weight"].expected


def test_damaged_metadata(copy: Path) -> None:
    path = copy / converted.ARRAYS / "_METADATA"
    path.write_bytes(b"\xff" * path.stat().st_size)
    (problem,) = problems(copy)
    assert problem.kind == "unreadable arrays"


def test_types_survive(whole: Path) -> None:
    """float8 codes, exponent bytes, bfloat16 and float32."""
    types = {str(a.dtype) for a in jax.tree.leaves(checkpoint.load(whole).model)}
    assert types == {"float8_e4m3fn", "uint8", "bfloat16", "float32"}
    assert np.dtype("uint8") in {a.dtype for a in jax.tree.leaves(checkpoint.load(whole).model)}
