"""What transformers' own save_pretrained wrote for its MiMoV2Flash class loads and saves."""

from pathlib import Path
from typing import Any

import golden
import ml_dtypes
import numpy as np
import pytest
from checkpoint.comparing import is_stored_qkv, read_tensors, weights_by_module
from checkpoint.release_bytes import Tensor, encode
from checkpoint.release_format import Release, make_release
from goldens import recipe

from mimo_jax import checkpoint
from mimo_jax.config import MiMoConfig

CASE = recipe.CASES["transformers_checkpoint"]
FOLDERS = {"transformers_checkpoint": np.float32, "transformers_checkpoint_single": None}


def expected_weights(dtype: Any) -> dict[str, np.ndarray]:
    """The recipe's tensors as a model holds them: q, k and v called so."""
    weights = {}
    for name, w in recipe.make_weights(CASE).items():
        if dtype is None and not name.endswith("e_score_correction_bias"):
            w = w.astype(ml_dtypes.bfloat16).astype(np.float32)
        if is_stored_qkv(name):
            name = name.replace("_proj.weight", "")
        weights[name] = w
    return weights


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_weight(folder: str) -> None:
    loaded = checkpoint.load(golden.FOLDER / folder)
    found = weights_by_module(loaded.model)
    expected = expected_weights(FOLDERS[folder])
    assert found.keys() == expected.keys()
    for name, w in expected.items():
        np.testing.assert_array_equal(found[name], w, err_msg=name)
    assert loaded.layout.qkv == "split"
    assert loaded.config.dtype == ("bfloat16" if FOLDERS[folder] is None else "float32")


@pytest.mark.parametrize("folder", FOLDERS)
def test_same_bytes_when_saved(folder: str, tmp_path: Path) -> None:
    source = golden.FOLDER / folder
    loaded = checkpoint.load(source)
    checkpoint.save(tmp_path, loaded)
    assert read_tensors(tmp_path) == read_tensors(source)
    assert checkpoint.load(tmp_path).config == loaded.config


def native(release: Release) -> None:
    """Renames to transformers' own classes: sinks, and experts stacked in two tensors a layer."""
    for name in [n for n in release.names if n.endswith("attention_sink_bias")]:
        release.rename(name, name.replace("attention_sink_bias", "sinks"))
    assert isinstance(release.config, dict)
    for layer, moe in enumerate(release.config["moe_layer_freq"]):
        if not moe:
            continue
        prefix = f"model.layers.{layer}.mlp.experts"
        parts: dict[str, list[np.ndarray]] = {}
        for p in ("gate", "up", "down"):
            names = [f"{prefix}.{e}.{p}_proj.weight" for e in range(4)]
            parts[p] = [release.weights[n] for n in names]
            for name in names:
                del release.find(name)[name]
        file = release.tensors["model.safetensors"]
        gate_up = np.concatenate([np.stack(parts["gate"]), np.stack(parts["up"])], axis=1)
        file[f"{prefix}.gate_up_proj"], _ = encode(gate_up, "BF16")
        file[f"{prefix}.down_proj"], _ = encode(np.stack(parts["down"]), "BF16")


@pytest.fixture
def native_release() -> Release:
    release = make_release(qkv="split", linear="plain", experts="plain", mtp=0, single_file=True)
    native(release)
    return release


def test_native_names(native_release: Release, tmp_path: Path) -> None:
    loaded = checkpoint.load(native_release.write(tmp_path / "in"))
    assert loaded.layout.stacked_experts
    assert loaded.layout.sink_name == "sinks"
    found = weights_by_module(loaded.model)
    for name, w in native_release.weights.items():
        if not is_stored_qkv(name):
            np.testing.assert_array_equal(found[name], w, err_msg=name)
    checkpoint.save(tmp_path / "out", loaded)
    assert read_tensors(tmp_path / "out") == native_release.tensors["model.safetensors"]
    assert checkpoint.load(tmp_path / "out").layout == loaded.layout


def test_native_names_to_hub_names(native_release: Release, tmp_path: Path) -> None:
    loaded = checkpoint.load(native_release.write(tmp_path / "in"))
    checkpoint.save(tmp_path / "out", loaded, layout=checkpoint.release_layout(loaded.config))
    hub = make_release(qkv="split", linear="plain", experts="plain", mtp=0, single_file=True)
    assert read_tensors(tmp_path / "out") == hub.tensors["model.safetensors"]


def test_bad_stacked_experts(native_release: Release, tmp_path: Path) -> None:
    """The half of a stacked tensor that another parameter reads is reported once."""
    name = "model.layers.1.mlp.experts.gate_up_proj"
    tensor: Tensor = native_release.tensors["model.safetensors"][name]
    tensor.data = b"\xff" * len(tensor.data)
    del native_release.tensors["model.safetensors"]["model.layers.1.self_attn.sinks"]
    folder = native_release.write(tmp_path)
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(folder)
    assert [p.tensor for p in caught.value.problems] == ["model.layers.1.self_attn.sinks"]
    native_release.tensors["model.safetensors"]["model.layers.1.self_attn.sinks"] = (
        native_release.tensors["model.safetensors"]["model.layers.2.self_attn.sinks"]
    )
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(native_release.write(tmp_path))
    assert [p.tensor for p in caught.value.problems] == [name]


def test_quantised_experts_have_no_stacked_form(tmp_path: Path) -> None:
    loaded = checkpoint.load(make_release(mtp=0).write(tmp_path / "in"))
    layout = checkpoint.Layout("interleaved", 2, stacked_experts=True)
    with pytest.raises(checkpoint.CheckpointError, match="which have no stacked form"):
        checkpoint.save(tmp_path / "out", loaded, layout=layout)


def test_native_config_is_the_hubs(tmp_path: Path) -> None:
    """The native config.json spells out what the hub's config of the same model says."""
    native_config = checkpoint.load(golden.FOLDER / "transformers_checkpoint").config
    hub = MiMoConfig.from_dict(CASE.config)
    assert native_config.layers == hub.layers
