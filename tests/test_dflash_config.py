import dataclasses
import json
from importlib import resources
from pathlib import Path

import pytest

from mimo_jax.config import ConfigError, DFlashConfig

FOLDER = Path(str(resources.files("mimo_jax") / "presets"))
DRAFTERS = (
    "MiMo-V2.5-DFlash",
    "MiMo-V2.5-Pro-FP4-DFlash",
    "MiMo-V2.6-Flash-RL",
    "MiMo-V2.6-Pro-RL",
)


def raw_preset(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.dflash.json").read_text())


def test_presets_are_the_published_drafters():
    assert {f.name.removesuffix(".dflash.json") for f in FOLDER.glob("*.dflash.json")} == set(
        DRAFTERS
    )


@pytest.mark.parametrize("name", DRAFTERS)
def test_preset_round_trips(name):
    config = DFlashConfig.from_pretrained(name)
    assert config.to_dict() == raw_preset(name)
    assert DFlashConfig.from_dict(config.to_dict()) == config


def test_trap_4_trailing_comma_in_the_drafter_config(tmp_path):
    text = json.dumps(raw_preset("MiMo-V2.6-Flash-RL"), indent=1)
    released = text.removesuffix("\n}") + ",\n}"
    with pytest.raises(json.JSONDecodeError):
        json.loads(released)
    (tmp_path / "dflash").mkdir()
    (tmp_path / "dflash" / "config.json").write_text(released)
    expected = DFlashConfig.from_pretrained("MiMo-V2.6-Flash-RL")
    assert DFlashConfig.from_pretrained(tmp_path) == expected


def test_drafter_of_pro():
    config = DFlashConfig.from_pretrained("MiMo-V2.5-Pro-FP4-DFlash")
    assert config.target_layer_ids == (0, 15, 31, 47, 69)
    assert (config.mask_token_id, config.block_size, config.sliding_window) == (151669, 8, 1024)
    assert (config.rotary_dim, config.rope_theta) == (64, 1e4)
    assert (config.attention_value_scale, config.attention_sink_bias) == (0.612, True)
    assert config.backbone_rotary_base == 5e6
    assert config.vocab_size == 152064


def test_drafter_of_flash_scales_values_as_pro_does():
    config = DFlashConfig.from_pretrained("MiMo-V2.6-Flash-RL")
    assert config.attention_value_scale == 0.612
    assert config.target_layer_ids == (0, 11, 23, 35, 47)
    assert config.backbone_rotary_base is None


DRAFTER = raw_preset("MiMo-V2.5-DFlash")
REFUSED = [
    ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'"]),
    ({"attention_bias": True}, ["attention_bias", "True"]),
    ({"tie_word_embeddings": True}, ["tie_word_embeddings", "True"]),
    ({"is_causal": True}, ["is_causal", "True"]),
    ({"use_sliding_window": False}, ["use_sliding_window", "False"]),
    ({"rope_scaling": {"type": "yarn"}}, ["rope_scaling", "yarn"]),
    ({"layer_types": ["full_attention"] * 5}, ["full_attention"]),
    ({"dflash_config": {**DRAFTER["dflash_config"], "use_swa": False}}, ["use_swa", "False"]),
    (
        {"dflash_config": {**DRAFTER["dflash_config"], "target_layer_ids": [0, 48]}},
        ["target_layer_ids", "48"],
    ),
    ({"hidden_size": None, "rope_theta": None}, ["hidden_size", "rope_theta"]),
    ({"dflash_config": None}, ["target_layer_ids", "mask_token_id"]),
]


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=lambda v: str(v)[:60])
def test_refusal_names_key_and_value(change, words):
    with pytest.raises(ConfigError) as error:
        DFlashConfig.from_dict({**DRAFTER, **change})
    for word in words:
        assert word in str(error.value)


def test_changed_config_round_trips():
    config = DFlashConfig.from_pretrained("MiMo-V2.5-DFlash")
    for changed in (
        dataclasses.replace(config, block_size=4, sliding_window=64, dtype="float32"),
        dataclasses.replace(config, block_size=4, extra="{}"),
    ):
        assert DFlashConfig.from_dict(json.loads(json.dumps(changed.to_dict()))) == changed
