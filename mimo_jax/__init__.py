"""MiMo-V2.5-Pro-UltraSpeed in JAX: the public names (DESIGN 3).

import mimo_jax as mj
lm = mj.load("mimo-tiny")
print(lm.generate("def quicksort(items):", mj.SamplingParams(max_tokens=64))[0].text)
"""

from mimo_jax.api import LanguageModel, load, save_pretrained
from mimo_jax.checkpoint import CheckpointError
from mimo_jax.config import ConfigError, DFlashConfig, LayerSpec, MiMoConfig, presets
from mimo_jax.decoding.outputs import Completion, GenerationOutput
from mimo_jax.decoding.sampling import SamplingParams
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.cache import KVCache, init_cache

__version__ = "0.1.0"

__all__ = [
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
    "init_cache",
    "load",
    "presets",
    "save_pretrained",
]
