"""Every storage format loads to exactly the weights it stands for."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint.comparing import assert_same_weights, dense_values, weights_by_module
from checkpoint.release_format import make_drafter, make_release
from hypothesis import assume, given
from hypothesis import strategies as st

from mimo_jax import checkpoint
from mimo_jax.checkpoint.qkv import aligned, kv_scale_rows
from mimo_jax.model.parameters import QKVRows, parameters
from mimo_jax.quant import FP8Array, MXFP4Array
from pallas_kernels.rotate_and_store.reference import split

FORMATS: dict[str, dict[str, Any]] = {
    "fused TP-interleaved FP8, MXFP4 experts": {},
    "fused TP-interleaved FP8, FP8 experts": {"experts": "fp8"},
    "fused plain FP8, MXFP4 experts": {"qkv": "plain"},
    "split FP8, K and V sharing blocks": {"qkv": "split", "experts": "fp8"},
    "split FP8, blocks of their own": {"qkv": "split_own", "experts": "fp8"},
    "split BF16": {"qkv": "split", "linear": "plain", "experts": "plain"},
    "split F32 in one file": {
        "qkv": "split",
        "linear": "plain",
        "experts": "plain",
        "plain": "F32",
        "single_file": True,
        "mtp": 0,
    },
    "fused BF16, plain": {"qkv": "plain", "linear": "plain", "experts": "plain"},
    "fused BF16, interleaved": {"linear": "plain", "experts": "plain"},
    "BF16 but for MXFP4 experts": {"linear": "plain", "experts": "mxfp4"},
    "FP8 but for BF16 experts": {"experts": "plain"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_those_stored(name: str, tmp_path: Path) -> None:
    release = make_release(**FORMATS[name])
    assert_same_weights(checkpoint.load(release.write(tmp_path)), release)


@pytest.mark.parametrize("name", FORMATS)
def test_dequantized_weights_are_those_stored(name: str, tmp_path: Path) -> None:
    release = make_release(**FORMATS[name])
    loaded = checkpoint.load(release.write(tmp_path), dequantize=True)
    dtype = np.float32 if "F32" in name else ml_dtypes.bfloat16
    assert_same_weights(loaded, release, rounded_to=dtype)
    for _, param in parameters(loaded.model):
        expected = param.spec.dtype if param.spec.name.endswith("bias") else None
        if param.spec.dtype is None or expected:
            assert param.get_value().dtype == (expected or dtype), param.spec.name
    assert loaded.config.quantization_config is None
    assert loaded.layout.linear_format == loaded.layout.expert_format == "plain"


@pytest.mark.parametrize("name", FORMATS)
def test_projections_use_the_right_rows(name: str, tmp_path: Path) -> None:
    release = make_release(**FORMATS[name])
    loaded = checkpoint.load(release.write(tmp_path), mtp=False)
    x = np.random.default_rng(1).standard_normal((1, 2, 160)).astype(np.float32)
    # At position 0 rotary embedding is the identity.
    positions = jnp.zeros((1, 2), jnp.int32)
    for i, layer in enumerate(loaded.model.layers):
        attention = layer.self_attn
        found = split(attention.projected(jnp.asarray(x)), positions, attention.heads)
        for part, got in zip("qkv", found, strict=True):
            w = release.weights[f"model.layers.{i}.self_attn.{part}"].astype(np.float64)
            expected = (x @ w.T) * (np.float32(0.707) if part == "v" else 1)
            got = np.asarray(got).reshape(expected.shape)
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * abs(expected).max())


def test_quantised_weights_stay_quantised(tmp_path: Path) -> None:
    loaded = checkpoint.load(make_release().write(tmp_path))
    kinds = {p.spec.name: type(p.get_value()) for _, p in parameters(loaded.model)}
    assert kinds["model.layers.0.self_attn.qkv_proj.weight"] is FP8Array
    assert kinds["model.layers.0.mlp.down_proj.weight"] is FP8Array
    assert kinds["model.layers.1.mlp.experts.{}.up_proj.weight"] is MXFP4Array
    assert kinds["model.layers.1.self_attn.o_proj.weight"] not in (FP8Array, MXFP4Array)


def test_nothing_is_left_of_the_files(tmp_path: Path) -> None:
    """Weights are copies: a file changed in place later does not change the model."""
    release = make_release()
    folder = release.write(tmp_path)
    loaded = checkpoint.load(folder)
    for path in folder.glob("*.safetensors"):
        with open(path, "r+b") as file:
            file.write(bytes(path.stat().st_size))
    assert_same_weights(loaded, release)


def test_dtype_casts_what_is_not_quantised(tmp_path: Path) -> None:
    release = make_release(drafter=True)
    loaded = checkpoint.load(release.write(tmp_path), dtype="float32")
    assert loaded.config.dtype == loaded.model.config.dtype == "float32"
    assert loaded.drafter is not None
    assert loaded.drafter.config.dtype == "float32"
    assert loaded.drafter.mask_embedding.get_value().dtype == jnp.float32
    values = {p.spec.name: p.get_value() for _, p in parameters(loaded.model)}
    assert values["model.layers.0.self_attn.o_proj.weight"].dtype == jnp.float32
    assert values["model.layers.1.mlp.gate.weight"].dtype == jnp.bfloat16
    assert isinstance(values["model.layers.0.self_attn.qkv_proj.weight"], FP8Array)
    assert_same_weights(loaded, release)


def test_dtype_accepts_weights_stored_otherwise(tmp_path: Path) -> None:
    release = make_release(linear="plain", experts="plain", plain="F32", mtp=1)
    assert isinstance(release.config, dict)
    release.config["dtype"] = "bfloat16"
    folder = release.write(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="wrong dtype"):
        checkpoint.load(folder)
    loaded = checkpoint.load(folder, dtype="bfloat16")
    values = dense_values(loaded.model)
    _, bias = values["model.layers.1.mlp.gate.e_score_correction_bias"]
    expected = release.weights["model.layers.1.mlp.gate.e_score_correction_bias"]
    np.testing.assert_array_equal(bias, expected)
    _, o_proj = values["model.layers.1.self_attn.o_proj.weight"]
    expected = release.weights["model.layers.1.self_attn.o_proj.weight"]
    expected = expected.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(o_proj.reshape(expected.shape), expected)


def test_config_without_dtype_takes_that_of_the_embedding(tmp_path: Path) -> None:
    release = make_release(linear="plain", experts="plain", plain="F32", mtp=0)
    assert isinstance(release.config, dict)
    del release.config["dtype"]
    assert checkpoint.load(release.write(tmp_path)).config.dtype == "float32"


def test_parts_can_be_left_out(tmp_path: Path) -> None:
    folder = make_release(drafter=True).write(tmp_path)
    whole = checkpoint.load(folder)
    assert whole.mtp is not None
    assert whole.drafter is not None
    less = checkpoint.load(folder, mtp=False, drafter=False)
    assert less.mtp is None
    assert less.drafter is None


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("files", [1, 3])
def test_drafter(prefix: str, files: int, tmp_path: Path) -> None:
    release = make_release(mtp=0)
    release.drafter = make_drafter(seed=5, prefix=prefix, files=files)
    if files == 1:
        release.drafter.metadata = None
    loaded = checkpoint.load(release.write(tmp_path))
    assert loaded.drafter is not None
    found = weights_by_module(loaded.drafter)
    expected = {n.removeprefix("model."): w for n, w in release.drafter.weights.items()}
    expected["mask_embedding.pt"] = expected.pop("mask_embedding")
    assert len(expected) == 64
    assert found.keys() == expected.keys()
    for name, w in expected.items():
        np.testing.assert_array_equal(found[name], w, err_msg=name)
    assert loaded.layout.drafter_prefix == prefix


def test_unknown_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'tp' is not one of interleaved, plain, split"):
        checkpoint.load(tmp_path, qkv="tp")
    for dtype in ("float64", "float16", np.int8):
        with pytest.raises(ValueError, match=r"is not one of bfloat16, float32"):
            checkpoint.load(tmp_path, dtype=dtype)


@st.composite
def geometries(draw: st.DrawFn) -> dict[str, Any]:
    kv = draw(st.sampled_from([1, 2, 3, 4]))
    swa_kv = kv * draw(st.sampled_from([1, 2]))
    heads = swa_kv * draw(st.sampled_from([1, 2]))
    head_dim = draw(st.sampled_from([16, 48, 64, 96, 128, 192, 256]))
    v_head_dim = draw(st.sampled_from([16, 64, 128, 192]))
    return {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": heads,
        "swa_num_attention_heads": heads,
        "num_key_value_heads": kv,
        "swa_num_key_value_heads": swa_kv,
        "head_dim": head_dim,
        "swa_head_dim": head_dim,
        "v_head_dim": v_head_dim,
        "swa_v_head_dim": v_head_dim,
        "partial_rotary_factor": 0.5,
        "moe_layer_freq": [0, 0, 0],
    }


@given(
    geometry=geometries(),
    how=st.sampled_from(["interleaved", "plain", "split", "split_own"]),
    seed=st.integers(0, 100),
)
def test_any_geometry(
    geometry: dict[str, Any], how: str, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Dense weights are right for every layout, quantised ones or a refusal with the reason."""
    chunks = geometry["num_key_value_heads"]
    rows = [
        QKVRows(
            geometry["num_attention_heads"] * geometry["head_dim"],
            kv * geometry["head_dim"],
            kv * geometry["v_head_dim"],
        )
        for kv in (chunks, geometry["swa_num_key_value_heads"])
    ]
    if how.startswith("split"):
        # Where blocks may or may not be shared with as many scale rows, nobody can tell.
        for total in rows:
            same = kv_scale_rows(total, chunks, shared=True) == kv_scale_rows(
                total, 1, shared=False
            )
            assume(aligned(total, chunks) or not same)
    release = make_release(qkv=how, experts="plain", mtp=1, seed=seed, **geometry)
    folder = release.write(tmp_path_factory.mktemp("any"))
    dense = checkpoint.load(folder, dequantize=True, dtype="float32")
    assert_same_weights(dense, release)
    # Split weights can stay quantised if their blocks do not cross the chunks of any layer.
    if how == "split" and not all(aligned(t, chunks) for t in rows):
        held = all(t.q // chunks % 128 == 0 for t in rows)
    else:
        held = any(all(aligned(t, c) for t in rows) for c in range(1, 5) if chunks % c == 0)
    if held or not how.startswith("split"):
        assert_same_weights(checkpoint.load(folder), release)
    else:
        with pytest.raises(checkpoint.CheckpointError, match="dequantize=True"):
            checkpoint.load(folder)
