"""Model configurations, read from the config.json of a checkpoint (MODEL_SPEC 1).

`MiMoConfig` is the backbone, `DFlashConfig` the block-diffusion drafter that ships beside it.  Both
are frozen and hashable.  They accept the keys of the released files and, for `MiMoConfig`, what
transformers 5 writes for its `mimo_v2_flash` class, and they refuse what the model code does not
implement instead of ignoring it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

LayerKind = Literal["full", "sliding"]


class ConfigError(ValueError):
    """A config.json is broken, incomplete, or asks for something mimo-jax does not implement."""


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """Everything that distinguishes one decoder layer from another.

    Attributes:
      index: position in the stack.
      kind: "full" causal attention or "sliding" window attention.
      num_heads, num_kv_heads: query heads N and key/value heads K.
      head_dim, v_head_dim: width H of queries and keys, width V of values.
      rotary_dim: leading dimensions of each head that rotate.
      rope_theta: rotary base.
      window: keys visible to a query, itself included; None for full attention.
      sink: whether each head has a learned sink logit.
      moe: mixture of experts (True) or dense feed-forward (False).
    """

    index: int
    kind: LayerKind
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    rotary_dim: int
    rope_theta: float
    window: int | None
    sink: bool
    moe: bool


@dataclasses.dataclass(frozen=True)
class MiMoConfig:
    """Configuration of the MiMo-V2 backbone; field names are those of the released config.json.

    `sliding_window` counts visible keys including the query's own (128 in the releases,
    MODEL_SPEC 2.8).  `extra` keeps keys the text model does not use (as a JSON string, so that the
    config stays hashable); they are written back by `to_dict`.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    v_head_dim: int
    swa_num_attention_heads: int
    swa_num_key_value_heads: int
    swa_head_dim: int
    swa_v_head_dim: int
    intermediate_size: int
    hybrid_layer_pattern: tuple[int, ...]
    moe_layer_freq: tuple[int, ...]
    moe_intermediate_size: int = 0
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    norm_topk_prob: bool = True
    routed_scaling_factor: float | None = None
    partial_rotary_factor: float = 1.0
    rope_theta: float = 10_000.0
    swa_rope_theta: float = 10_000.0
    sliding_window: int | None = None
    add_swa_attention_sink_bias: bool = False
    add_full_attention_sink_bias: bool = False
    attention_value_scale: float | None = None
    attention_projection_layout: Literal["split", "fused_qkv"] = "split"
    layernorm_epsilon: float = 1e-5
    max_position_embeddings: int = 32_768
    num_nextn_predict_layers: int | None = None
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dtype: str = "bfloat16"
    moe_router_dtype: str | None = None
    quantization_config: str | None = None
    architectures: tuple[str, ...] = ("MiMoV2ForCausalLM",)
    model_type: str = "mimo_v2"
    extra: str = dataclasses.field(default="{}", compare=False, repr=False)

    # -- construction ---------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> MiMoConfig:
        """Builds a config from the contents of a config.json, with the vendor's defaults.

        Raises:
          ConfigError: a required key is missing, or a value is one mimo-jax does not implement.
        """
        d = _from_transformers(raw) if _is_transformers_native(raw) else dict(raw)
        _refuse_unsupported(d)
        for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            if d.get(key) is None:
                raise ConfigError(f"config.json has no {key!r}, which every MiMo model needs")
        n_layers, heads = int(d["num_hidden_layers"]), int(d["num_attention_heads"])

        def default(key: str, fallback: Any) -> Any:
            return fallback if d.get(key) is None else d[key]

        rope = d.get("rope_parameters") or {}
        for key in ("rope_theta", "partial_rotary_factor"):
            if rope.get(key) is not None:
                d[key] = rope[key]
        head_dim = default("head_dim", int(d["hidden_size"]) // heads)
        swa_head_dim = default("swa_head_dim", head_dim)
        kv_heads = default("num_key_value_heads", heads)
        rope_theta = default("rope_theta", 10_000.0)
        eos = default("eos_token_id", ())
        known = {f.name for f in dataclasses.fields(cls)} | _DEAD_KEYS
        values: dict[str, Any] = {
            k: d[k] for k in known if k in d and d[k] is not None and k not in _DEAD_KEYS
        }
        values |= {
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "v_head_dim": default("v_head_dim", head_dim),
            "swa_num_attention_heads": default("swa_num_attention_heads", heads),
            "swa_num_key_value_heads": default("swa_num_key_value_heads", kv_heads),
            "swa_head_dim": swa_head_dim,
            "swa_v_head_dim": default("swa_v_head_dim", swa_head_dim),
            "intermediate_size": default("intermediate_size", 0),
            "hybrid_layer_pattern": _layer_pattern(d, n_layers),
            "moe_layer_freq": _moe_pattern(d, n_layers),
            "rope_theta": rope_theta,
            "swa_rope_theta": default("swa_rope_theta", rope_theta),
            "sliding_window": default("sliding_window", d.get("sliding_window_size")),
            "eos_token_id": (eos,) if isinstance(eos, int) else tuple(eos),
            "dtype": default("dtype", default("torch_dtype", "bfloat16")),
            "architectures": tuple(default("architectures", ("MiMoV2ForCausalLM",))),
            "quantization_config": _to_json(d.get("quantization_config")),
            "extra": _to_json({k: v for k, v in d.items() if k not in known and v is not None})
            or "{}",
        }
        try:
            config = cls(**_with_floats(cls, values))
        except TypeError as error:
            raise ConfigError(f"config.json is incomplete: {error}") from error
        config._validate()
        return config

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> MiMoConfig:
        """Reads a preset by name, a config.json, or the config.json in a checkpoint folder.

        Raises:
          ConfigError: nothing is there under that name, or the file is not a usable config.
        """
        return cls.from_dict(_read_named(name_or_path, suffix=""))

    def to_dict(self) -> dict[str, Any]:
        """The config as released files spell it; `from_dict(to_dict())` gives an equal config."""
        d: dict[str, Any] = json.loads(self.extra)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "extra" and value is not None:
                d[field.name] = list(value) if isinstance(value, tuple) else value
        if self.quantization_config is not None:
            d["quantization_config"] = json.loads(self.quantization_config)
        if len(self.eos_token_id) < 2:
            d["eos_token_id"] = self.eos_token_id[0] if self.eos_token_id else None
        d["attention_value_scale"] = self.attention_value_scale
        d["sliding_window_size"] = self.sliding_window
        return d

    # -- derived --------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """One `LayerSpec` a decoder layer."""
        return tuple(
            self.layer_spec(i, "sliding" if sliding else "full", moe=bool(moe))
            for i, (sliding, moe) in enumerate(
                zip(self.hybrid_layer_pattern, self.moe_layer_freq, strict=True)
            )
        )

    def layer_spec(self, index: int, kind: LayerKind, *, moe: bool) -> LayerSpec:
        """The spec of a layer of the given kind (MTP blocks are sliding, dense layers)."""
        sliding = kind == "sliding"
        head_dim = self.swa_head_dim if sliding else self.head_dim
        return LayerSpec(
            index=index,
            kind=kind,
            num_heads=self.swa_num_attention_heads if sliding else self.num_attention_heads,
            num_kv_heads=self.swa_num_key_value_heads if sliding else self.num_key_value_heads,
            head_dim=head_dim,
            v_head_dim=self.swa_v_head_dim if sliding else self.v_head_dim,
            rotary_dim=int(head_dim * self.partial_rotary_factor),
            rope_theta=self.swa_rope_theta if sliding else self.rope_theta,
            window=self.sliding_window if sliding else None,
            sink=(
                self.add_swa_attention_sink_bias if sliding else self.add_full_attention_sink_bias
            ),
            moe=moe,
        )

    @property
    def pattern(self) -> str:
        """One letter a layer: F full or S sliding attention; lower case where the MLP is dense."""
        letters = "".join("S" if s.kind == "sliding" else "F" for s in self.layers)
        return "".join(c if s.moe else c.lower() for c, s in zip(letters, self.layers, strict=True))

    @property
    def qkv_chunks(self) -> int:
        """Chunks in which the releases interleave fused QKV rows (MODEL_SPEC 5.2, quirk B)."""
        return self.num_key_value_heads

    def _validate(self) -> None:
        for key in _SIZES:
            if getattr(self, key) <= 0:
                raise ConfigError(f"{key}={getattr(self, key)} must be a positive number")
        if self.num_hidden_layers != len(self.hybrid_layer_pattern):
            raise ConfigError(
                f"hybrid_layer_pattern has {len(self.hybrid_layer_pattern)} entries for "
                f"num_hidden_layers={self.num_hidden_layers}; give one entry a layer"
            )
        if self.num_hidden_layers != len(self.moe_layer_freq):
            raise ConfigError(
                f"moe_layer_freq has {len(self.moe_layer_freq)} entries for "
                f"num_hidden_layers={self.num_hidden_layers}; give one entry a layer"
            )
        for spec in self.layers:
            where = f"layer {spec.index} ({spec.kind} attention)"
            swa = "swa_" if spec.kind == "sliding" else ""
            if spec.num_heads % spec.num_kv_heads:
                raise ConfigError(
                    f"{where}: {swa}num_attention_heads={spec.num_heads} query heads cannot share "
                    f"{swa}num_key_value_heads={spec.num_kv_heads} evenly"
                )
            if spec.rotary_dim % 2 or not 0 <= spec.rotary_dim <= spec.head_dim:
                raise ConfigError(
                    f"{where}: int({swa}head_dim * partial_rotary_factor) = {spec.rotary_dim} is "
                    f"odd or outside 0..{swa}head_dim={spec.head_dim}; rotary embedding turns "
                    "pairs of a head's dimensions"
                )
            if spec.kind == "sliding" and not (spec.window and spec.window > 0):
                raise ConfigError(
                    f"{where}: sliding_window={spec.window} must be a positive number of keys"
                )
            if spec.moe and not (
                0 < self.num_experts_per_tok <= self.n_routed_experts and self.moe_intermediate_size
            ):
                raise ConfigError(
                    f"{where} is a mixture of experts, but n_routed_experts="
                    f"{self.n_routed_experts}, num_experts_per_tok={self.num_experts_per_tok}, "
                    f"moe_intermediate_size={self.moe_intermediate_size}"
                )
            if not spec.moe and not self.intermediate_size:
                raise ConfigError(f"{where} is dense, but intermediate_size is missing")


@dataclasses.dataclass(frozen=True)
class DFlashConfig:
    """Configuration of the DFlash drafter (MODEL_SPEC 1.2); names as in dflash/config.json.

    `vocab_size` is informative only: the drafter uses the backbone's embedding and head, whose
    vocabulary may be larger (MODEL_SPEC 4.2.7).  `backbone_rotary_base` is kept and not used.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    v_head_dim: int
    partial_rotary_factor: float
    rope_theta: float
    block_size: int
    sliding_window: int
    target_layer_ids: tuple[int, ...]
    mask_token_id: int
    num_target_layers: int
    attention_value_scale: float | None = None
    attention_sink_bias: bool = False
    rms_norm_eps: float = 1e-6
    vocab_size: int | None = None
    max_position_embeddings: int = 262_144
    backbone_rotary_base: float | None = None
    dtype: str = "bfloat16"
    extra: str = dataclasses.field(default="{}", compare=False, repr=False)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> DFlashConfig:
        """Builds a config from the contents of a dflash/config.json.

        Raises:
          ConfigError: a key is missing or asks for something not implemented.
        """
        inner = dict(raw.get("dflash_config") or {})
        d = {**raw, **inner}
        d.setdefault("v_head_dim", d.get("head_dim"))
        d["dtype"] = d.get("dtype") or d.get("torch_dtype") or "bfloat16"
        d["sliding_window"] = d.get("sliding_window") or d.get("swa_window_size")
        kinds = set(d.get("layer_types") or ())
        _refuse(
            d,
            "the DFlash drafter",
            hidden_act=("silu", None),
            attention_bias=(False, None),
            tie_word_embeddings=(False, None),
            is_causal=(False, None),
            use_swa=(True, None),
            use_sliding_window=(True, None),
            rope_scaling=(None,),
        )
        if kinds - {"sliding_attention"}:
            raise ConfigError(f"the DFlash drafter has only sliding layers, found {sorted(kinds)}")
        names = [f for f in dataclasses.fields(cls) if f.name != "extra"]
        missing = [
            f.name for f in names if f.default is dataclasses.MISSING and d.get(f.name) is None
        ]
        if missing:
            raise ConfigError(f"dflash config.json has no {', '.join(missing)}")
        values = {f.name: d[f.name] for f in names if d.get(f.name) is not None}
        values["target_layer_ids"] = tuple(values["target_layer_ids"])
        config = cls(**_with_floats(cls, values), extra=json.dumps(dict(raw)))
        bad = [i for i in config.target_layer_ids if not 0 <= i < config.num_target_layers]
        if bad:
            raise ConfigError(
                f"target_layer_ids {bad} are not layers of a backbone of "
                f"{config.num_target_layers} layers"
            )
        return config

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> DFlashConfig:
        """Reads a preset by name, a config.json, or `dflash/config.json` in a checkpoint folder."""
        return cls.from_dict(_read_named(name_or_path, suffix=".dflash"))

    def to_dict(self) -> dict[str, Any]:
        """The config with its keys where they were read, some of them inside `dflash_config`."""
        d: dict[str, Any] = json.loads(self.extra)
        places = (d, d.get("dflash_config") or {})
        aliases = {"dtype": "torch_dtype", "sliding_window": "swa_window_size"}
        for field in dataclasses.fields(self):
            if field.name == "extra":
                continue
            value = getattr(self, field.name)
            value = list(value) if isinstance(value, tuple) else value
            names = (field.name, aliases.get(field.name, field.name))
            found = [(place, name) for place in places for name in names if name in place]
            for place, name in found or ([] if value is None else [(d, field.name)]):
                place[name] = value
        return d

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of each head that rotate."""
        return int(self.head_dim * self.partial_rotary_factor)


def presets() -> tuple[str, ...]:
    """Names of the bundled backbone configurations, for `MiMoConfig.from_pretrained`."""
    return tuple(sorted(n for n in _preset_files() if not n.endswith(".dflash")))


def nearest_names(name: str, known: Sequence[str]) -> str:
    """A sentence that suggests the known names closest to a mistyped one."""
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=3, cutoff=0.4)
    if close:
        return "did you mean " + " or ".join(repr(by_lower[c]) for c in close) + "?"
    return "known names: " + ", ".join(known)


def loads_lenient(text: str) -> Any:
    """JSON with trailing commas allowed: a released dflash/config.json has one (MODEL_SPEC 9.4).

    Raises:
      ConfigError: the text is not JSON even so.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    strings_or_commas = re.compile(r'("(?:[^"\\]|\\.)*")|,(\s*[}\]])')
    try:
        return json.loads(strings_or_commas.sub(lambda m: m[1] or m[2], text))
    except json.JSONDecodeError as error:
        raise ConfigError(f"not valid JSON: {error}") from error


# Keys that some released files carry and no model computation reads (MODEL_SPEC 1.1).
_DEAD_KEYS = {
    "attention_chunk_size",
    "sliding_window_size",
    "hybrid_block_size",
    "rope_parameters",
    "torch_dtype",
    "extra",
}


# Numbers that every model needs to be positive.
_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim"),
    *("swa_num_attention_heads", "swa_num_key_value_heads", "swa_head_dim", "swa_v_head_dim"),
)


def _is_transformers_native(raw: Mapping[str, Any]) -> bool:
    return "layer_types" in raw and "hybrid_layer_pattern" not in raw


def _from_transformers(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Translates what transformers 5's MiMoV2FlashConfig saves to the released spelling.

    That class has twice as many key/value heads in sliding layers and always a sink there, and its
    `sliding_window` counts the query itself.
    """
    for key in ("num_key_value_heads", "v_head_dim"):
        if raw.get(key) is None:
            raise ConfigError(
                f"config.json has layer_types but no {key!r}: transformers writes both"
            )
    d = dict(raw)
    d["hybrid_layer_pattern"] = [int(t == "sliding_attention") for t in d.pop("layer_types")]
    mlp = d.pop("mlp_layer_types", None) or ["dense"] + ["sparse"] * (len(raw["layer_types"]) - 1)
    d["moe_layer_freq"] = [int(t == "sparse") for t in mlp]
    rope = d.pop("rope_parameters", None) or {}
    full, sliding = rope.get("full_attention", {}), rope.get("sliding_attention", {})
    factors = {r.get("partial_rotary_factor", 0.334) for r in (full, sliding)}
    kinds = {r.get("rope_type", "default") for r in (full, sliding)}
    if len(factors) > 1 or kinds != {"default"}:
        raise ConfigError(f"rope_parameters {rope} need one rotary width and rope_type 'default'")
    d["partial_rotary_factor"] = factors.pop()
    d["rope_theta"] = full.get("rope_theta", 5_000_000.0)
    d["swa_rope_theta"] = sliding.get("rope_theta", 10_000.0)
    d["layernorm_epsilon"] = d.pop("rms_norm_eps", 1e-5)
    d["swa_num_key_value_heads"] = 2 * d["num_key_value_heads"]
    d["swa_v_head_dim"] = d["v_head_dim"]
    d["add_swa_attention_sink_bias"] = True
    d.setdefault("sliding_window", 129)
    return d


def _refuse(d: Mapping[str, Any], what: str, **allowed: tuple[Any, ...]) -> None:
    for key, values in allowed.items():
        if d.get(key) not in values:
            supported = " or ".join(repr(v) for v in values if v is not None) or "none"
            raise ConfigError(
                f"{what}: {key}={d.get(key)!r} is not supported (supported: {supported})"
            )


def _refuse_unsupported(d: Mapping[str, Any]) -> None:
    if d.get("model_type") not in ("mimo_v2", "mimo_v2_flash", "", None):
        raise ConfigError(
            f"model_type {d['model_type']!r} is not a MiMo-V2 model (mimo_v2, mimo_v2_flash)"
        )
    _refuse(
        d,
        "the MiMo-V2 backbone",
        scoring_func=("sigmoid", None),
        topk_method=("noaux_tc", None),
        n_group=(1, None),
        topk_group=(1, None),
        n_shared_experts=(0, None),
        attention_bias=(False, None),
        hidden_act=("silu", None),
        tie_word_embeddings=(False, None),
        attention_projection_layout=("split", "fused_qkv", None),
        dtype=("bfloat16", "float32", "float16", None),
    )
    for key in ("rope_scaling", "rope_parameters"):
        scaling = d.get(key) or {}
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        if kind != "default":
            raise ConfigError(f"{key} of type {kind!r} is not supported; MiMo-V2 uses none")
    quant = d.get("quantization_config")
    if quant is not None:
        _refuse(
            quant,
            "quantization_config",
            quant_method=("fp8",),
            fmt=("e4m3", None),
            store_dtype=("mxfp4", None),
            mxfp4_block_size=(32, None),
        )
        if list(quant.get("weight_block_size") or [128, 128]) != [128, 128]:
            raise ConfigError(
                f"quantization_config: weight_block_size={quant['weight_block_size']} is not "
                "supported (supported: [128, 128])"
            )


def _layer_pattern(d: Mapping[str, Any], n_layers: int) -> tuple[int, ...]:
    if d.get("hybrid_layer_pattern") is not None:
        return tuple(int(bool(x)) for x in d["hybrid_layer_pattern"])
    period = d.get("hybrid_block_size")
    if not period:
        return (0,) * n_layers
    return tuple(int((i + 1) % period != 0) for i in range(n_layers))


def _moe_pattern(d: Mapping[str, Any], n_layers: int) -> tuple[int, ...]:
    freq = d.get("moe_layer_freq")
    if freq is None:
        return (0,) * n_layers
    if isinstance(freq, int):
        if freq < 1:
            raise ConfigError(f"moe_layer_freq={freq} must be a positive period or a list")
        return tuple(int(i % freq == 0) for i in range(n_layers))
    return tuple(int(bool(x)) for x in freq)


def _with_floats(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with those of float fields as floats: JSON files write 10000 for 1e4."""
    floats = {f.name for f in dataclasses.fields(cls) if "float" in str(f.type)}
    return {k: float(v) if k in floats and isinstance(v, int) else v for k, v in values.items()}


def _to_json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, sort_keys=True)


def _preset_files() -> dict[str, Any]:
    folder = resources.files("mimo_jax") / "presets"
    return {f.name.removesuffix(".json"): f for f in folder.iterdir() if f.name.endswith(".json")}


def _read_named(name_or_path: str | Path, *, suffix: str) -> dict[str, Any]:
    """The JSON behind a path or preset name; `suffix` tells backbone from drafter presets."""
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "dflash" / "config.json" if suffix else path / "config.json"
        if not path.is_file():
            raise ConfigError(f"{path} does not exist; is {path.parent} a checkpoint folder?")
    if path.is_file():
        try:
            raw = loads_lenient(path.read_text(encoding="utf-8"))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: a JSON object was expected, found a {type(raw).__name__}")
        return raw
    known = {n.removesuffix(suffix): f for n, f in _preset_files().items() if n.endswith(suffix)}
    if not suffix:
        known = {n: f for n, f in known.items() if not n.endswith(".dflash")}
    by_lower = {n.lower(): f for n, f in known.items()}
    wanted = str(name_or_path).removeprefix("XiaomiMiMo/").lower()
    if wanted in by_lower:
        return loads_lenient(by_lower[wanted].read_text(encoding="utf-8"))
    raise ConfigError(
        f"no preset, config.json or checkpoint folder called {str(name_or_path)!r}; "
        + nearest_names(wanted, sorted(known))
    )
