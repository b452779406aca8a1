"""Models whose weights are packed for kernels, interpreted on CPUs."""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint.release_format import make_release
from tiny import optimized, two_layers

import mimo_jax as mj
from mimo_jax import checkpoint
from mimo_jax.model.cache import init_cache
from mimo_jax.model.packing import use_kernels
from mimo_jax.model.parameters import parameters
from mimo_jax.quant import FP8Array, MXFP4Array
from pallas_kernels import backends
from pallas_kernels.backends import BackendError
from pallas_kernels.packed import FP8Words, MXFP4Words, Packed
from sharding.mesh import use

IDS = np.arange(300, 310)[None]


@functools.cache
def loaded(kernels: str = "reference", mesh: str | None = None, rules: str = "latency"):
    with backends.interpreted(), optimized():
        return two_layers(kernels=kernels, mesh=mesh, rules=rules)


@functools.cache
def logits(kernels: str, mesh: str | None = None, rules: str = "latency") -> np.ndarray:
    with backends.interpreted():
        return np.asarray(loaded(kernels, mesh, rules).logits(IDS))


def test_every_quantised_weight_is_packed():
    lm = loaded("triton")
    held = {type(p.get_value()) for _, p in parameters(lm.model)}
    assert {FP8Words, MXFP4Words} <= held
    assert not {FP8Array, MXFP4Array} & held


def test_logits_of_kernels():
    """bfloat16 rounds differently in the two; so do two correct references (benchmarks/README)."""
    expected = logits("reference")
    error = np.linalg.norm(logits("triton") - expected) / np.linalg.norm(expected)
    assert 0 < error < 0.03


@pytest.mark.parametrize(
    ("kernels", "mesh", "rules"),
    [
        ("triton", "tensor=2", "latency"),
        ("triton", "expert=2", "throughput"),
        ("mosaic_tpu", None, "latency"),
        ("mosaic_tpu", "tensor=2", "latency"),
    ],
)
def test_logits_of_other_kernels_and_meshes(kernels, mesh, rules):
    expected = logits("triton")
    error = np.linalg.norm(logits(kernels, mesh, rules) - expected) / np.linalg.norm(expected)
    assert error < 0.03


def test_parts_that_share_blocks_of_scales():
    with pytest.raises(BackendError, match=r"down_proj.weight: its parts on the mesh share"):
        loaded("triton", "expert=2,tensor=2")


@pytest.mark.parametrize(
    ("kernels", "mesh"),
    [("triton", None), ("triton", "tensor=2"), ("triton", "expert=2"), ("mosaic_tpu", None)],
)
def test_greedy_tokens_of_kernels(kernels, mesh):
    """On meshes with a part of each expert's width, and with a half of the experts."""
    params = mj.SamplingParams(temperature=0.0, max_tokens=4)
    with backends.interpreted():
        got = loaded(kernels, mesh).generate([IDS[0].tolist()], params)[0].token_ids
    assert len(got) == 4
    expected = loaded().generate([IDS[0].tolist()], params)[0].token_ids
    assert got == expected


@pytest.mark.parametrize("mesh", [None, "tensor=2", "expert=2"])
def test_kernels_of_a_step_with_one_token(mesh):
    """What is done by kernels for one token, on each device of a mesh too."""
    lm = loaded("triton", mesh)
    with use(lm.mesh), backends.interpreted():
        one = jnp.zeros((1, 1), jnp.int32)
        cache = init_cache(lm.config, 1, 16, placement=lm.placement)
        program = str(jax.make_jaxpr(lm.model)(one, one, cache))
    names = set(re.findall(r"name=(\w+)", program))
    assert {"moe_normed_scores", "moe_up_one", "moe_down_one", "residual_matmul"} <= names
    assert not {"moe_route", "moe_scores", "moe_up"} & names


@pytest.mark.parametrize(
    ("kernels", "mesh"), [("triton", None), ("triton", "tensor=2"), ("mosaic_tpu", "tensor=2")]
)
def test_saving_packed_weights_writes_the_same_bytes(kernels, mesh, tmp_path):
    folder = make_release(intermediate_size=256).write(tmp_path / "release")
    mj.save_pretrained(mj.load(folder), tmp_path / "plain")
    with backends.interpreted():
        mj.save_pretrained(mj.load(folder, kernels=kernels, mesh=mesh), tmp_path / "packed")
    names = sorted(os.listdir(tmp_path / "plain"))
    assert sorted(os.listdir(tmp_path / "packed")) == names
    for name in names:
        plain, packed = ((tmp_path / f / name).read_bytes() for f in ("plain", "packed"))
        assert plain == packed, name


def test_packed_weights_are_not_converted(tmp_path):
    whole = checkpoint.load(checkpoint.resolve("mimo-tiny"))
    use_kernels(whole.model, ("triton", "reference"))
    with pytest.raises(checkpoint.CheckpointError, match=r'kernels="reference"'):
        checkpoint.convert(whole, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_on_a_cpu_nothing_is_packed_by_itself():
    lm = mj.load("mimo-tiny")
    assert not any(isinstance(p.get_value(), Packed) for _, p in parameters(lm.model))


def test_kernels_that_do_not_run_here():
    with pytest.raises(BackendError, match="Triton kernels need an NVIDIA GPU"):
        mj.load("mimo-tiny", kernels="triton")


def large_scale(lm) -> None:
    param = next(p for _, p in parameters(lm.model) if isinstance(p.get_value(), MXFP4Array))
    value = param.get_value()
    param.set_value(MXFP4Array(value.codes, value.scales.at[0, 0, 0].set(200)))


def test_weights_that_words_cannot_hold():
    lm = two_layers()
    large_scale(lm)
    with pytest.raises(BackendError, match=r"experts.*group scales that are too great"):
        use_kernels(lm.model, ("triton",))
    lm = two_layers()
    large_scale(lm)
    use_kernels(lm.model, ("triton", "reference"))
    held = [p.get_value() for _, p in parameters(lm.model)]
    assert sum(isinstance(v, MXFP4Array) for v in held) == 1
    assert any(isinstance(v, MXFP4Words) for v in held)


def test_float32_falls_back_or_fails():
    with backends.interpreted():
        auto = two_layers(kernels="auto", dtype="float32")
        plain = two_layers(kernels="reference", dtype="float32")
        np.testing.assert_allclose(
            auto.logits(IDS), plain.logits(IDS), atol=1e-4 * float(jnp.abs(plain.logits(IDS)).max())
        )
        explicit = two_layers(kernels="triton", dtype="float32")
        with pytest.raises(NotImplementedError, match="activations are float32"):
            explicit.logits(IDS)
