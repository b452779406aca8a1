"""Exported models: what is in the folder, that it runs without the package, and what is refused."""

import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import run_exported
from flax import nnx
from jax import export
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import FOLDER, exact, two_layers
from typer.testing import CliRunner

import mimo_jax as mj
from mimo_jax import checkpoint, cli
from mimo_jax.portability import artifact
from mimo_jax.portability.artifact import export_model
from mimo_jax.portability.step import PLATFORMS

SCRIPT = Path(run_exported.__file__)
ROOT = SCRIPT.parents[1]
# Nothing of the package or beneath it can be imported after this.
BLOCKED = """
import runpy, sys
FORBIDDEN = set("mimo_jax pallas_kernels sharding flax orbax transformers tokenizers".split())
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FORBIDDEN:
            raise AssertionError(f"{name} is imported")
sys.meta_path.insert(0, Blocker())
"""
ALONE = f"""{BLOCKED}
script, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""
PROMPTS = [[300 + i for i in range(n)] for n in (5, 32, 45, 1)]


@functools.cache
def small() -> mj.LanguageModel:
    """mimo-tiny's first two layers, in float32: full and dense, sliding and MoE."""
    whole = checkpoint.load(FOLDER, dtype="float32", mtp=False, drafter=False)
    model, config = whole.model, whole.config.truncated(2)
    model.layers, model.config = nnx.List(model.layers[:2]), config
    return mj.LanguageModel(dataclasses.replace(whole, config=config))


def greedy(lm: mj.LanguageModel, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """What the package itself generates."""
    outputs = lm.generate(prompts, mj.SamplingParams(max_tokens=tokens, temperature=0.0))
    return [output.token_ids for output in outputs]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """mimo-tiny for all platforms, with two rows and a cache of any length.

    By the command, in a process without beartype, which takes an open length for no int.
    """
    folder = tmp_path_factory.mktemp("whole") / "artifact"
    options = ["--dtype", "float32", "--batch", "2", "--prompt-len", "32"]
    command = [sys.executable, "-W", "error", "-m", "mimo_jax", "export", "mimo-tiny"]
    subprocess.run([*command, str(folder), *options], check=True, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def part(tmp_path_factory) -> Path:
    """Its first layers, with a cache of 64 positions."""
    folder = tmp_path_factory.mktemp("part") / "artifact"
    options: dict[str, Any] = {"platforms": ["cpu", "tpu"], "batch": 2, "max_len": 64}
    export_model(small(), folder, name="part", prompt_len=8, **options)
    return folder


@pytest.fixture(scope="module")
def model(part) -> run_exported.Artifact:
    """It, loaded; tests share what it compiles."""
    return run_exported.Artifact(part)


@pytest.fixture
def copy(part, tmp_path) -> Path:
    """A copy of it, to damage."""
    return shutil.copytree(part, tmp_path / "copy")


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def change(folder: Path, **changes: Any) -> None:
    """Replaces what the manifest says."""
    (folder / "manifest.json").write_text(json.dumps(read(folder) | changes))


def programs(folder: Path) -> dict[str, export.Exported]:
    described = read(folder)["programs"].items()
    return {
        name: export.deserialize(bytearray((folder / p["file"]).read_bytes()))
        for name, p in described
    }


def test_it_runs_alone_and_gives_the_same_tokens(whole):
    asked = [f"--prompt-ids={','.join(map(str, ids))}" for ids in PROMPTS]
    ran = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", ALONE, SCRIPT, whole, *asked, "--tokens=24"],
        capture_output=True,
        text=True,
        cwd=whole.parent,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert ran.returncode == 0, ran.stderr
    got = [[int(token) for token in line.split(",")] for line in ran.stdout.splitlines()]
    assert got == greedy(exact(), PROMPTS, 24)
    assert "mimo-tiny on cpu" in ran.stderr


def test_the_blocker_blocks():
    program = f"{BLOCKED}\nimport mimo_jax"
    ran = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True)
    assert "mimo_jax is imported" in ran.stderr


def test_programs_are_for_the_platforms_that_were_asked_for(whole, part):
    for folder, platforms in ((whole, PLATFORMS), (part, ("cpu", "tpu"))):
        assert read(folder)["platforms"] == list(platforms)
        assert {p.platforms for p in programs(folder).values()} == {platforms}


def test_the_manifest_says_who_can_read_it(whole):
    manifest = read(whole)
    version = manifest["calling_convention_version"]
    assert {p.calling_convention_version for p in programs(whole).values()} == {version}
    assert manifest["made_with"] == {
        "mimo-jax": mj.__version__,
        "jax": jax.__version__,
        "jaxlib": metadata.version("jaxlib"),
    }
    assert (manifest["format"], manifest["version"]) == (run_exported.FORMAT, run_exported.VERSION)
    # What is only sure for some weeks has to be asked for, and isn't.
    assert all(not p.disabled_safety_checks for p in programs(whole).values())


def test_the_manifest_lists_arguments_and_results(whole):
    manifest = read(whole)
    for name, program in programs(whole).items():
        tokens = manifest["programs"][name]["tokens"]
        for listed, arrays in (
            (manifest["arguments"], program.in_avals),
            (manifest["results"], program.out_avals),
        ):
            shapes = [[tokens if d == "T" else str(d) for d in a["shape"]] for a in listed]
            found = [[str(d) for d in a.shape] for a in arrays]
            assert [[str(d) for d in shape] for shape in shapes] == found
            assert [a["dtype"] for a in listed] == [a.dtype.name for a in arrays]
    names = [a["name"] for a in manifest["arguments"]]
    assert len(set(names)) == len(names)
    assert [d for d in manifest["arguments"][-2]["shape"] if isinstance(d, str)] == ["max_len"]


def test_the_cache_is_given_away(whole):
    cached = [a["name"] for a in read(whole)["results"] if a["role"] == "cache"]
    for program in programs(whole).values():
        main = re.findall(r"^ *func.func public @main\(.*", program.mlir_module(), re.M)
        assert [line.count("tf.aliasing_output") for line in main] == [len(cached)]


def test_weights_are_stored_once_and_as_they_are_held(whole):
    listed = [a for a in read(whole)["arguments"] if a["role"] == "weight"]
    leaves = jax.tree.leaves(exact().model)
    assert [a["dtype"] for a in listed] == [leaf.dtype.name for leaf in leaves]
    assert {"uint8", "float8_e4m3fn"} <= {a["dtype"] for a in listed}
    with safe_open(whole / "weights.safetensors", framework="np") as file:
        assert set(file.keys()) == {a["name"] for a in listed}
        for argument, leaf in zip(listed, leaves, strict=True):
            stored = file.get_tensor(argument["name"])
            assert stored.dtype.name == argument.get("stored", argument["dtype"])
            assert stored.tobytes() == np.asarray(leaf).tobytes()


def test_text_in_and_out(part, model, monkeypatch, capsys):
    monkeypatch.setattr(run_exported, "Artifact", lambda folder: model)
    texts = ["import os\n", "class A:\n    def", "x = 1"]
    asked = [f"--prompt={text}" for text in texts]
    assert run_exported.main([str(part), *asked, "--tokens=6"]) == 0
    outputs = small().generate(texts, mj.SamplingParams(max_tokens=6, temperature=0.0))
    captured = capsys.readouterr()
    assert captured.out == "".join(output.text + "\n" for output in outputs)
    assert captured.err.count("first token after") == 2  # two rows, then one


def test_rows_end_by_themselves(model, monkeypatch):
    prompts = [[7, 8, 9], list(range(100, 130))]
    first, second = greedy(small(), prompts, 12)
    eos = next(token for token in first[2:] if token not in second)
    monkeypatch.setitem(model.manifest["model"], "eos_token_ids", [eos])
    ended = first[: first.index(eos) + 1]
    rows, timing = model.generate(prompts, 12)
    assert (rows, len(timing.steps)) == ([ended, second], 11)
    rows, timing = model.generate(prompts[:1], 12)
    assert (rows, len(timing.steps)) == ([ended], len(ended) - 1)
    assert model.generate(prompts[:1], 12, ignore_eos=True)[0] == [first]


def test_logits_are_the_models(model):
    ids, cache = np.arange(200, 208, dtype=np.int32), model._empty_cache(8, None)
    lengths = np.array([[8], [3]])
    positions = np.where(np.arange(8) < lengths, np.arange(8), -1).astype(np.int32)
    tokens = np.where(positions < 0, 0, ids).astype(np.int32)
    chosen, logits, *_ = model._programs["prompt"](*model._weights, tokens, positions, *cache)
    assert all(array.is_deleted() for array in cache)
    valid = model.manifest["model"]["valid_vocabulary"]
    assert np.isneginf(logits[:, valid:]).all()
    for row, length in enumerate((8, 3)):
        expected = small().logits(ids[None, :length])[0, -1, :valid]
        np.testing.assert_allclose(logits[row, :valid], expected, atol=1e-5)
        assert chosen[row] == expected.argmax()


def test_the_cache_is_as_long_as_is_asked_for(whole, part):
    described = run_exported.read_manifest(whole)
    lengths = []
    for folder, asked in ((whole, None), (whole, 100), (part, None)):
        model = run_exported.Artifact(folder)
        lengths.append(max(a.shape[1] for a in model._empty_cache(60, asked) if a.shape[1] != 256))
    assert lengths == [64, 100, 64]
    assert described["cache_len"] == {"symbol": "max_len", "most": 4096}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompt-ids=" + ",".join(["5"] * 40), "--tokens=30"], "need a cache of 70 positions"),
        (["--prompt-ids=5,4095"], r"token id 4095 isn't one of this model's 0\.\.4079"),
        (["--prompt-ids=5", "--tokens=0"], "at least one"),
        (["--prompt-ids=5", "--cache-len=128"], "always has 64 positions"),
        (["--prompt="], "no tokens"),
    ],
)
def test_prompts_that_it_cannot_complete(part, options, said, capsys):
    assert run_exported.main([str(part), *options]) == 2
    captured = capsys.readouterr()
    assert re.search(said, captured.err)
    assert not captured.out


def test_a_cache_length_that_is_too_small_or_too_great(whole):
    model = run_exported.Artifact(whole)
    for length in (20, 5000):
        with pytest.raises(run_exported.ArtifactError, match="has to have 26 to 4096 positions"):
            model.generate([[5, 6]], 24, cache_len=length)
    with pytest.raises(run_exported.ArtifactError, match="this artifact has 2"):
        model.generate([[5]] * 3, 24)


def garbage(folder: Path) -> None:
    """Makes a program something that jax doesn't know, and the manifest agree."""
    described = read(folder)["programs"]
    (folder / described["step"]["file"]).write_bytes(b"of another time")
    described["step"]["sha256"] = hashlib.sha256(b"of another time").hexdigest()
    change(folder, programs=described)


def reshape_a_weight(folder: Path) -> None:
    weights = load_file(folder / "weights.safetensors")
    weights["norm.weight"] = weights["norm.weight"][:-1]
    save_file(weights, folder / "weights.safetensors")


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "weights.safetensors")
    del weights["norm.weight"]
    save_file(weights, folder / "weights.safetensors")


def cut(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


def remove(folder: Path, name: str) -> None:
    (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: remove(f, "manifest.json"), "has no manifest.json: give a folder that mimo-jax"),
        (lambda f: cut(f, "manifest.json"), "can't be read .*: copy the folder again"),
        (lambda f: change(f, format="other"), "isn't of an export of mimo-jax"),
        (lambda f: change(f, version=2), "is of version 2, and this program reads 1"),
        (lambda f: (f / "manifest.json").write_text('{"format": "mimo-jax export", "version": 1}'),
         "has no programs, arguments"),
        (lambda f: change(f, calling_convention_version=99),
         r"calling convention 99, this jax knows .*: install jax==[\d.]+, or export again"),
        (lambda f: change(f, platforms=["tpu"]),
         "platform is cpu, and .* is for tpu: export it with --platforms cpu"),
        (lambda f: remove(f, "step.jaxexport"), "step.jaxexport can't be read"),
        (lambda f: cut(f, "prompt.jaxexport"), "prompt.jaxexport isn't what was exported"),
        (garbage, "can't read this export of jax .*: install jax=="),
        (lambda f: remove(f, "weights.safetensors"), "weights.safetensors is missing"),
        (lambda f: cut(f, "weights.safetensors"), "weights.safetensors is damaged"),
        (drop_a_weight, r"norm.weight is missing, and the programs want float32 \[256\]"),
        (reshape_a_weight, r"norm.weight is float32 \[255\], and the programs want .* \[256\]"),
        (lambda f: remove(f, "tokenizer.json"), "no tokenizer.json: give --prompt-ids"),
    ],
)  # fmt: skip
def test_folders_that_it_cannot_run(
    copy, damage: Callable[[Path], object], said: str, capsys
) -> None:
    damage(copy)
    assert run_exported.main([str(copy), "--prompt=x"]) == 1
    assert re.search(f"^error: .*{said}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"platforms": ["cpu", "metal"]}, "no platform 'metal': choose of cpu, cuda, rocm, tpu"),
        ({"platforms": ["gpu"]}, r"GPUs are cuda \(NVIDIA\) or rocm"),
        ({"platforms": []}, "name some of cpu"),
        ({"platforms": ["cpu", "cpu"]}, "each once"),
        ({"batch": 0}, "at least one row"),
        ({"max_len": 1}, "2 to 4096 positions"),
        ({"max_len": 4097}, "2 to 4096 positions"),
        ({"prompt_len": 0}, "chunks of 1 to 4096"),
        ({"prompt_len": 65, "max_len": 64}, "chunks of 1 to 64"),
    ],
)
def test_what_cannot_be_exported(options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        export_model(small(), tmp_path / "new", name="x", **options)
    assert not any(tmp_path.iterdir())


def test_models_with_kernels_or_on_a_mesh_cannot(tmp_path, monkeypatch):
    monkeypatch.setattr(small().model.layers[1].self_attn, "kernels", ("triton", "reference"))
    with pytest.raises(ValueError, match="load it with kernels='reference'"):
        export_model(small(), tmp_path / "new", name="x")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="load it without mesh="):
        export_model(two_layers(mesh="tensor=2"), tmp_path / "new", name="x")


def test_nothing_is_overwritten_and_nothing_left_behind(part, tmp_path, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in part.iterdir()}
    with pytest.raises(FileExistsError, match="isn't empty; export to a new folder"):
        export_model(small(), part, name="x")
    assert {path: path.stat().st_mtime_ns for path in part.iterdir()} == before

    def fails(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(artifact, "write_file", fails)
    options: dict[str, Any] = {"platforms": ["cpu"], "max_len": 8, "prompt_len": 1}
    with pytest.raises(OSError, match="the disk is full"):
        export_model(small(), tmp_path / "new", name="x", **options)
    assert not any(tmp_path.iterdir())


def test_without_flatbuffers_it_says_so_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OSError, match="pip install flatbuffers"):
        export_model(small(), tmp_path / "new", name="x")


def test_the_command(tmp_path, monkeypatch):
    asked: dict[str, Any] = {}

    def load(name: str, **options: Any) -> mj.LanguageModel:
        asked.update(options, name=name)
        return small()

    monkeypatch.setattr(mj, "load", load)
    folder = tmp_path / "out"
    sizes = ["--batch", "1", "--max-len", "32", "--prompt-len", "8", "--dtype", "float32"]
    command = ["export", "some/model", str(folder), "--platforms", "cpu, rocm", *sizes]
    ran = CliRunner().invoke(cli.app, command)
    assert ran.exit_code == 0, ran.output
    assert f"{folder} is complete, for cpu, rocm" in ran.output
    assert (asked["name"], asked["kernels"], asked["dtype"]) == (
        "some/model",
        "reference",
        "float32",
    )
    assert read(folder)["model"]["name"] == "model"
    assert read(folder)["cache_len"] == {"symbol": None, "most": 32}
    asked.clear()
    again = CliRunner().invoke(cli.app, command)
    assert (again.exit_code, "isn't empty" in again.output, asked) == (1, True, {})
