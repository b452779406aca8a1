"""One test a trap: the loading pitfalls of MODEL_SPEC 5 and 9, numbered as there (9.x)."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoint.comparing import assert_same_weights, dense_values, weights_by_module
from checkpoint.release_format import FUSED, TOWERS, make_drafter, make_release

from mimo_jax import checkpoint
from mimo_jax.checkpoint.qkv import fused_scale_rows
from mimo_jax.model.parameters import QKVRows, parameters
from mimo_jax.quant import MXFP4Array


def test_trap_01_interleaved_qkv_is_not_q_k_v(tmp_path: Path) -> None:
    """9.1: rows are chunks a tensor-parallel rank, and scale blocks begin anew in each."""
    release = make_release()
    stored = release.find("model.layers.0.self_attn.qkv_proj.weight")
    assert stored["model.layers.0.self_attn.qkv_proj.weight_scale_inv"].shape == (6, 2)
    loaded = checkpoint.load(release.write(tmp_path))
    assert (loaded.layout.qkv, loaded.layout.chunks) == ("interleaved", 2)
    found = weights_by_module(loaded.model)
    q = release.weights["model.layers.0.self_attn.q"]
    np.testing.assert_array_equal(found["model.layers.0.self_attn.q"], q)
    fused = dense_values(loaded.model)["model.layers.0.self_attn.qkv_proj.weight"][1]
    assert not np.array_equal(fused.reshape(-1, 160)[: len(q)], q)


def test_trap_01_plain_fused_qkv_has_the_same_name(tmp_path: Path) -> None:
    """9.1: re-exports store [Q; K; V] under the same flag; 5 instead of 6 scale rows tell."""
    release = make_release(qkv="plain", tp_size=False)
    loaded = checkpoint.load(release.write(tmp_path))
    assert (loaded.layout.qkv, loaded.layout.chunks) == ("plain", 1)
    assert any("5 scale rows" in reason for reason in loaded.layout.reasons)
    assert_same_weights(loaded, release)


def test_trap_01_sliding_layers_look_the_same_in_both_orders(tmp_path: Path) -> None:
    """9.1: 116 = 116; the full layers of the same model decide for all, MTP included."""
    sliding = QKVRows(12288, 1536, 1024)
    assert fused_scale_rows(sliding, 4) == fused_scale_rows(sliding, 1) == 116
    for how in ("interleaved", "plain"):
        release = make_release(qkv=how, tp_size=False)
        loaded = checkpoint.load(release.write(tmp_path / how))
        assert loaded.layout.qkv == how
        assert_same_weights(loaded, release)


def test_trap_01_two_kv_heads_a_chunk(tmp_path: Path) -> None:
    """9.1: sliding layers have more kv heads than there are chunks; the chunk has two of each."""
    release = make_release()
    loaded = checkpoint.load(release.write(tmp_path))
    spec = loaded.model.layers[1].self_attn.qkv_proj.spec
    assert spec.shape[0] == 2
    assert spec.qkv == QKVRows(4 * 48, 2 * 48, 2 * 32)
    found = weights_by_module(loaded.model)
    for part in "kv":
        name = f"model.layers.1.self_attn.{part}"
        np.testing.assert_array_equal(found[name], release.weights[name])


def test_trap_02_split_keys_and_values_share_scale_blocks(tmp_path: Path) -> None:
    """9.2: of V2-Flash's full layers, the last key rows and first value rows share a scale."""
    release = make_release(qkv="split", experts="fp8")
    file = release.find("model.layers.0.self_attn.k_proj.weight")
    assert file["model.layers.0.self_attn.k_proj.weight_scale_inv"].shape == (4, 2)
    assert file["model.layers.0.self_attn.v_proj.weight_scale_inv"].shape == (2, 2)
    loaded = checkpoint.load(release.write(tmp_path))
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert loaded.layout.shared_kv_scales == {name}
    assert_same_weights(loaded, release)


def test_trap_03_mxfp4_scales_are_exponents(tmp_path: Path) -> None:
    """9.3: uint8 scales are powers of two and not numbers, and are called weight_scale."""
    release = make_release()
    expert = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert release.find(expert)[f"{expert}_scale"].dtype == "U8"
    loaded = checkpoint.load(release.write(tmp_path))
    values = {p.spec.name: p.get_value() for _, p in parameters(loaded.model)}
    up = values["model.layers.1.mlp.experts.{}.up_proj.weight"]
    assert isinstance(up, MXFP4Array)
    stored = np.frombuffer(release.find(expert)[f"{expert}_scale"].data, np.uint8)
    np.testing.assert_array_equal(np.asarray(up.scales[3]).reshape(-1), stored)
    found = weights_by_module(loaded.model)
    np.testing.assert_array_equal(found[expert], release.weights[expert])
    assert abs(found[expert]).max() <= 6 * 2.0 ** (0x7D - 127)


def test_trap_03_low_nibble_is_the_even_column(tmp_path: Path) -> None:
    """9.3: byte j holds column 2 j in its low and 2 j + 1 in its high nibble."""
    release = make_release()
    name = "model.layers.1.mlp.experts.0.gate_proj.weight"
    file = release.find(name)
    file[name].data = bytes([0x72]) + file[name].data[1:]
    file[f"{name}_scale"].data = bytes([127]) + file[f"{name}_scale"].data[1:]
    found = weights_by_module(checkpoint.load(release.write(tmp_path)).model)
    np.testing.assert_array_equal(found[name][0, :2], [1.0, 6.0])


def test_trap_03_scale_names_are_not_interchangeable(tmp_path: Path) -> None:
    """9.3: MXFP4 scales called weight_scale_inv are reported, not taken for multipliers."""
    release = make_release(mtp=0)
    name = "model.layers.1.mlp.experts.0.gate_proj.weight_scale"
    release.rename(name, f"{name}_inv")
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(release.write(tmp_path))
    kinds = {(p.kind, p.tensor) for p in caught.value.problems}
    assert kinds == {("missing tensor", name), ("extra tensor", f"{name}_inv")}


def test_trap_04_trailing_comma_in_the_drafters_config(tmp_path: Path) -> None:
    """9.4: V2.6-Flash's dflash/config.json is not valid JSON."""
    release = make_release(mtp=0, drafter=True)
    assert release.drafter is not None
    text = json.dumps(release.drafter.config)[:-1] + ', "use_cache": true,\n}'
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)
    release.drafter.config = text
    loaded = checkpoint.load(release.write(tmp_path))
    assert loaded.drafter is not None
    assert loaded.drafter.config.mask_token_id == 39


@pytest.mark.parametrize("said", [None, 1])
def test_trap_05_mtp_weights_without_config_key(said: int | None, tmp_path: Path) -> None:
    """9.5: num_nextn_predict_layers is missing in Pro while three blocks ship."""
    release = make_release(mtp=3)
    assert isinstance(release.config, dict)
    assert "num_nextn_predict_layers" not in release.config
    if said is not None:
        release.config["num_nextn_predict_layers"] = said
    loaded = checkpoint.load(release.write(tmp_path))
    assert loaded.mtp is not None
    assert len(loaded.mtp.layers) == 3
    assert len([n for n in release.names if n.startswith("model.mtp.layers.0.")]) == 16
    assert_same_weights(loaded, release)


def test_trap_05_mtp_qkv_follows_the_sliding_rule(tmp_path: Path) -> None:
    """3.2: MTP blocks have sliding attention, in the chunks of the model's full layers."""
    loaded = checkpoint.load(make_release().write(tmp_path))
    assert loaded.mtp is not None
    spec = loaded.mtp.layers[0].self_attn.qkv_proj.spec
    assert (spec.shape[0], spec.qkv) == (2, QKVRows(192, 96, 64))


def test_trap_06_dangling_ignored_layer(tmp_path: Path) -> None:
    """9.6: model.decoder.self_attn.o_proj exempts nothing that exists, and o_proj stays dense."""
    release = make_release()
    assert isinstance(release.config, dict)
    assert (
        "model.decoder.self_attn.o_proj" in release.config["quantization_config"]["ignored_layers"]
    )
    loaded = checkpoint.load(release.write(tmp_path))
    assert loaded.model.layers[0].self_attn.o_proj.get_value().dtype == ml_dtypes.bfloat16
    assert loaded.mtp is not None
    assert loaded.mtp.layers[0].self_attn.o_proj.get_value().dtype == ml_dtypes.bfloat16
    assert_same_weights(loaded, release)


def test_trap_19_mask_embedding_is_loaded(tmp_path: Path) -> None:
    """9.19: the vector is in a file of its own; without it a drafter repeats one token."""
    release = make_release(mtp=0, drafter=True)
    assert release.drafter is not None
    folder = release.write(tmp_path)
    loaded = checkpoint.load(folder)
    assert loaded.drafter is not None
    found = np.asarray(loaded.drafter.mask_embedding.get_value()).astype(np.float32)
    np.testing.assert_array_equal(found, release.drafter.weights["mask_embedding"])
    (folder / "dflash" / "mask_embedding.pt").unlink()
    with pytest.raises(
        checkpoint.CheckpointError, match=r"missing file: .*dflash/mask_embedding.pt"
    ):
        checkpoint.load(folder)


def test_trap_19_mask_embedding_of_another_token(tmp_path: Path) -> None:
    """4.2.5: the file says which token it stands for; the config must agree."""
    release = make_release(mtp=0, drafter=True)
    assert release.drafter is not None
    assert release.drafter.mask is not None
    release.drafter.mask = (38, release.drafter.mask[1])
    with pytest.raises(checkpoint.CheckpointError, match=r"found mask_token_id 38, expected.* 39"):
        checkpoint.load(release.write(tmp_path))


def test_trap_20_all_63_drafter_tensors(tmp_path: Path) -> None:
    """4.2.9: the shipped code takes 58 of 63 tensors; a missing sink is an error here."""
    release = make_release(mtp=0, drafter=True)
    assert release.drafter is not None
    assert len(release.drafter.names) == 63
    name = "layers.4.self_attn.attention_sink_bias"
    del release.drafter.find(name)[name]
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(release.write(tmp_path))
    assert [(p.kind, p.tensor) for p in caught.value.problems] == [("missing tensor", name)]


def test_trap_21_drafter_vocabulary_may_differ(tmp_path: Path) -> None:
    """9.21: the Pro drafter's config says 152064 where the backbone has 152576."""
    release = make_release(mtp=0, drafter=True)
    loaded = checkpoint.load(release.write(tmp_path))
    assert loaded.drafter is not None
    assert loaded.drafter.config.vocab_size == 32 != loaded.config.vocab_size == FUSED["vocab_size"]


def test_trap_26_drafter_of_another_backbone(tmp_path: Path) -> None:
    """9.26: where sizes show that drafter and backbone do not belong together, it is said."""
    release = make_release(mtp=0)
    release.drafter = make_drafter()
    assert isinstance(release.drafter.config, dict)
    release.drafter.config["num_target_layers"] = 48
    with pytest.raises(checkpoint.CheckpointError, match="num_target_layers 48, expected 3"):
        checkpoint.load(release.write(tmp_path))


def test_trap_multimodal_towers_are_skipped_and_counted(tmp_path: Path) -> None:
    """5.1: vision and audio tensors are extra, and not an error; nothing else is."""
    release = make_release(towers=True)
    folder = release.write(tmp_path)
    assert_same_weights(checkpoint.load(folder), release)
    assert checkpoint.inspect(folder).skipped == len(TOWERS)


def test_trap_towers_need_not_be_there(tmp_path: Path) -> None:
    """A shard with nothing but towers may be absent: the text model has no use for it."""
    release = make_release(towers=True)
    shard = release.tensors["model_pp0_ep1_shard0.safetensors"]
    release.tensors["model_pp0_ep0_shard1.safetensors"] = {n: shard.pop(n) for n in TOWERS}
    folder = release.write(tmp_path)
    (folder / "model_pp0_ep0_shard1.safetensors").unlink()
    assert_same_weights(checkpoint.load(folder), release)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_trap_router_is_stored_in_either_type(dtype: str, tmp_path: Path) -> None:
    """5.1: gate weights are F32 on V2-Flash and BF16 on V2.6; both stay as stored."""
    release = make_release(mtp=0)
    for layer in (1, 2):
        name = f"model.layers.{layer}.mlp.gate.weight"
        tensor = release.find(name)[name]
        if dtype == "F32":
            tensor.dtype = dtype
            tensor.data = release.weights[name].tobytes()
    loaded = checkpoint.load(release.write(tmp_path))
    expected = {"BF16": ml_dtypes.bfloat16, "F32": np.float32}[dtype]
    values = {p.spec.name: p.get_value() for _, p in parameters(loaded.model)}
    assert values["model.layers.1.mlp.gate.weight"].dtype == expected
    assert_same_weights(loaded, release)


def test_trap_config_that_does_not_announce_mxfp4(tmp_path: Path) -> None:
    """What the tensors are counts; the config in memory then says so, and inspect the reason."""
    release = make_release(mtp=0)
    assert isinstance(release.config, dict)
    del release.config["quantization_config"]["store_dtype"]
    loaded = checkpoint.load(release.write(tmp_path))
    assert_same_weights(loaded, release)
    assert '"store_dtype": "mxfp4"' in str(loaded.config.quantization_config)
    assert any("save_format" in reason for reason in loaded.layout.reasons)


def test_trap_config_that_announces_too_much(tmp_path: Path) -> None:
    """A dense re-export with the quantised model's config.json is still read as what it is."""
    release = make_release(linear="plain", experts="plain", mtp=0)
    assert isinstance(release.config, dict)
    release.config["quantization_config"] = {"quant_method": "fp8", "store_dtype": "mxfp4"}
    loaded = checkpoint.load(release.write(tmp_path))
    assert_same_weights(loaded, release)
    assert loaded.config.quantization_config is None
    assert any("although mxfp4 is announced" in reason for reason in loaded.layout.reasons)
