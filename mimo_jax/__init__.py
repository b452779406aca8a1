"""MiMo-V2.5-Pro-UltraSpeed in JAX: the public names (DESIGN 3).

import mimo_jax as mj
lm = mj.load("mimo-tiny")
print(lm.generate("def quicksort(items):", mj.SamplingParams(max_tokens=64))[0].text)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimo_jax.api import load, save_pretrained
    from mimo_jax.checkpoint import CheckpointError
    from mimo_jax.config import ConfigError, DFlashConfig, LayerSpec, MiMoConfig, presets
    from mimo_jax.decoding.outputs import Completion, GenerationOutput
    from mimo_jax.decoding.sampling import SamplingParams
    from mimo_jax.language_model import AcceptanceWarning, LanguageModel
    from mimo_jax.model.backbone import MiMo
    from mimo_jax.model.cache import KVCache, init_cache
    from sharding.rules import ShardingRules

__version__ = "0.1.0"

__all__ = [
    "AcceptanceWarning",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "DFlashConfig",
    "GenerationOutput",
    "KVCache",
    "LanguageModel",
    "LayerSpec",
    "MiMo",
    "MiMoConfig",
    "SamplingParams",
    "ShardingRules",
    "init_cache",
    "load",
    "presets",
    "save_pretrained",
]

# Imported when first used: JAX takes two seconds to import, which `mimo-jax --help` can do without.
_HOMES = {
    "mimo_jax.api": ("load", "save_pretrained"),
    "mimo_jax.checkpoint": ("CheckpointError",),
    "mimo_jax.config": ("ConfigError", "DFlashConfig", "LayerSpec", "MiMoConfig", "presets"),
    "mimo_jax.decoding.outputs": ("Completion", "GenerationOutput"),
    "mimo_jax.decoding.sampling": ("SamplingParams",),
    "mimo_jax.language_model": ("AcceptanceWarning", "LanguageModel"),
    "mimo_jax.model.backbone": ("MiMo",),
    "mimo_jax.model.cache": ("KVCache", "init_cache"),
    "sharding.rules": ("ShardingRules",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = (
    *("api", "checkpoint", "config", "decoding", "engine", "explore", "language_model", "model"),
    *("planning", "quant", "tokenizer"),
)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
