"""Everything that can be wrong with a checkpoint is named: tensor, file, found and expected."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint.release_bytes import Tensor, safetensors_bytes
from checkpoint.release_format import Release, make_release

from mimo_jax import checkpoint
from mimo_jax.checkpoint.errors import SHOWN, Problem

FIRST = "model_pp0_ep0_shard0.safetensors"
SECOND = "model_pp0_ep1_shard0.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.layers.1.input_layernorm.weight"
O_PROJ = "model.layers.0.self_attn.o_proj.weight"
QKV = "model.layers.2.self_attn.qkv_proj.weight"
EXPERT = "model.layers.2.mlp.experts.3.down_proj.weight"


def problems(folder: Path) -> tuple[Problem, ...]:
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(folder)
    text = str(caught.value)
    assert str(folder) in text
    assert f"{len(caught.value.problems)} problem" in text
    for problem in caught.value.problems[:SHOWN]:
        assert str(problem) in text
    return caught.value.problems


def damaged(damage: Callable[[Release], None], folder: Path) -> tuple[Problem, ...]:
    release = make_release(mtp=1, drafter=True)
    damage(release)
    return problems(release.write(folder))


def edited(name: str, edit: Callable[[bytes], bytes], folder: Path) -> tuple[Problem, ...]:
    make_release(mtp=1, drafter=True).write(folder)
    path = folder / name
    path.write_bytes(edit(path.read_bytes()))
    return problems(folder)


def only(found: tuple[Problem, ...]) -> Problem:
    assert len(found) == 1, "\n".join(map(str, found))
    return found[0]


def test_intact_checkpoint_has_no_problems(tmp_path: Path) -> None:
    folder = make_release(mtp=1, drafter=True).write(tmp_path)
    checkpoint.load(folder)
    assert checkpoint.inspect(folder).problems == ()


def test_missing_tensor(tmp_path: Path) -> None:
    problem = only(damaged(lambda r: r.find(NORM).__delitem__(NORM), tmp_path))
    assert problem == Problem("missing tensor", "nothing", "BF16 [160]", NORM, INDEX)


def test_missing_scale(tmp_path: Path) -> None:
    name = f"{QKV}_scale_inv"
    problem = only(damaged(lambda r: r.find(name).__delitem__(name), tmp_path))
    assert (problem.kind, problem.tensor) == ("missing tensor", name)
    assert problem.expected == "F32 [6, 2]"


def test_wrong_number_of_shared_scale_rows(tmp_path: Path) -> None:
    """What is expected follows the other layers, whose keys and values share scale blocks."""
    release = make_release(qkv="split", experts="fp8", hybrid_layer_pattern=[0, 0, 1])
    name = "model.layers.1.self_attn.k_proj.weight_scale_inv"
    file = release.find(name)
    file[name] = Tensor("F32", (5, 2), file[name].data + file[name].data[:8])
    problem = only(problems(release.write(tmp_path)))
    assert problem == Problem("wrong shape", "F32 [5, 2]", "F32 [4, 2]", name, FIRST)


def test_far_too_many_mtp_blocks(tmp_path: Path) -> None:
    """A block number that no model has is an extra tensor, and not a request for memory."""
    name = "model.mtp.layers.999999999999.enorm.weight"

    def damage(release: Release) -> None:
        release.tensors[FIRST][name] = Tensor("BF16", (160,), bytes(320))

    problem = only(damaged(damage, tmp_path))
    assert (problem.kind, problem.tensor) == ("extra tensor", name)


def test_extra_tensor(tmp_path: Path) -> None:
    extra = "model.layers.3.input_layernorm.weight"

    def damage(release: Release) -> None:
        release.tensors[FIRST][extra] = Tensor("BF16", (160,), bytes(320))

    problem = only(damaged(damage, tmp_path))
    assert (problem.kind, problem.tensor, problem.file) == ("extra tensor", extra, FIRST)
    assert problem.found == "BF16 [160]"


def test_wrong_shape(tmp_path: Path) -> None:
    def damage(release: Release) -> None:
        release.tensors[FIRST][O_PROJ].shape = (256, 160)

    problem = only(damaged(damage, tmp_path))
    expected = ("wrong shape", "BF16 [256, 160]", "BF16 [160, 256]", O_PROJ, FIRST)
    assert problem == Problem(*expected)


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        (O_PROJ, "F16", "BF16 [160, 256]"),
        (QKV, "F8_E5M2", "F8_E4M3 [704, 160]"),
        (EXPERT, "I8", "U8 [160, 32]"),
        (f"{EXPERT}_scale", "F8_E8M0", "U8 [160, 2]"),
        (f"{QKV}_scale_inv", "I32", "F32 [6, 2]"),
        ("model.layers.1.mlp.gate.e_score_correction_bias", "I32", "F32 [4]"),
        ("model.layers.1.mlp.gate.weight", "F16", "BF16 or F32 [4, 160]"),
        ("model.mtp.layers.0.eh_proj.weight", "I16", "BF16 [160, 320]"),
        (O_PROJ, "F4_NOT_KNOWN", "BF16 [160, 256]"),
    ],
)
def test_wrong_dtype(name: str, dtype: str, expected: str, tmp_path: Path) -> None:
    def damage(release: Release) -> None:
        release.find(name)[name].dtype = dtype

    problem = only(damaged(damage, tmp_path))
    assert (problem.kind, problem.tensor) == ("wrong dtype", name)
    assert problem.found.startswith(dtype)
    assert problem.expected == expected


@pytest.mark.parametrize(
    ("name", "patch", "found", "expected"),
    [
        (NORM, b"\xc0\x7f", "1 of 160 values (nan at [0])", "finite numbers"),
        (NORM, b"\x80\xff", "1 of 160 values (-inf at [0])", "finite numbers"),
        (QKV, b"\x01\x7f\xff", "2 of 112640 values (nan at [0, 1])", "codes other than NaN"),
        (f"{EXPERT}_scale", b"\x7f\xff", "1 of 320 values (255 at [0, 1])", "exponent bytes"),
        (f"{EXPERT}_scale", b"\x00", "1 of 320 values (0 at [0, 0])", "other than 0 and 255"),
        (f"{QKV}_scale_inv", b"\0\0\0\0", "1 of 12 values (0.0 at [0, 0])", "finite positive"),
        (f"{QKV}_scale_inv", b"\0\0\x80\x7f", "(inf at [0, 0])", "finite positive multipliers"),
        (f"{QKV}_scale_inv", b"\0\0\xc0\x7f", "(nan at [0, 0])", "finite positive multipliers"),
        (f"{QKV}_scale_inv", b"\0\0\x80\xbf", "(-1.0 at [0, 0])", "finite positive multipliers"),
        ("model.mtp.layers.0.enorm.weight", b"\xc0\x7f", "1 of 160", "finite numbers"),
        (
            "model.layers.1.mlp.gate.e_score_correction_bias",
            b"\0\0\xc0\x7f",
            "(nan at [0])",
            "finite numbers",
        ),
    ],
)
def test_bad_values(name: str, patch: bytes, found: str, expected: str, tmp_path: Path) -> None:
    def damage(release: Release) -> None:
        tensor = release.find(name)[name]
        tensor.data = patch + tensor.data[len(patch) :]

    problem = only(damaged(damage, tmp_path))
    assert (problem.kind, problem.tensor) == ("bad values", name)
    assert found in problem.found
    assert expected in problem.expected
    assert problem.file.endswith(".safetensors")


def test_bad_values_of_several_tensors_and_the_drafter(tmp_path: Path) -> None:
    def damage(release: Release) -> None:
        assert release.drafter is not None
        for file, name in (
            (release.find(NORM), NORM),
            (release.find(EXPERT), f"{EXPERT}_scale"),
            (release.drafter.find("norm.weight"), "norm.weight"),
        ):
            file[name].data = b"\xff" * len(file[name].data)

    found = damaged(damage, tmp_path)
    assert {p.tensor for p in found} == {NORM, f"{EXPERT}_scale", "norm.weight"}
    assert {p.file.split("/")[0] for p in found} == {FIRST, SECOND, "dflash"}


def test_bad_mask_embedding(tmp_path: Path) -> None:
    def damage(release: Release) -> None:
        assert release.drafter is not None
        release.drafter.mask = (39, b"\xff" * 320)

    problem = only(damaged(damage, tmp_path))
    assert (problem.kind, problem.file) == ("bad values", "dflash/mask_embedding.pt")


def test_misshapen_mask_embedding(tmp_path: Path) -> None:
    def damage(release: Release) -> None:
        assert release.drafter is not None
        release.drafter.mask = (39, bytes(2 * 17))

    problem = only(damaged(damage, tmp_path))
    assert (problem.kind, problem.found) == ("wrong shape", "bfloat16 [17]")


def test_truncated_file(tmp_path: Path) -> None:
    size = (make_release(mtp=1, drafter=True).write(tmp_path / "x") / SECOND).stat().st_size
    problem = only(edited(SECOND, lambda data: data[:-1], tmp_path))
    assert (problem.kind, problem.file) == ("truncated file", SECOND)
    assert problem.found == f"{size - 1} bytes"
    assert problem.expected == f"the {size} bytes that its header describes"


def test_trailing_bytes(tmp_path: Path) -> None:
    problem = only(edited(SECOND, lambda data: data + b"x", tmp_path))
    assert (problem.kind, problem.file) == ("trailing bytes", SECOND)


@pytest.mark.parametrize(
    "edit",
    [
        lambda data: b"",
        lambda data: data[:5],
        lambda data: data[:100],
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: b"<html>" + data,
    ],
)
def test_not_a_safetensors_file(edit: Callable[[bytes], bytes], tmp_path: Path) -> None:
    problem = only(edited(SECOND, edit, tmp_path))
    assert (problem.kind, problem.file) == ("truncated or not a safetensors file", SECOND)


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("{", "Expecting property name"),
        ("[]", "list"),
        ('{"a": 1}', "1"),
        ('{"a": {"dtype": "F32"}}', "{'dtype': 'F32'}"),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}', "8 bytes for F32 [1]"),
        ('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "-1"),
        ('{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', "True"),
        ('{"a": {"dtype": "F32", "shape": [0], "data_offsets": [4, 0]}}', "data_offsets [4, 0]"),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "bytes from 4"),
        (
            '{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},'
            ' "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}',
            "bytes from 1",
        ),
        ('{"a": {}, "a": {}}', "1 repeated keys: a"),
    ],
)
def test_broken_header(header: str, found: str, tmp_path: Path) -> None:
    data = len(header).to_bytes(8, "little") + header.encode() + bytes(8)
    reported = edited(SECOND, lambda _: data, tmp_path)
    broken = [p for p in reported if p.kind == "broken header"]
    assert found in only(tuple(broken)).found
    assert broken[0].file == SECOND


def test_missing_shard(tmp_path: Path) -> None:
    release = make_release(mtp=1)
    folder = release.write(tmp_path)
    (folder / SECOND).unlink()
    problem = only(problems(folder))
    assert (problem.kind, problem.file) == ("missing file", SECOND)
    assert problem.expected == f"{len(release.tensors[SECOND])} tensors in it"


@pytest.mark.parametrize("text", ["{", "", "\xff\xfe", "[" * 100_000])
@pytest.mark.parametrize("name", [INDEX, "config.json", "dflash/config.json"])
def test_broken_json(name: str, text: str, tmp_path: Path) -> None:
    found = edited(name, lambda _: text.encode("latin-1"), tmp_path)
    assert ("broken JSON", name) in {(p.kind, p.file) for p in found}


def test_repeated_key_in_the_index(tmp_path: Path) -> None:
    edit = b'{"weight_map": {"lm_head.weight": "a", "lm_head.weight": "b"}}'
    found = edited(INDEX, lambda _: edit, tmp_path)
    assert "1 repeated keys: lm_head.weight" in {p.found for p in found}


@pytest.mark.parametrize(
    "index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "7"]
)
def test_broken_index(index: str, tmp_path: Path) -> None:
    found = edited(INDEX, lambda _: index.encode(), tmp_path)
    assert ("broken index", INDEX) in {(p.kind, p.file) for p in found}


def test_unusable_config(tmp_path: Path) -> None:
    found = edited("config.json", lambda data: data.replace(b"mimo_v2", b"llama"), tmp_path)
    problem = only(found)
    assert (problem.kind, problem.file) == ("unusable config", "config.json")
    assert "'llama' is not a MiMo-V2 model" in problem.found


@pytest.mark.parametrize("name", ["config.json", "dflash/config.json"])
def test_missing_config(name: str, tmp_path: Path) -> None:
    folder = make_release(mtp=1, drafter=True).write(tmp_path)
    (folder / name).unlink()
    problem = only(problems(folder))
    assert (problem.kind, problem.file) == ("missing file", name)


@pytest.mark.parametrize("qkv", ["interleaved", "split"])
def test_weights_that_were_not_downloaded(qkv: str, tmp_path: Path) -> None:
    """Only the files are missed, and not tensors that would be in them in another layout."""
    folder = make_release(mtp=1, qkv=qkv).write(tmp_path)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    for name in files:
        (folder / name).unlink()
    assert [(p.kind, p.file) for p in problems(folder)] == [("missing file", f) for f in files]


def test_tensor_in_the_index_but_not_in_the_file(tmp_path: Path) -> None:
    release = make_release(mtp=1)
    folder = release.write(tmp_path)
    del release.tensors[FIRST][NORM]
    (folder / FIRST).write_bytes(safetensors_bytes(release.tensors[FIRST]))
    problem = only(problems(folder))
    assert (problem.kind, problem.tensor, problem.file) == ("not in file", NORM, FIRST)


def test_tensor_in_the_file_but_not_in_the_index(tmp_path: Path) -> None:
    folder = make_release(mtp=1).write(tmp_path)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][NORM]
    (folder / INDEX).write_text(json.dumps(index))
    found = {(p.kind, p.tensor, p.file) for p in problems(folder)}
    assert ("not in index", NORM, FIRST) in found


def test_tensor_stored_twice(tmp_path: Path) -> None:
    release = make_release(mtp=1)
    release.tensors[FIRST][EXPERT] = release.tensors[SECOND][EXPERT]
    problem = only(problems(release.write(tmp_path)))
    assert (problem.kind, problem.tensor, problem.file) == ("duplicate tensor", EXPERT, FIRST)
    assert SECOND in problem.expected


def test_tensor_in_another_file_than_the_index_says(tmp_path: Path) -> None:
    release = make_release(mtp=1)
    folder = release.write(tmp_path)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][NORM] = SECOND
    (folder / INDEX).write_text(json.dumps(index))
    found = sorted((p.kind, p.tensor, p.file) for p in problems(folder))
    assert found == [("misplaced tensor", NORM, FIRST), ("not in file", NORM, SECOND)]


def test_tensor_stored_twice_without_index(tmp_path: Path) -> None:
    release = make_release(mtp=1)
    release.tensors[FIRST][EXPERT] = release.tensors[SECOND][EXPERT]
    release.metadata = None
    problem = only(problems(release.write(tmp_path)))
    assert (problem.kind, problem.tensor, problem.file) == ("duplicate tensor", EXPERT, SECOND)


def test_file_that_the_index_does_not_mention(tmp_path: Path) -> None:
    folder = make_release(mtp=1).write(tmp_path)
    (folder / "extra.safetensors").write_bytes(safetensors_bytes({}))
    problem = only(problems(folder))
    assert (problem.kind, problem.file) == ("file not in index", "extra.safetensors")


def test_no_weights_at_all(tmp_path: Path) -> None:
    release = make_release(mtp=1)
    release.tensors, release.metadata = {}, None
    problem = only(problems(release.write(tmp_path)))
    assert problem.kind == "missing file"
    assert "model.safetensors or model.safetensors.index.json" in problem.expected


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(checkpoint.CheckpointError, match="missing folder"):
        checkpoint.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="give the folder of a checkpoint"):
        checkpoint.inspect(tmp_path / "none")


def test_missing_mtp_block_between_others(tmp_path: Path) -> None:
    release = make_release(mtp=3)
    file = release.tensors["model_mtp.safetensors"]
    for name in [n for n in file if n.startswith("model.mtp.layers.1.")]:
        del file[name]
    found = problems(release.write(tmp_path))
    assert {p.kind for p in found} == {"missing tensor"}
    assert len(found) == 16
    assert all(p.tensor.startswith("model.mtp.layers.1.") for p in found)


def test_many_problems_at_once(tmp_path: Path) -> None:
    """Shapes, types, names, a shard, the drafter: all of them in one error."""
    release = make_release(mtp=1, drafter=True)
    assert release.drafter is not None
    first = release.tensors[FIRST]
    first[O_PROJ].shape = (256, 160)
    first["lm_head.weight"].dtype = "F16"
    release.rename(NORM, "model.layers.1.input_norm.weight")
    release.drafter.mask = (7, bytes(320))
    drafter_file = next(iter(release.drafter.tensors.values()))
    drafter_file["fc.weight"].shape = (480, 160)
    folder = release.write(tmp_path)
    (folder / SECOND).unlink()
    mtp = folder / "model_mtp.safetensors"
    mtp.write_bytes(mtp.read_bytes()[:-4])
    found = [(p.kind, p.tensor or p.file) for p in problems(folder)]
    assert sorted(found) == sorted(
        [
            ("missing file", SECOND),
            ("truncated file", "model_mtp.safetensors"),
            ("wrong shape", O_PROJ),
            ("wrong dtype", "lm_head.weight"),
            ("missing tensor", NORM),
            ("extra tensor", "model.layers.1.input_norm.weight"),
            ("wrong mask token", "mask embedding"),
            ("wrong shape", "fc.weight"),
        ]
    )


def test_long_lists_are_cut_in_print_only(tmp_path: Path) -> None:
    release = make_release(mtp=1)
    for tensor in release.tensors[FIRST].values():
        tensor.shape = (*tensor.shape, 1)
    folder = release.write(tmp_path)
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(folder)
    count = len(release.tensors[FIRST])
    assert count > SHOWN
    assert len(caught.value.problems) == count
    assert str(caught.value).endswith(f"- and {count - SHOWN} more")


def test_inspect_lists_what_load_raises(tmp_path: Path) -> None:
    release = make_release(mtp=1)
    del release.tensors[FIRST][NORM]
    release.tensors[FIRST][O_PROJ].shape = (256, 160)
    folder = release.write(tmp_path)
    assert checkpoint.inspect(folder).problems == problems(folder)
