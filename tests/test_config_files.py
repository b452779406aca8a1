"""config.json as it may be found: of wrong types, broken, or not there."""

import json
from pathlib import Path

import pytest
from configs import MINIMAL

from mimo_jax.config import ConfigError, ConfigNotFoundError, DFlashConfig, MiMoConfig

DRAFTER = DFlashConfig.from_pretrained("MiMo-V2.5-Pro-FP4-DFlash").to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": "many"}, 'vocab_size is "many"; it must be a whole number'),
        ({"vocab_size": True}, "vocab_size is true; it must be a whole number"),
        ({"num_hidden_layers": []}, r"num_hidden_layers is \[\]; it must be a whole number"),
        ({"hidden_size": 6.5}, "hidden_size is 6.5; it must be a whole number"),
        ({"rope_theta": "x"}, 'rope_theta is "x"; it must be a number'),
        ({"add_swa_attention_sink_bias": 1}, "add_swa_attention_sink_bias is 1; it must be true"),
        ({"architectures": "MiMo"}, 'architectures is "MiMo"; it must be a list of strings'),
        ({"eos_token_id": "x"}, 'eos_token_id is "x"; it must be a list of numbers'),
        ({"hybrid_layer_pattern": 3}, "hybrid_layer_pattern is 3; it must be a list of numbers"),
        ({"moe_layer_freq": ["a"]}, r'moe_layer_freq is \["a"\]; it must be a list of numbers'),
        ({"quantization_config": "fp8"}, 'quantization_config is "fp8"; it must be an object'),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]; it must be an object"),
        ({"rope_parameters": {"rope_theta": "x"}}, 'rope_theta is "x"; it must be a number'),
        ({"sliding_window_size": "3"}, 'sliding_window is "3"; it must be a whole number'),
        ({"torch_dtype": 4}, "dtype is 4; it must be a string"),
        ({"hybrid_block_size": "3"}, "hybrid_block_size='3' must be a positive number of layers"),
        ({"layer_types": 3}, "layer_types=3 must be a list of names, one a layer"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be a positive number"),
    ],
)
def test_values_of_wrong_types_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        MiMoConfig.from_dict({**MINIMAL, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dflash_config": [1]}, r"dflash_config is \[1\]; it must be an object"),
        ({"target_layer_ids": 3}, "target_layer_ids is 3; it must be a list of numbers"),
        ({"hidden_size": "wide"}, 'hidden_size is "wide"; it must be a whole number'),
    ],
)
def test_a_drafters_values_of_wrong_types_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        DFlashConfig.from_dict({**DRAFTER, **change})


def test_a_long_value_is_not_shown_whole():
    with pytest.raises(ConfigError) as caught:
        MiMoConfig.from_dict({**MINIMAL, "vocab_size": "x" * 10_000})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", ["", "MiMo-V9", "~nobody-here/x", "a" * 5000, "a\0b"])
def test_what_is_not_there_is_told_from_what_is_broken(name):
    for kind in (MiMoConfig, DFlashConfig):
        with pytest.raises(ConfigNotFoundError, match="no preset, config"):
            kind.from_pretrained(name)


def test_a_model_without_a_drafter_is_not_called_unknown():
    with pytest.raises(ConfigNotFoundError, match=r"MiMo-V2-Flash has no drafter; those of MiMo-"):
        DFlashConfig.from_pretrained("MiMo-V2-Flash")


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(MINIMAL))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert MiMoConfig.from_pretrained("~") == MiMoConfig.from_dict(MINIMAL)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000])
def test_broken_files_are_named(content: bytes, tmp_path: Path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json: ") as caught:
        MiMoConfig.from_pretrained(tmp_path)
    assert not isinstance(caught.value, ConfigNotFoundError)
