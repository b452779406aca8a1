"""The backbone's configuration, and what it says of each layer."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mimo_jax.config.reading import ConfigError, read_named, refuse_types, with_floats
from mimo_jax.config.translate import (
    from_transformers,
    is_transformers_native,
    layer_pattern,
    moe_pattern,
    refuse_unsupported,
)

LayerKind = Literal["full", "sliding"]


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """Everything that distinguishes one decoder layer from another.

    Attributes:
      index: position in the stack.
      kind: "full" causal attention or "sliding" window attention.
      num_heads: query heads N.
      num_kv_heads: key/value heads K.
      head_dim: width H of queries and keys.
      v_head_dim: width V of values.
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

    `sliding_window` counts visible keys including the query's own (128 in the releases).  `extra`
    keeps keys the text model does not use (as a JSON string, so that the config stays hashable);
    they are written back by `to_dict`.
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

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> MiMoConfig:
        """Builds a config from the contents of a config.json, with the vendor's defaults.

        Raises:
          ConfigError: a required key is missing, or a value is of the wrong type or one mimo-jax
            does not implement.
        """
        refuse_types(cls, raw, objects=_OBJECTS, alone=("moe_layer_freq", "eos_token_id"))
        d = from_transformers(raw) if is_transformers_native(raw) else dict(raw)
        refuse_unsupported(d)
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
        head_dim = default("head_dim", int(d["hidden_size"]) // max(1, heads))
        swa_head_dim = default("swa_head_dim", head_dim)
        kv_heads = default("num_key_value_heads", heads)
        rope_theta = default("rope_theta", 10_000.0)
        eos = default("eos_token_id", ())
        names = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        known = names | _READ_OR_DEAD
        values = {k: v for k, v in d.items() if k in names and v is not None}
        values |= {
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "v_head_dim": default("v_head_dim", head_dim),
            "swa_num_attention_heads": default("swa_num_attention_heads", heads),
            "swa_num_key_value_heads": default("swa_num_key_value_heads", kv_heads),
            "swa_head_dim": swa_head_dim,
            "swa_v_head_dim": default("swa_v_head_dim", swa_head_dim),
            "intermediate_size": default("intermediate_size", 0),
            "hybrid_layer_pattern": layer_pattern(d, n_layers),
            "moe_layer_freq": moe_pattern(d, n_layers),
            "rope_theta": rope_theta,
            "swa_rope_theta": default("swa_rope_theta", rope_theta),
            "sliding_window": default("sliding_window", d.get("sliding_window_size")),
            "eos_token_id": (eos,) if isinstance(eos, int) else tuple(eos),
            "dtype": default("dtype", default("torch_dtype", "bfloat16")),
            "architectures": tuple(default("architectures", ("MiMoV2ForCausalLM",))),
            "quantization_config": _to_json(d.get("quantization_config")),
            "extra": _to_json({k: v for k, v in d.items() if k not in known and v is not None}),
        }
        refuse_types(cls, values)  # those that came under other names too
        try:
            config = cls(**with_floats(cls, values))
        except TypeError as error:
            raise ConfigError(f"config.json is incomplete: {error}") from error
        config._validate()
        return config

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> MiMoConfig:
        """Reads a preset by name, a config.json, or the config.json in a checkpoint folder.

        Raises:
          ConfigNotFoundError: nothing is there under that name.
          ConfigError: the file is not a usable config.
        """
        return cls.from_dict(read_named(name_or_path, suffix=""))

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

    def truncated(self, layers: int) -> MiMoConfig:
        """The config of a model that has only the first so many layers.

        Raises:
          ValueError: there are not so many.
        """
        if not 0 < layers <= self.num_hidden_layers:
            raise ValueError(
                f"{layers} layers were asked for; the model has {self.num_hidden_layers}, give "
                "a number from 1 to that"
            )
        return dataclasses.replace(
            self,
            num_hidden_layers=layers,
            hybrid_layer_pattern=self.hybrid_layer_pattern[:layers],
            moe_layer_freq=self.moe_layer_freq[:layers],
        )

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
        """Chunks in which fused QKV rows are interleaved: the releases', which is the
        number of full layers' key/value heads wherever sliding layers can follow."""
        return math.gcd(self.num_key_value_heads, self.swa_num_key_value_heads)

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


# Keys that `from_dict` reads under another name or that no model computation reads
# (MODEL_SPEC 1.1).
_READ_OR_DEAD = {
    "attention_chunk_size",
    "sliding_window_size",
    "hybrid_block_size",
    "rope_parameters",
    "torch_dtype",
}


# Keys with JSON objects.
_OBJECTS = ("quantization_config", "rope_scaling", "rope_parameters")

# Numbers that every model needs to be positive.
_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim"),
    *("swa_num_attention_heads", "swa_num_key_value_heads", "swa_head_dim", "swa_v_head_dim"),
)


def _to_json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, sort_keys=True)
