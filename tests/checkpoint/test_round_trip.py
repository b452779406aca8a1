"""Saving what was loaded gives the same names, types and bytes, and conversions are exact."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint.comparing import assert_same_weights, read_tensors, stored_tensors
from checkpoint.release_format import DRAFTER, make_drafter, make_release
from checkpoint.test_layouts import FORMATS
from flax import nnx

from mimo_jax import checkpoint
from mimo_jax.checkpoint import saving
from mimo_jax.checkpoint.torch_file import read_torch
from mimo_jax.config import DFlashConfig, MiMoConfig
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.dflash import DFlash
from mimo_jax.model.mtp import MTP
from mimo_jax.model.parameters import Make, ParamSpec, parameters
from mimo_jax.quant import FP8Array, MXFP4Array
from sharding.mesh import make_mesh, use


def index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model.safetensors.index.json").read_text())


@pytest.mark.parametrize("name", FORMATS)
def test_same_bytes(name: str, tmp_path: Path) -> None:
    release = make_release(**FORMATS[name])
    loaded = checkpoint.load(release.write(tmp_path / "in"))
    checkpoint.save(tmp_path / "out", loaded)
    assert read_tensors(tmp_path / "out") == stored_tensors(release)
    again = checkpoint.load(tmp_path / "out")
    assert again.config == loaded.config
    assert again.layout == loaded.layout


@pytest.mark.parametrize(
    ("rules", "mesh", "qkv", "inside"),
    [
        ("latency", "expert=2,tensor=2", "split", False),
        ("throughput", "data=2,expert=2,tensor=2", "interleaved", True),
    ],
)
def test_same_bytes_from_a_mesh(
    rules: str, mesh: str, qkv: str, inside: bool, tmp_path: Path
) -> None:
    """Also in the context in which such a model is computed with."""
    release, on_mesh = make_release(qkv=qkv, drafter=True), make_mesh(mesh)
    loaded = checkpoint.load(release.write(tmp_path / "in"), mesh=on_mesh, rules=rules)
    with use(on_mesh if inside else None):
        checkpoint.save(tmp_path / "out", loaded)
    assert read_tensors(tmp_path / "out") == stored_tensors(release)
    assert release.drafter is not None
    assert read_tensors(tmp_path / "out" / "dflash") == stored_tensors(release.drafter)


@pytest.mark.parametrize("name", FORMATS)
def test_config_keeps_every_key(name: str, tmp_path: Path) -> None:
    release = make_release(**FORMATS[name])
    checkpoint.save(tmp_path / "out", checkpoint.load(release.write(tmp_path / "in")))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert isinstance(release.config, dict)
    dead = {"attention_chunk_size"}
    expected = {k: v for k, v in release.config.items() if k not in dead}
    assert {k: written.get(k) for k in expected} == expected


def test_same_bytes_of_the_drafter(tmp_path: Path) -> None:
    release = make_release(mtp=0)
    release.drafter = make_drafter(seed=3, prefix="model.", files=3)
    loaded = checkpoint.load(release.write(tmp_path / "in"))
    checkpoint.save(tmp_path / "out", loaded)
    drafter = release.drafter
    assert read_tensors(tmp_path / "out" / "dflash") == stored_tensors(drafter)
    assert json.loads((tmp_path / "out" / "dflash" / "config.json").read_text()) == drafter.config
    content = read_torch(tmp_path / "out" / "dflash" / "mask_embedding.pt")
    assert drafter.mask == (content["mask_token_id"], content["embedding"].tobytes())


def test_same_bytes_in_several_shards(tmp_path: Path) -> None:
    release = make_release(drafter=True)
    loaded = checkpoint.load(release.write(tmp_path / "in"))
    checkpoint.save(tmp_path / "out", loaded, max_shard_size=200_000)
    files = sorted(p.name for p in (tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    largest = max(len(t.data) for t in stored_tensors(release).values())
    for path in (tmp_path / "out").glob("model-*.safetensors"):
        assert path.stat().st_size < max(200_000, largest) + 20_000
    assert read_tensors(tmp_path / "out") == stored_tensors(release)
    assert_same_weights(checkpoint.load(tmp_path / "out"), release)


def test_index_of_a_release(tmp_path: Path) -> None:
    release = make_release()
    checkpoint.save(tmp_path / "out", checkpoint.load(release.write(tmp_path / "in")))
    found = index(tmp_path / "out")
    total = sum(len(t.data) for t in stored_tensors(release).values())
    assert found["metadata"] == {"tp_size": 2, "save_format": "mxfp4", "total_size": total}
    assert found["weight_map"].keys() == release.names
    assert found["weight_map"]["model.mtp.layers.0.enorm.weight"] == "model_mtp.safetensors"


def test_single_dense_file_has_no_index(tmp_path: Path) -> None:
    release = make_release(qkv="split", linear="plain", experts="plain", mtp=0)
    checkpoint.save(tmp_path / "out", checkpoint.load(release.write(tmp_path / "in")))
    written = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert written == ["config.json", "model.safetensors"]


def test_an_experts_tensors_are_adjacent(tmp_path: Path) -> None:
    """5.3: down, its scale, gate, its scale, up, its scale; experts in order of their number."""
    release = make_release(mtp=0, n_routed_experts=12)
    checkpoint.save(tmp_path / "out", checkpoint.load(release.write(tmp_path / "in")))
    names = [n for n in read_tensors(tmp_path / "out") if "layers.1.mlp.experts" in n]
    prefix = "model.layers.1.mlp.experts"
    expected = [
        f"{prefix}.{e}.{p}_proj.{kind}"
        for e in range(12)
        for p in ("down", "gate", "up")
        for kind in ("weight", "weight_scale")
    ]
    assert names == expected


@pytest.mark.parametrize("experts", ["plain", "mxfp4"])
@pytest.mark.parametrize("target", ["split", "interleaved", "plain"])
@pytest.mark.parametrize("source", ["split", "interleaved", "plain"])
def test_dense_qkv_converts_to_any_layout(
    source: str, target: str, experts: str, tmp_path: Path
) -> None:
    release = make_release(qkv=source, linear="plain", experts=experts)
    loaded = checkpoint.load(release.write(tmp_path / "in"))
    checkpoint.save(tmp_path / "out", loaded, layout=target)
    expected = make_release(qkv=target, linear="plain", experts=experts)
    if "split" in (source, target):
        expected = release  # head sizes differ between the two: only the weights can be compared
    again = checkpoint.load(tmp_path / "out")
    assert again.layout.qkv == target
    assert_same_weights(again, release)
    found = {n: (t.dtype, t.shape) for n, t in read_tensors(tmp_path / "out").items()}
    if expected is not release:
        assert found == {n: (t.dtype, t.shape) for n, t in stored_tensors(expected).items()}
    fused = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fused["attention_projection_layout"] == ("split" if target == "split" else "fused_qkv")


def test_fp8_converts_between_split_and_interleaved(tmp_path: Path) -> None:
    """V2-Flash's format and that of V2.5 hold the same codes and scales for release head sizes."""
    release = make_release(qkv="split", experts="fp8")
    loaded = checkpoint.load(release.write(tmp_path / "split"))
    checkpoint.save(tmp_path / "fused", loaded, layout="interleaved")
    fused = checkpoint.load(tmp_path / "fused")
    assert fused.layout.qkv == "interleaved"
    assert_same_weights(fused, release)
    checkpoint.save(tmp_path / "again", fused, layout="split")
    assert read_tensors(tmp_path / "again") == stored_tensors(release)
    assert index(tmp_path / "again")["metadata"]["tp_size"] == 2


def test_fp8_converts_where_every_part_of_a_chunk_is_whole_blocks(tmp_path: Path) -> None:
    """Heads of 128: interleaved and plain order differ in the order of blocks only."""
    heads = {"head_dim": 128, "swa_head_dim": 128, "v_head_dim": 128, "swa_v_head_dim": 128}
    release = make_release(**heads)
    loaded = checkpoint.load(release.write(tmp_path / "interleaved"))
    checkpoint.save(tmp_path / "plain", loaded, layout="plain")
    plain = checkpoint.load(tmp_path / "plain")
    assert plain.layout.qkv == "plain"
    assert_same_weights(plain, release)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert read_tensors(tmp_path / "plain")[name] != stored_tensors(release)[name]
    checkpoint.save(tmp_path / "again", plain, layout="interleaved")
    assert read_tensors(tmp_path / "again") == stored_tensors(release)


def test_refuses_chunks_that_would_divide_heads(tmp_path: Path) -> None:
    release = make_release(linear="plain", experts="plain")
    loaded = checkpoint.load(release.write(tmp_path / "in"))
    layout = checkpoint.Layout("interleaved", 3)
    with pytest.raises(checkpoint.CheckpointError, match=r"found 3 chunks, expected one of"):
        checkpoint.save(tmp_path / "out", loaded, layout=layout)


@pytest.mark.parametrize(
    ("source", "target", "why"),
    [
        ("interleaved", "plain", "whose scale blocks would cross 1 chunks"),
        ("interleaved", "split", "where queries and keys share scale blocks"),
        ("plain", "interleaved", "whose scale blocks would cross 2 chunks"),
        ("plain", "split", "where no reader could tell that keys and values share"),
    ],
)
def test_conversions_that_would_requantise_are_refused(
    source: str, target: str, why: str, tmp_path: Path
) -> None:
    loaded = checkpoint.load(make_release(qkv=source).write(tmp_path / "in"))
    with pytest.raises(checkpoint.CheckpointError, match=why) as caught:
        checkpoint.save(tmp_path / "out", loaded, layout=target)
    assert len(caught.value.problems) == 4
    assert {p.kind for p in caught.value.problems} == {"cannot be saved exactly"}
    assert not (tmp_path / "out").exists()


def test_refuses_split_blocks_that_no_reader_could_tell_apart(tmp_path: Path) -> None:
    """One kv head of 192 rows: as many scale rows whether or not K and V share a block."""
    heads: dict[str, Any] = {
        "num_key_value_heads": 1,
        "swa_num_key_value_heads": 1,
        "num_attention_heads": 2,
        "swa_num_attention_heads": 2,
        "head_dim": 192,
        "swa_head_dim": 192,
        "v_head_dim": 128,
        "swa_v_head_dim": 128,
    }
    release = make_release(qkv="plain", mtp=0, **heads)
    loaded = checkpoint.load(release.write(tmp_path / "in"))
    with pytest.raises(checkpoint.CheckpointError, match="no reader could tell"):
        checkpoint.save(tmp_path / "out", loaded, layout="split")


def test_dequantised_weights_save_as_a_dense_checkpoint(tmp_path: Path) -> None:
    release = make_release()
    loaded = checkpoint.load(release.write(tmp_path / "in"), dequantize=True)
    checkpoint.save(tmp_path / "out", loaded)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in written
    again = checkpoint.load(tmp_path / "out")
    assert again.layout == loaded.layout
    assert_equal_parameters(loaded.model, again.model)


def test_cast_weights_save(tmp_path: Path) -> None:
    dtype = "float32"
    release = make_release(drafter=True)
    loaded = checkpoint.load(release.write(tmp_path / "in"), dtype=dtype)
    checkpoint.save(tmp_path / "out", loaded)
    again = checkpoint.load(tmp_path / "out")
    assert again.config.dtype == dtype
    assert again.drafter is not None
    assert again.drafter.config.dtype == dtype
    assert again.drafter.mask_embedding.get_value().dtype == jnp.dtype(dtype)
    assert_equal_parameters(loaded.model, again.model)


@pytest.mark.parametrize("preset", ["colibri-tiny", "tiny-transformers-test"])
def test_new_models_save_in_the_release_layout(preset: str, tmp_path: Path) -> None:
    """What a training script does: modules that come from no folder, one of them quantised."""
    quantized = preset == "colibri-tiny"
    config = dataclasses.replace(MiMoConfig.from_pretrained(preset), intermediate_size=64)
    if quantized:
        quantization = {"quant_method": "fp8", "fmt": "e4m3", "store_dtype": "mxfp4"}
        config = dataclasses.replace(config, quantization_config=json.dumps(quantization))
    drafter_config = dataclasses.replace(
        DFlashConfig.from_dict(DRAFTER),
        hidden_size=config.hidden_size,
        num_target_layers=config.num_hidden_layers,
        target_layer_ids=(0, 1),
    )
    make = new_values(np.random.default_rng(0), quantized=quantized)
    drafter = DFlash(drafter_config, make)
    layout = checkpoint.release_layout(config)
    model, mtp = MiMo(config, make), MTP(config, 2, make)
    new = checkpoint.Loaded(config, model, mtp, drafter, layout, tmp_path)
    checkpoint.save(tmp_path / "out", new)
    loaded = checkpoint.load(tmp_path / "out")
    assert loaded.layout == layout
    assert loaded.mtp is not None
    assert len(loaded.mtp.layers) == 2
    assert loaded.drafter is not None
    assert loaded.drafter.config == drafter_config
    for old, again in ((model, loaded.model), (mtp, loaded.mtp), (drafter, loaded.drafter)):
        assert_equal_parameters(old, again)


def new_values(rng: np.random.Generator, *, quantized: bool) -> Make:
    """A `Make` that draws codes and values on the host (compiling nothing)."""

    def codes(dtype: Any, shape: tuple[int, ...], most: int) -> jax.Array:
        return jnp.asarray(rng.integers(1, most, shape, np.uint8).view(dtype))

    def make(spec: ParamSpec) -> Any:
        *lead, rows, columns = spec.shape if len(spec.shape) > 1 else (1, *spec.shape)
        if quantized and spec.format == "fp8":
            blocks = (*lead, -(-rows // 128), -(-columns // 128))
            scales = jnp.asarray(rng.uniform(0.1, 1.0, blocks), jnp.float32)
            return FP8Array(codes(ml_dtypes.float8_e4m3fn, spec.shape, 0x7F), scales)
        if quantized and spec.format == "mxfp4":
            scales = codes(np.uint8, (*spec.shape[:-1], columns // 32), 0xFF)
            return MXFP4Array(codes(np.uint8, (*spec.shape[:-1], columns // 2), 0xFF), scales)
        values = rng.standard_normal(spec.shape).astype(jnp.dtype(spec.dtype or "bfloat16"))
        return jnp.asarray(values)

    return make


def assert_equal_parameters(one: nnx.Module, other: nnx.Module) -> None:
    """Same parameters, types and values."""
    for (_, a), (_, b) in zip(parameters(one), parameters(other), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a.get_value(), b.get_value())
        types = [[x.dtype for x in jax.tree.leaves(p.get_value())] for p in (a, b)]
        assert types[0] == types[1], a.spec.name


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path) -> None:
    loaded = checkpoint.load(make_release(mtp=0).write(tmp_path / "in"))
    other = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, dtype="float32"))
    with pytest.raises(checkpoint.CheckpointError, match=r"lm_head.weight: found BF16 .*F32"):
        checkpoint.save(tmp_path / "out", other)


def test_saving_over_the_same_folder(tmp_path: Path) -> None:
    release = make_release()
    checkpoint.save(tmp_path / "out", checkpoint.load(release.write(tmp_path / "in")))
    loaded = checkpoint.load(tmp_path / "out")
    checkpoint.save(tmp_path / "out", loaded)
    assert read_tensors(tmp_path / "out") == stored_tensors(release)
    assert_same_weights(loaded, release)


@pytest.mark.parametrize("there", ["model_pp0_ep0_shard0.safetensors", "dflash/x.safetensors"])
def test_refuses_to_mix_with_other_weights(there: str, tmp_path: Path) -> None:
    loaded = checkpoint.load(make_release(mtp=0).write(tmp_path / "in"))
    (tmp_path / "out" / "dflash").mkdir(parents=True)
    (tmp_path / "out" / there).write_bytes(b"")
    with pytest.raises(FileExistsError, match="save to an empty folder"):
        checkpoint.save(tmp_path / "out", loaded)
    left = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert left == [tmp_path / "out" / there]


def test_failure_leaves_no_checkpoint_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = checkpoint.load(make_release().write(tmp_path / "in"))
    real, written = saving.write_file, []

    def fail_later(*args: Any) -> None:
        if written:
            raise OSError("no space left on device")
        written.append(args)
        real(*args)

    monkeypatch.setattr(saving, "write_file", fail_later)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(tmp_path / "out", loaded)
    assert list((tmp_path / "out").iterdir()) == []


def test_killed_while_renaming_is_not_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over an older checkpoint too: from the first new file to the last it cannot be loaded."""
    first = checkpoint.load(make_release(seed=1).write(tmp_path / "in1"))
    second = checkpoint.load(make_release(seed=2).write(tmp_path / "in2"))
    checkpoint.save(tmp_path / "out", first)
    real, states = saving.os.replace, []

    def watch(source: Path, target: Path) -> None:
        try:
            checkpoint.load(tmp_path / "out")
            states.append("loads")
        except checkpoint.CheckpointError as error:
            states.append({p.file for p in error.problems})
        real(source, target)

    monkeypatch.setattr(saving.os, "replace", watch)
    checkpoint.save(tmp_path / "out", second)
    assert len(states) == 4
    assert all(isinstance(s, set) and "config.json" in s for s in states)
    monkeypatch.undo()
    assert_same_weights(checkpoint.load(tmp_path / "out"), make_release(seed=2))
