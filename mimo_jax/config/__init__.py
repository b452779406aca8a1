"""Model configurations, read from the config.json of a checkpoint (MODEL_SPEC 1).

`MiMoConfig` is the backbone, `DFlashConfig` the block-diffusion drafter that ships beside it.  Both
are frozen and hashable.  They accept the keys of the released files and, for `MiMoConfig`, what
transformers 5 writes for its `mimo_v2_flash` class, and they refuse what the model code does not
implement instead of ignoring it.
"""

from mimo_jax.config.backbone import LayerKind, LayerSpec, MiMoConfig
from mimo_jax.config.dflash import DFlashConfig
from mimo_jax.config.reading import (
    ConfigError,
    ConfigNotFoundError,
    loads_lenient,
    nearest_names,
    presets,
)

__all__ = [
    "ConfigError",
    "ConfigNotFoundError",
    "DFlashConfig",
    "LayerKind",
    "LayerSpec",
    "MiMoConfig",
    "loads_lenient",
    "nearest_names",
    "presets",
]
