"""The DFlash drafter's configuration."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mimo_jax.config.reading import (
    ConfigError,
    read_named,
    refuse,
    refuse_types,
    with_floats,
)


@dataclasses.dataclass(frozen=True)
class DFlashConfig:
    """Configuration of the DFlash drafter; names as in dflash/config.json.

    `vocab_size` is informative only: the drafter uses the backbone's embedding and head, whose
    vocabulary may be larger.  `backbone_rotary_base` is kept and not used.
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
          ConfigError: a key is missing, of the wrong type or asks for something not implemented.
        """
        refuse_types(cls, raw, objects=("dflash_config",))
        inner = dict(raw.get("dflash_config") or {})
        refuse_types(cls, inner)
        d = {**raw, **inner}
        d.setdefault("v_head_dim", d.get("head_dim"))
        d["dtype"] = d.get("dtype") or d.get("torch_dtype") or "bfloat16"
        d["sliding_window"] = d.get("sliding_window") or d.get("swa_window_size")
        kinds = set(d.get("layer_types") or ())
        refuse(
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
        config = cls(**with_floats(cls, values), extra=json.dumps(dict(raw)))
        bad = [i for i in config.target_layer_ids if not 0 <= i < config.num_target_layers]
        if bad:
            raise ConfigError(
                f"target_layer_ids {bad} are not layers of a backbone of "
                f"{config.num_target_layers} layers"
            )
        return config

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> DFlashConfig:
        """Reads a preset by name, a config.json, or `dflash/config.json` in a checkpoint folder.

        Raises:
          ConfigNotFoundError: nothing is there under that name.
          ConfigError: the file is not a usable config.
        """
        return cls.from_dict(read_named(name_or_path, suffix=".dflash"))

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

    def fitted_to(self, layers: int) -> DFlashConfig:
        """The drafter for a backbone of so many layers: it looks at as many, spread over them."""
        n = min(len(self.target_layer_ids), layers)
        ids = tuple(round(i * (layers - 1) / max(1, n - 1)) for i in range(n))
        return dataclasses.replace(self, target_layer_ids=ids, num_target_layers=layers)

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of each head that rotate."""
        return int(self.head_dim * self.partial_rotary_factor)
