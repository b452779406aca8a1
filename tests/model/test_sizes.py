"""Sizes of the full models, from `nnx.eval_shape`: the identities of MODEL_SPEC 1.1 to 5.4."""

import functools

import jax
import pytest

from mimo_jax.config import DFlashConfig, MiMoConfig, presets
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.dflash import DFlash
from mimo_jax.model.mtp import MTP
from mimo_jax.model.parameters import (
    ParamSpec,
    abstract,
    parameter_bytes,
    parameter_count,
    parameters,
)
from mimo_jax.quant import FP8Array, MXFP4Array

FLASH = ("MiMo-V2-Flash", "MiMo-V2.5", "MiMo-V2.6-Flash-RL")
PRO = ("MiMo-V2.5-Pro", "MiMo-V2.5-Pro-FP4-DFlash", "MiMo-V2.6-Pro-RL")


@functools.cache
def backbone(name: str, quantized: bool = False) -> MiMo:
    config = MiMoConfig.from_pretrained(name)
    return abstract(lambda make: MiMo(config, make), config.dtype, quantized=quantized)


@functools.cache
def mtp(name: str, quantized: bool = False) -> MTP:
    config = MiMoConfig.from_pretrained(name)
    return abstract(lambda make: MTP(config, 3, make), config.dtype, quantized=quantized)


def active_parameters(model: MiMo) -> int:
    """Weights a token meets: everything (embedding, head and router too) but unchosen experts."""
    count, config = parameter_count(model), model.config
    experts = sum(p.spec.size for _, p in parameters(model) if "experts" in p.spec.name)
    unchosen = config.n_routed_experts - config.num_experts_per_tok
    return count - experts * unchosen // config.n_routed_experts


@pytest.mark.parametrize(
    ("name", "total", "active", "mtp_block"),
    [(name, "308.78", "15.4", "0.329") for name in FLASH]
    + [(name, "1021.25", "41.9", "0.645") for name in PRO],
)
def test_parameter_counts(name, total, active, mtp_block):
    model = backbone(name)
    assert f"{parameter_count(model) / 1e9:.2f}" == total
    assert f"{active_parameters(model) / 1e9:.1f}" == active
    assert f"{parameter_count(mtp(name)) / 3e9:.3f}" == mtp_block


@pytest.mark.parametrize("name", ["MiMo-V2-Flash", "MiMo-V2.6-Pro-RL"])
def test_quantised_form_represents_the_same_weights(name):
    for build in (backbone, mtp):
        plain, quantized = build(name), build(name, quantized=True)
        assert parameter_count(quantized) == parameter_count(plain)
        for (path, p), (other, q) in zip(parameters(plain), parameters(quantized), strict=True):
            value = q.get_value()
            assert (path, p.spec) == (other, q.spec)
            assert value.shape == p.spec.shape
            expected = {"fp8": FP8Array, "mxfp4": MXFP4Array}.get(p.spec.format)
            assert expected is None or isinstance(value, expected)


@pytest.mark.parametrize(
    ("name", "layer", "rows", "scale_rows"),
    [
        ("MiMo-V2.6-Flash-RL", 0, 13568, 108),
        ("MiMo-V2.6-Flash-RL", 1, 14848, 116),
        ("MiMo-V2.5-Pro", 0, 27136, 216),
        ("MiMo-V2.5-Pro", 1, 27136, 216),
    ],
)
def test_fused_qkv_rows_and_scale_rows(name, layer, rows, scale_rows):
    codes_and_scales = backbone(name, quantized=True).layers[layer].self_attn.qkv_proj.get_value()
    chunks, chunk_rows, dim = codes_and_scales.codes.shape
    assert chunks * chunk_rows == rows
    assert codes_and_scales.scales.shape == (chunks, scale_rows // chunks, dim // 128)


def test_formats_follow_the_config():
    def formats(name: str) -> set[tuple[str, str]]:
        return {
            (p.spec.name.rsplit(".", 2)[-2], p.spec.format)
            for _, p in parameters(backbone(name))
            if p.spec.format != "plain"
        }

    linear = {(f"{p}_proj", "fp8") for p in ("qkv", "gate", "up", "down")}
    assert formats("MiMo-V2.5-Pro") == linear
    experts = {(f"{p}_proj", "mxfp4") for p in ("gate", "up", "down")}
    assert formats("MiMo-V2.5-Pro-FP4-DFlash") == linear | experts
    assert formats("casinca-tiny-mimo-v2-flash") == set()


def checkpoint_tensors(module: MiMo | MTP | DFlash) -> list[str]:
    """Names of a checkpoint's tensors (its own layout): weights, scales, one set an expert."""
    names = []
    for _, param in parameters(module):
        spec: ParamSpec = param.spec
        tensors = jax.tree.leaves(param.get_value())
        experts = range(spec.shape[0]) if "{}" in spec.name else range(1)
        for expert in experts:
            names += [f"{spec.name.format(expert)}#{part}" for part in range(len(tensors))]
    assert len(set(names)) == len(names) > 0
    return names


def test_mtp_block_has_16_tensors():
    assert len(checkpoint_tensors(mtp("MiMo-V2.6-Flash-RL", quantized=True))) == 3 * 16
    assert len(checkpoint_tensors(mtp("MiMo-V2.5-Pro", quantized=True))) == 3 * 16


def test_mtp_bytes_of_v2_5():
    """model_mtp.safetensors has 1,189,405,960 bytes, header included (MODEL_SPEC 3.2)."""
    header = 1_189_405_960 - parameter_bytes(mtp("MiMo-V2.5", quantized=True))
    assert 48 * 90 < header < 48 * 180  # name, dtype, shape and offsets of 48 tensors as JSON


def test_expert_tensors_of_v2_6_pro():
    """The index has 160,040 entries, 69 * 384 * 6 of them expert tensors (MODEL_SPEC 5.4)."""
    names = checkpoint_tensors(backbone("MiMo-V2.6-Pro-RL", quantized=True))
    assert sum("experts" in name for name in names) == 69 * 384 * 6
    assert len(names) + 48 < 160_040


@pytest.mark.parametrize(
    ("name", "published", "towers"),
    [
        # All tensors, multimodal towers included: about 0.99 B weights of them in bfloat16.
        ("MiMo-V2.6-Pro-RL", 566_048_103_928, (1.9e9, 2.3e9)),
        # A whole repository, with an audio tokenizer besides.
        ("MiMo-V2.5", 315_714_053_402, (1.9e9, 4e9)),
    ],
)
def test_bytes_leave_room_for_the_towers(name, published, towers):
    text = parameter_bytes(backbone(name, quantized=True)) + parameter_bytes(
        mtp(name, quantized=True)
    )
    assert towers[0] < published - text < towers[1]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("MiMo-V2.5-DFlash", 2_936_114_304),
        ("MiMo-V2.6-Flash-RL", 2_936_114_304),
        ("MiMo-V2.5-Pro-FP4-DFlash", 5_536_632_576),
        ("MiMo-V2.6-Pro-RL", 5_536_632_576),
    ],
)
def test_drafter_has_63_tensors_of_known_size(name, size):
    config = DFlashConfig.from_pretrained(name)
    drafter = abstract(lambda make: DFlash(config, make), config.dtype)
    assert drafter.mask_embedding.spec.name == "mask_embedding.pt"  # a file of its own
    assert parameter_bytes(drafter) - 2 * config.hidden_size == size
    assert len(checkpoint_tensors(drafter)) == 63 + 1


@pytest.mark.parametrize("name", presets())
def test_tensor_names_are_unique(name):
    checkpoint_tensors(backbone(name))
    checkpoint_tensors(mtp(name))
