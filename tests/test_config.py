import dataclasses
import json
from importlib import resources
from pathlib import Path

import pytest
from configs import MINIMAL
from goldens import recipe

from mimo_jax.config import (
    ConfigError,
    DFlashConfig,
    LayerSpec,
    MiMoConfig,
    loads_lenient,
    nearest_names,
    presets,
)

FOLDER = Path(str(resources.files("mimo_jax") / "presets"))
FLASH = ("MiMo-V2-Flash", "MiMo-V2.5", "MiMo-V2.6-Flash-RL")
PRO = ("MiMo-V2.5-Pro", "MiMo-V2.5-Pro-FP4-DFlash", "MiMo-V2.6-Pro-RL")
TINY = ("casinca-tiny-mimo-v2-flash", "colibri-tiny", "tiny-transformers-test")

# Keys of a config.json that no computation reads, or that say again what another key says.
NOT_KEPT = {"attention_chunk_size", "rope_parameters", "torch_dtype"}

HYBRID = {**MINIMAL, "hybrid_layer_pattern": [0, 1, 1, 0], "sliding_window": 8}
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def raw_preset(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


# -- presets -------------------------------------------------------------------------------------


def test_presets_are_the_published_models():
    assert presets() == tuple(sorted((*FLASH, *PRO, *TINY)))


@pytest.mark.parametrize("name", presets())
def test_preset_keeps_every_key_it_was_read_from(name):
    raw, config = raw_preset(name), MiMoConfig.from_pretrained(name)
    written = config.to_dict()
    for key, value in raw.items():
        if value is not None and key not in NOT_KEPT:
            assert written[key] == value, key


@pytest.mark.parametrize("name", presets())
def test_preset_round_trips(name):
    config = MiMoConfig.from_pretrained(name)
    again = MiMoConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.extra == config.extra
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize("name", FLASH)
def test_flash_pattern(name):
    config = MiMoConfig.from_pretrained(name)
    assert config.pattern == "fSSSSFSSSSSFSSSSSFSSSSSFSSSSSFSSSSSFSSSSSFSSSSSF"
    full = [i for i, sliding in enumerate(config.hybrid_layer_pattern) if not sliding]
    assert full == [0, 5, 11, 17, 23, 29, 35, 41, 47]
    assert config.moe_layer_freq == (0,) + (1,) * 47


@pytest.mark.parametrize("name", PRO)
def test_pro_pattern(name):
    config = MiMoConfig.from_pretrained(name)
    assert config.pattern == (
        "fSSSSSSFSSSSSSSFSSSSSSSFSSSSSSSFSSSSSSSFSSSSSSSFSSSSSSSFSSSSSSFSSSSSSF"
    )
    full = [i for i, sliding in enumerate(config.hybrid_layer_pattern) if not sliding]
    assert full == [0, 7, 15, 23, 31, 39, 47, 55, 62, 69]
    assert config.moe_layer_freq == (0,) + (1,) * 69


def test_trap_9_full_layers_are_not_every_sixth():
    pattern = MiMoConfig.from_pretrained("MiMo-V2-Flash").hybrid_layer_pattern
    assert pattern == tuple(int(not (i == 0 or (i + 1) % 6 == 0)) for i in range(48))
    assert pattern != tuple(int(i % 6 != 0) for i in range(48))


def test_layer_specs_of_flash():
    layers = MiMoConfig.from_pretrained("MiMo-V2-Flash").layers
    full = LayerSpec(
        index=0,
        kind="full",
        num_heads=64,
        num_kv_heads=4,
        head_dim=192,
        v_head_dim=128,
        rotary_dim=64,
        rope_theta=5e6,
        window=None,
        sink=False,
        moe=False,
    )
    sliding = dataclasses.replace(
        full,
        index=1,
        kind="sliding",
        num_kv_heads=8,
        rope_theta=1e4,
        window=128,
        sink=True,
        moe=True,
    )
    assert layers[0] == full
    assert layers[1] == sliding
    assert layers[5] == dataclasses.replace(full, index=5, moe=True)


def test_layer_specs_of_pro():
    config = MiMoConfig.from_pretrained("MiMo-V2.5-Pro")
    full, sliding = config.layers[7], config.layers[8]
    assert (full.num_heads, full.num_kv_heads, full.rope_theta) == (128, 8, 1e7)
    assert (sliding.num_heads, sliding.num_kv_heads, sliding.rope_theta) == (128, 8, 1e4)
    assert (config.attention_value_scale, config.qkv_chunks) == (0.612, 8)


def test_configs_are_hashable_and_frozen():
    for config in (
        MiMoConfig.from_pretrained("MiMo-V2.5-Pro"),
        DFlashConfig.from_pretrained("MiMo-V2.5-Pro-FP4-DFlash"),
    ):
        assert {config: 1}[dataclasses.replace(config)] == 1
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.hidden_size = 1  # type: ignore[misc]


# -- defaults for missing keys (MODEL_SPEC 1.1) ---------------------------------------------------

DEFAULTS = {
    "no pattern: all full": (MINIMAL, "hybrid_layer_pattern", (0, 0, 0, 0)),
    "a block size: full where (i + 1) mod b is 0": (
        {**MINIMAL, "hybrid_block_size": 3, "sliding_window": 8},
        "hybrid_layer_pattern",
        (1, 1, 0, 1),
    ),
    "a pattern wins over a block size": (
        {**HYBRID, "hybrid_block_size": 3},
        "hybrid_layer_pattern",
        (0, 1, 1, 0),
    ),
    "no MoE frequency: all dense": (MINIMAL, "moe_layer_freq", (0, 0, 0, 0)),
    "an integer MoE frequency is a period": (
        {**MINIMAL, **EXPERTS, "moe_layer_freq": 3},
        "moe_layer_freq",
        (1, 0, 0, 1),
    ),
    "no projection layout: split": (MINIMAL, "attention_projection_layout", "split"),
    "no value scale": (MINIMAL, "attention_value_scale", None),
    "value scale null": ({**MINIMAL, "attention_value_scale": None}, "attention_value_scale", None),
    "norm_topk_prob: true": (MINIMAL, "norm_topk_prob", True),
    "norm_topk_prob null: true": ({**MINIMAL, "norm_topk_prob": None}, "norm_topk_prob", True),
    "routed_scaling_factor null": (
        {**MINIMAL, "routed_scaling_factor": None},
        "routed_scaling_factor",
        None,
    ),
    "swa_rope_theta: rope_theta": ({**MINIMAL, "rope_theta": 5e6}, "swa_rope_theta", 5e6),
    "swa_v_head_dim: swa_head_dim, not v_head_dim": (
        {**MINIMAL, "v_head_dim": 8, "swa_head_dim": 24},
        "swa_v_head_dim",
        24,
    ),
    "head_dim: hidden / heads": (MINIMAL, "head_dim", 16),
    "swa_head_dim: head_dim": ({**MINIMAL, "head_dim": 20}, "swa_head_dim", 20),
    "v_head_dim: head_dim": ({**MINIMAL, "head_dim": 20}, "v_head_dim", 20),
    "kv heads: heads": (MINIMAL, "num_key_value_heads", 4),
    "swa kv heads: kv heads": (
        {**MINIMAL, "num_key_value_heads": 2},
        "swa_num_key_value_heads",
        2,
    ),
    "swa heads: heads": (MINIMAL, "swa_num_attention_heads", 4),
    "rope_parameters override rope_theta": (
        {**MINIMAL, "rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e7}},
        "rope_theta",
        1e7,
    ),
    "rope_parameters override the rotary factor": (
        {
            **MINIMAL,
            "partial_rotary_factor": 1.0,
            "rope_parameters": {"partial_rotary_factor": 0.5},
        },
        "partial_rotary_factor",
        0.5,
    ),
    "sliding_window_size stands in for sliding_window": (
        {**MINIMAL, "sliding_window_size": 8},
        "sliding_window",
        8,
    ),
    "one eos id": ({**MINIMAL, "eos_token_id": 7}, "eos_token_id", (7,)),
    "several eos ids": ({**MINIMAL, "eos_token_id": [7, 8]}, "eos_token_id", (7, 8)),
    "no eos id": (MINIMAL, "eos_token_id", ()),
    "torch_dtype stands in for dtype": ({**MINIMAL, "torch_dtype": "float32"}, "dtype", "float32"),
    "dtype: bfloat16": (MINIMAL, "dtype", "bfloat16"),
    "no model_type": (MINIMAL, "model_type", "mimo_v2"),
}


@pytest.mark.parametrize(("raw", "key", "expected"), DEFAULTS.values(), ids=DEFAULTS)
def test_default(raw, key, expected):
    config = MiMoConfig.from_dict(raw)
    assert getattr(config, key) == expected
    assert MiMoConfig.from_dict(config.to_dict()) == config


def test_trap_5_mtp_layers_may_ship_without_their_key():
    assert MiMoConfig.from_pretrained("MiMo-V2.6-Pro-RL").num_nextn_predict_layers is None
    assert MiMoConfig.from_pretrained("MiMo-V2.6-Flash-RL").num_nextn_predict_layers == 3


def test_trap_6_dangling_ignored_layer_is_accepted_and_kept():
    config = MiMoConfig.from_pretrained("MiMo-V2.6-Flash-RL")
    ignored = config.to_dict()["quantization_config"]["ignored_layers"]
    assert "model.decoder.self_attn.o_proj" in ignored


def test_trap_10_attention_chunk_size_has_no_effect():
    plain = MiMoConfig.from_dict(HYBRID)
    chunked = MiMoConfig.from_dict({**HYBRID, "attention_chunk_size": 4})
    assert chunked == plain
    assert "attention_chunk_size" not in chunked.to_dict()


def test_unknown_keys_are_written_back():
    config = MiMoConfig.from_dict({**MINIMAL, "vision_model_type": "mimovl", "a_list": [1, {}]})
    assert config.to_dict()["vision_model_type"] == "mimovl"
    assert config.to_dict()["a_list"] == [1, {}]


# -- refusals -------------------------------------------------------------------------------------

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
REFUSED = [
    ({"model_type": "qwen3"}, ["model_type", "'qwen3'"]),
    ({"scoring_func": "softmax"}, ["scoring_func", "'softmax'", "'sigmoid'"]),
    ({"topk_method": "greedy"}, ["topk_method", "'greedy'", "'noaux_tc'"]),
    ({"n_group": 2}, ["n_group", "2"]),
    ({"topk_group": 4}, ["topk_group", "4"]),
    ({"n_shared_experts": 1}, ["n_shared_experts", "1"]),
    ({"attention_bias": True}, ["attention_bias", "True"]),
    ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
    ({"tie_word_embeddings": True}, ["tie_word_embeddings", "True"]),
    ({"attention_projection_layout": "kv"}, ["attention_projection_layout", "'kv'"]),
    ({"dtype": "int8"}, ["dtype", "'int8'"]),
    ({"rope_scaling": {"type": "yarn"}}, ["rope_scaling", "'yarn'"]),
    ({"rope_parameters": {"rope_type": "llama3"}}, ["rope_parameters", "'llama3'"]),
    ({"quantization_config": {}}, ["quant_method", "None", "'fp8'"]),
    ({"quantization_config": {"quant_method": "gptq"}}, ["quant_method", "'gptq'"]),
    ({"quantization_config": {**FP8, "fmt": "e5m2"}}, ["fmt", "'e5m2'"]),
    ({"quantization_config": {**FP8, "store_dtype": "nvfp4"}}, ["store_dtype", "'nvfp4'"]),
    ({"quantization_config": {**FP8, "mxfp4_block_size": 16}}, ["mxfp4_block_size", "16"]),
    (
        {"quantization_config": {**FP8, "weight_block_size": [64, 128]}},
        ["weight_block_size", "[64, 128]"],
    ),
    ({"hybrid_layer_pattern": [0, 1]}, ["hybrid_layer_pattern", "2", "num_hidden_layers=4"]),
    ({"moe_layer_freq": [0, 1, 1]}, ["moe_layer_freq", "3", "num_hidden_layers=4"]),
    ({"moe_layer_freq": 0}, ["moe_layer_freq=0"]),
    ({"num_key_value_heads": 3}, ["layer 0", "num_key_value_heads=3", "num_attention_heads=4"]),
    (
        {"num_key_value_heads": 4, "swa_num_key_value_heads": 3},
        ["layer 1", "swa_num_key_value_heads=3", "swa_num_attention_heads=4"],
    ),
    ({"num_key_value_heads": 0}, ["num_key_value_heads=0"]),
    ({"hidden_size": -64, "head_dim": 16}, ["hidden_size=-64"]),
    ({"partial_rotary_factor": 0.7}, ["partial_rotary_factor", "= 11 ", "odd"]),
    ({"partial_rotary_factor": 2.0}, ["partial_rotary_factor", "= 32 ", "head_dim=16"]),
    ({"sliding_window": None}, ["layer 1", "sliding_window=None"]),
    ({"sliding_window": 0}, ["layer 1", "sliding_window=0"]),
    ({"moe_layer_freq": 1}, ["n_routed_experts=0", "num_experts_per_tok=0"]),
    (
        {**EXPERTS, "moe_layer_freq": 1, "num_experts_per_tok": 9},
        ["n_routed_experts=8", "num_experts_per_tok=9"],
    ),
    ({"intermediate_size": None}, ["layer 0", "intermediate_size"]),
]


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=lambda v: str(v)[:60])
def test_refusal_names_key_and_value(change, words):
    MiMoConfig.from_dict(HYBRID)
    with pytest.raises(ConfigError) as error:
        MiMoConfig.from_dict({**HYBRID, **change})
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_missing_required_key(key):
    with pytest.raises(ConfigError, match=f"no '{key}'"):
        MiMoConfig.from_dict({k: v for k, v in MINIMAL.items() if k != key})


# -- reading --------------------------------------------------------------------------------------


def test_reads_folder_file_and_preset(tmp_path):
    config = MiMoConfig.from_pretrained("mimo-v2-flash")
    assert MiMoConfig.from_pretrained("XiaomiMiMo/MiMo-V2-Flash") == config
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert MiMoConfig.from_pretrained(path) == config
    assert MiMoConfig.from_pretrained(str(tmp_path)) == config


def test_mistyped_name_gets_the_nearest():
    with pytest.raises(ConfigError, match=r"'MiMo-V2.5-Por'.*did you mean 'MiMo-V2.5-Pro'"):
        MiMoConfig.from_pretrained("MiMo-V2.5-Por")
    with pytest.raises(ConfigError, match=r"did you mean 'MiMo-V2\.6-Flash-RL'"):
        DFlashConfig.from_pretrained("MiMo-V2.6-Flash")
    assert nearest_names("zzz", ["alpha", "beta"]) == "known names: alpha, beta"


def test_folder_without_config(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        MiMoConfig.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"dflash.config\.json does not exist"):
        DFlashConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{", '{"a": 1,,}', ""])
def test_broken_json_names_the_file(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json: not valid JSON"):
        MiMoConfig.from_pretrained(path)


def test_json_that_is_no_object_names_the_file(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"config\.json.*object"):
        MiMoConfig.from_pretrained(tmp_path)


def test_lenient_json_leaves_strings_alone():
    assert loads_lenient('{"a": "x,]\\",}", "b": [1, 2,\n],}') == {"a": 'x,]",}', "b": [1, 2]}


# -- what transformers writes ---------------------------------------------------------------------


NATIVE_FOLDER = Path(recipe.__file__).parent / "transformers_checkpoint"
NATIVE = json.loads((NATIVE_FOLDER / "config.json").read_text())


def test_transformers_native_config():
    native = MiMoConfig.from_pretrained(NATIVE_FOLDER)
    hub = MiMoConfig.from_dict(recipe.CASES["transformers_checkpoint"].config)
    assert native.layers == hub.layers
    written_alike = {"dtype", "routed_scaling_factor"}  # the native class writes 1.0 for null
    for field in dataclasses.fields(MiMoConfig):
        if field.compare and field.name not in written_alike:
            assert getattr(native, field.name) == getattr(hub, field.name), field.name
    assert MiMoConfig.from_dict(native.to_dict()) == native


def test_transformers_window_counts_the_query_and_defaults_to_129():
    missing = {k: v for k, v in NATIVE.items() if k != "sliding_window"}
    assert MiMoConfig.from_dict(missing).sliding_window == 129


@pytest.mark.parametrize(
    "full",
    [
        {**NATIVE["rope_parameters"]["full_attention"], "partial_rotary_factor": 0.5},
        {**NATIVE["rope_parameters"]["full_attention"], "rope_type": "yarn"},
    ],
)
def test_transformers_rope_refusals(full):
    rope = {**NATIVE["rope_parameters"], "full_attention": full}
    with pytest.raises(ConfigError, match="rope_parameters"):
        MiMoConfig.from_dict({**NATIVE, "rope_parameters": rope})


@pytest.mark.parametrize("key", ["num_key_value_heads", "v_head_dim"])
def test_transformers_config_without_a_key(key):
    with pytest.raises(ConfigError, match=key):
        MiMoConfig.from_dict({k: v for k, v in NATIVE.items() if k != key})
