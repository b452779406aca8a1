"""Deciding the order of QKV rows where shapes alone do not, and on the releases' real shapes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from checkpoint.comparing import assert_same_weights
from checkpoint.release_format import make_release

from mimo_jax import checkpoint
from mimo_jax.checkpoint.detect import detect
from mimo_jax.checkpoint.errors import Problem
from mimo_jax.checkpoint.files import TensorStore
from mimo_jax.checkpoint.layout import Layout
from mimo_jax.checkpoint.names import backbone_specs, format_of, mtp_specs, wanted_tensors
from mimo_jax.checkpoint.safetensors_file import SafetensorsFile, StoredTensor
from mimo_jax.config import MiMoConfig

# Sliding layers only: interleaved and plain order have the same shapes throughout.
UNDETECTABLE: dict[str, Any] = {"hybrid_layer_pattern": [1, 1, 1], "mtp": 1}


@pytest.mark.parametrize("how", ["interleaved", "plain"])
def test_index_decides_what_shapes_cannot(how: str, tmp_path: Path) -> None:
    release = make_release(qkv=how, **UNDETECTABLE)
    loaded = checkpoint.load(release.write(tmp_path))
    assert loaded.layout.qkv == how
    assert any("tp_size" in reason for reason in loaded.layout.reasons)
    assert_same_weights(loaded, release)


def test_releases_decide_what_nothing_else_does(tmp_path: Path) -> None:
    release = make_release(tp_size=False, **UNDETECTABLE)
    loaded = checkpoint.load(release.write(tmp_path))
    assert loaded.layout.qkv == "interleaved"
    assert any("releases interleave" in reason for reason in loaded.layout.reasons)
    assert_same_weights(loaded, release)


def test_caller_overrides_an_undetectable_order(tmp_path: Path) -> None:
    release = make_release(qkv="plain", tp_size=False, **UNDETECTABLE)
    folder = release.write(tmp_path)
    assert checkpoint.load(folder).layout.qkv == "interleaved"
    loaded = checkpoint.load(folder, qkv="plain")
    assert loaded.layout.qkv == "plain"
    assert any("as the caller says" in reason for reason in loaded.layout.reasons)
    assert_same_weights(loaded, release)


@pytest.mark.parametrize(
    ("how", "claimed", "kinds"),
    [
        ("interleaved", "plain", {"wrong shape"}),
        ("plain", "interleaved", {"wrong shape"}),
        ("interleaved", "split", {"missing tensor", "extra tensor"}),
        ("split", "interleaved", {"missing tensor", "extra tensor"}),
    ],
)
def test_impossible_override(how: str, claimed: str, kinds: set[str], tmp_path: Path) -> None:
    folder = make_release(qkv=how, mtp=0).write(tmp_path)
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(folder, qkv=claimed)
    assert {p.kind for p in caught.value.problems} == kinds


def test_dense_fused_rows_are_plain_unless_the_index_says_otherwise(tmp_path: Path) -> None:
    release = make_release(qkv="plain", linear="plain", experts="plain", tp_size=False)
    loaded = checkpoint.load(release.write(tmp_path / "plain"))
    assert loaded.layout.qkv == "plain"
    assert any("no scales" in reason for reason in loaded.layout.reasons)
    release = make_release(linear="plain", experts="plain", tp_size=False)
    folder = release.write(tmp_path / "interleaved")
    assert_same_weights(checkpoint.load(folder, qkv="interleaved"), release)


@pytest.mark.parametrize("tp_size", [3, "many", 16])
def test_meaningless_tp_size_is_remarked(tp_size: object, tmp_path: Path) -> None:
    release = make_release(mtp=0)
    release.metadata = {"tp_size": tp_size}
    loaded = checkpoint.load(release.write(tmp_path))
    assert (loaded.layout.qkv, loaded.layout.chunks) == ("interleaved", 2)
    assert any(f"tp_size {tp_size!r}" in r and "not used" in r for r in loaded.layout.reasons)


def test_tp_size_may_come_from_the_file_itself(tmp_path: Path) -> None:
    release = make_release(qkv="plain", single_file=True, **UNDETECTABLE)
    folder = release.write(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(_with_metadata(path.read_bytes(), '{"format": "pt", "tp_size": "1"}'))
    assert checkpoint.load(folder).layout.qkv == "plain"


def _with_metadata(data: bytes, metadata: str) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].decode().replace('{"format": "pt"}', metadata)
    return len(header).to_bytes(8, "little") + header.encode() + data[8 + length :]


def test_unreadably_quantised_split_matrices_can_be_dequantised(tmp_path: Path) -> None:
    """Where no chunks begin at scale blocks, the error gives the reason and the way out."""
    release = make_release(qkv="split_own", experts="plain", **SMALL_HEADS)
    folder = release.write(tmp_path)
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(folder)
    problem, *others = caught.value.problems
    assert problem.kind == "cannot stay quantised"
    assert problem.tensor == "model.layers.0.self_attn.qkv_proj.weight"
    assert problem.found == "96 query, 48 key and 32 value rows in 2 chunks"
    assert "dequantize=True" in problem.expected
    assert len(others) == 2 + 1
    assert_same_weights(checkpoint.load(folder, dequantize=True, dtype="float32"), release)


SMALL_HEADS: dict[str, Any] = {
    "head_dim": 48,
    "swa_head_dim": 48,
    "v_head_dim": 32,
    "swa_v_head_dim": 32,
}


def headers(config: MiMoConfig, layout: Layout, mtp: int) -> TensorStore:
    """The headers a full-size checkpoint of this layout would have; no bytes."""
    file = SafetensorsFile(Path("none"), "none")
    tensors = {}
    for spec in backbone_specs(config) + mtp_specs(config, mtp):
        fmt = format_of(spec, layout, frozenset())
        for name, want in wanted_tensors(spec, layout, fmt, ("BF16",)).items():
            tensors[name] = StoredTensor(name, want.dtypes[0], want.shape, 0, 0, file)
    return TensorStore(Path("none"), tensors=tensors)


def scale_rows(store: TensorStore, projection: str, layer: str) -> int:
    return store.tensors[f"model.{layer}.self_attn.{projection}.weight_scale_inv"].shape[0]


def with_few_experts(preset: str) -> MiMoConfig:
    """A released config, made quick to look through."""
    return dataclasses.replace(MiMoConfig.from_pretrained(preset), n_routed_experts=8)


def full_layers(config: MiMoConfig) -> frozenset[str]:
    return frozenset(
        f"model.layers.{s.index}.self_attn.qkv_proj.weight"
        for s in config.layers
        if s.kind == "full"
    )


@pytest.mark.parametrize(
    ("preset", "rows"),
    [
        ("MiMo-V2.5", {"layers.0": (108, 106), "layers.1": (116, 116), "mtp.layers.2": (116, 116)}),
        ("MiMo-V2.6-Flash-RL", {"layers.0": (108, 106), "layers.1": (116, 116)}),
        ("MiMo-V2.5-Pro", {"layers.0": (216, 212), "layers.1": (216, 212)}),
        ("MiMo-V2.5-Pro-FP4-DFlash", {"layers.0": (216, 212), "mtp.layers.0": (216, 212)}),
    ],
)
def test_scale_rows_of_the_releases(preset: str, rows: dict[str, tuple[int, int]]) -> None:
    """5.2: 108, 116 and 216 scale rows interleaved, 106, 116 and 212 plain; both are recognised."""
    config = with_few_experts(preset)
    chunks = config.num_key_value_heads
    formats = Layout("plain", 1, "fp8", "mxfp4" if "store_dtype" in str(config) else "fp8")
    for which, layout in enumerate(
        (
            Layout("interleaved", chunks, formats.linear_format, formats.expert_format),
            Layout("plain", 1, formats.linear_format, formats.expert_format),
        )
    ):
        store = headers(config, layout, mtp=3)
        for layer, expected in rows.items():
            assert scale_rows(store, "qkv_proj", layer) == expected[which]
        specs = backbone_specs(config) + mtp_specs(config, 3)
        found, problems = detect(store, config, specs, None)
        assert (found, problems) == (layout, [])


def test_scale_rows_of_v2_flash() -> None:
    """5.2: 8 and 4 scale rows for 768 key and 512 value rows of full layers; 12 and 8 of others."""
    config = with_few_experts("MiMo-V2-Flash")
    layout = Layout("split", 4, "fp8", "fp8", shared_kv_scales=full_layers(config))
    store = headers(config, layout, mtp=3)
    assert len(layout.shared_kv_scales) == 9
    assert [scale_rows(store, p, "layers.0") for p in ("q_proj", "k_proj", "v_proj")] == [96, 8, 4]
    assert [scale_rows(store, p, "layers.1") for p in ("q_proj", "k_proj", "v_proj")] == [96, 12, 8]
    specs = backbone_specs(config) + mtp_specs(config, 3)
    assert detect(store, config, specs, None) == (layout, [])


def test_mxfp4_needs_whole_blocks_of_columns() -> None:
    config = MiMoConfig.from_pretrained("colibri-tiny")
    layout = Layout("interleaved", 2, "fp8", "mxfp4")
    store = headers(config, layout, mtp=0)
    specs = [
        s if "{}" not in s.name else type(s)(s.name, (16, 64, 48), s.axes, format=s.format)
        for s in backbone_specs(config)
    ]
    _, problems = detect(store, config, specs, None)
    assert isinstance(problems[0], Problem)
    assert "48 columns" in problems[0].found
