"""Checkpoints: Hugging Face safetensors in and out, in every layout of the MiMo-V2 family."""

from mimo_jax.checkpoint.errors import CheckpointError, Problem
from mimo_jax.checkpoint.hub import ModelNotFoundError, bundled, resolve
from mimo_jax.checkpoint.layout import Layout, release_layout
from mimo_jax.checkpoint.loading import Loaded, load
from mimo_jax.checkpoint.report import Report, inspect
from mimo_jax.checkpoint.saving import save

__all__ = [
    "CheckpointError",
    "Layout",
    "Loaded",
    "ModelNotFoundError",
    "Problem",
    "Report",
    "bundled",
    "inspect",
    "load",
    "release_layout",
    "resolve",
    "save",
]
