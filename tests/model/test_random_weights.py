"""Random weights in the release's formats: the same on every mesh, and near what a model has."""

from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

import mimo_jax as mj
from mimo_jax import checkpoint
from mimo_jax.config import MiMoConfig
from mimo_jax.model.parameters import parameters
from mimo_jax.quant import FP8Array, MXFP4Array, numpy_dequantize
from sharding import memory
from sharding.mesh import make_mesh


def config() -> MiMoConfig:
    return MiMoConfig.from_pretrained(checkpoint.bundled()["mimo-tiny"])


def made(seed: int = 1, **options) -> checkpoint.Loaded:
    return checkpoint.random_weights(config(), seed, **options)


def values(loaded: checkpoint.Loaded) -> dict[str, Any]:
    return {p.spec.name: p.get_value() for _, p in parameters(loaded.model)}


def test_weights_are_held_as_the_release_holds_them():
    kinds = {name: type(value) for name, value in values(made()).items()}
    assert kinds["model.layers.1.mlp.experts.{}.down_proj.weight"] is MXFP4Array
    assert kinds["model.layers.1.self_attn.qkv_proj.weight"] is FP8Array
    assert {k for k in kinds.values() if k in (FP8Array, MXFP4Array)} == {FP8Array, MXFP4Array}
    for (_, a), (_, b) in zip(
        parameters(made().model),
        parameters(checkpoint.load(checkpoint.bundled()["mimo-tiny"]).model),
        strict=True,
    ):
        shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), p.get_value()) for p in (a, b)]
        assert shapes[0] == shapes[1], a.spec.name


def test_weights_are_of_the_size_that_weights_have():
    """Standard deviations near .02, no NaN, both signs; vectors as a new model has them."""
    for name, value in values(made()).items():
        w = numpy_dequantize(value)
        assert np.isfinite(w).all(), name
        if "norm" in name:
            assert (w == 1).all()
        elif "bias" in name:
            assert (w == 0).all()
        else:
            assert 0.015 < w.std() < 0.025, name
            assert abs(w.mean()) < 0.001, name


def test_codes_are_of_every_kind():
    """All numbers of either format occur, and the NaNs of e4m3 don't."""
    codes = values(made())["model.layers.1.self_attn.qkv_proj.weight"].codes
    assert set(np.unique(np.asarray(codes).view(np.uint8))) == set(range(256)) - {0x7F, 0xFF}
    experts = values(made())["model.layers.1.mlp.experts.{}.down_proj.weight"]
    assert set(np.unique(np.asarray(experts.codes))) == set(range(256))
    scales = np.asarray(experts.scales).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert set(np.unique(scales)) == {2.0**-8, 2.0**-7}


@pytest.mark.parametrize(
    ("mesh", "rules"), [("tensor=4", "latency"), ("data=2,expert=4", "throughput")]
)
def test_a_mesh_changes_no_weight(mesh, rules):
    on_mesh = made(mesh=make_mesh(mesh), rules=rules)
    assert on_mesh.placement is not None
    for a, b in zip(jax.tree.leaves(made().model), jax.tree.leaves(on_mesh.model), strict=True):
        assert b.sharding.mesh.size == on_mesh.placement.mesh.size
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def test_seeds_differ_and_repeat():
    name = "model.layers.1.mlp.experts.{}.gate_proj.weight"
    one, same, other = (np.asarray(values(made(seed))[name].codes) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).mean() > 0.9


def test_layers_differ():
    tensors = values(made())
    a, b = (tensors[f"model.layers.{i}.mlp.experts.{{}}.up_proj.weight"].codes for i in (1, 2))
    assert (np.asarray(a) != np.asarray(b)).mean() > 0.9


def test_what_does_not_fit_is_refused_before_anything_is_made(monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: 10 * 2**20)
    monkeypatch.setattr("mimo_jax.checkpoint.synthetic.random_release", None)
    with pytest.raises(memory.NotEnoughMemoryError, match=r"MiB of this host's memory, but 10\.0"):
        made()


def test_a_configuration_of_any_size_by_name_cut_to_its_first_layers():
    lm = mj.load("tiny-transformers-test", random_weights=3, layers=1)
    assert lm.tokenizer is None
    assert (lm.config.num_hidden_layers, lm.config.moe_layer_freq) == (1, (0,))
    assert np.isfinite(lm.logits([[1, 2, 3]])).all()
    with pytest.raises(ValueError, match="3 layers were asked for; the model has 2"):
        mj.load("tiny-transformers-test", random_weights=3, layers=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 2}, "layers= and drafters= are of models with random_weights="),
        ({"random_weights": 1, "dequantize": True}, "random_weights= reads none"),
        ({"random_weights": 1, "qkv": "plain"}, "random_weights= reads none"),
        ({"random_weights": 1, "dtype": "float16"}, "float16 is not one of bfloat16, float32"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        mj.load("mimo-tiny", **options)
