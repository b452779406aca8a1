"""What inspect says, from headers alone."""

from pathlib import Path

import pytest
from checkpoint.release_format import TOWERS, make_release

from mimo_jax import checkpoint
from mimo_jax.checkpoint import safetensors_file
from mimo_jax.model.parameters import parameter_count


def test_report_of_a_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = make_release(mtp=3, drafter=True, towers=True)
    folder = release.write(tmp_path)
    loaded = checkpoint.load(folder)

    def refuse(*_: object) -> None:
        raise AssertionError("inspect must not read weights")

    monkeypatch.setattr(safetensors_file.StoredTensor, "read_into", refuse)
    report = checkpoint.inspect(folder)
    assert report.config == loaded.config
    assert report.layout == loaded.layout
    assert report.problems == ()
    assert report.parameters == parameter_count(loaded.model)
    assert loaded.mtp is not None
    assert report.mtp_parameters == parameter_count(loaded.mtp)
    assert loaded.drafter is not None
    assert report.drafter_parameters == parameter_count(loaded.drafter)
    assert report.drafter == loaded.drafter.config
    assert report.mtp_blocks == 3
    assert report.skipped == len(TOWERS)
    assert report.files == 3 + 2
    groups = {(t.group, t.dtype): (t.count, t.nbytes) for t in report.groups}
    assert groups["experts", "U8"] == (48, 2 * 4 * 3 * 160 * 64 * 17 // 32)
    assert groups["drafter", "BF16"][0] == 63
    assert groups["vision and audio", "BF16"] == (4, 4 * 48)
    stored = [t for file in release.tensors.values() for t in file.values()]
    assert release.drafter is not None
    stored += [t for file in release.drafter.tensors.values() for t in file.values()]
    assert sum(t.count for t in report.groups) == len(stored)
    assert sum(t.nbytes for t in report.groups) == sum(len(t.data) for t in stored)


def test_text_says_layout_and_reasons(tmp_path: Path) -> None:
    text = str(checkpoint.inspect(make_release(mtp=3, drafter=True).write(tmp_path)))
    for line in (
        "layers: fSS",
        "MTP: 3 blocks",
        "drafter: DFlash, 5 layers, blocks of 8",
        "layout: fused QKV, interleaved in 2 chunks; linear maps fp8; experts mxfp4",
        "1 layers of 544 rows have 6 scale rows (5 in 1, 6 in 2)",
        "MTP blocks: 3 by tensor names; num_nextn_predict_layers is absent",
        "no problems found",
    ):
        assert line in text


def test_text_of_a_split_release(tmp_path: Path) -> None:
    text = str(checkpoint.inspect(make_release(qkv="split", experts="fp8").write(tmp_path)))
    assert "split Q, K and V, K and V sharing scale blocks in 1 layers" in text
    assert "384 key and 256 value rows have 4 and 2 scale rows" in text


def test_report_without_a_usable_config(tmp_path: Path) -> None:
    folder = make_release(mtp=0).write(tmp_path)
    (folder / "config.json").write_text("{}")
    report = checkpoint.inspect(folder)
    assert report.config is None
    assert report.layout is None
    assert "1 problem" in str(report)
    assert sum(t.count for t in report.groups) > 0


def test_override_is_named(tmp_path: Path) -> None:
    folder = make_release(mtp=0).write(tmp_path)
    report = checkpoint.inspect(folder, qkv="plain")
    assert "as the caller says" in str(report)
    assert {p.kind for p in report.problems} == {"wrong shape"}
