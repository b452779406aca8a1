"""Checkpoints: Hugging Face safetensors in and out, in every layout of the MiMo-V2 family."""

from mimo_jax.checkpoint.building import Loaded
from mimo_jax.checkpoint.converted import convert
from mimo_jax.checkpoint.errors import CheckpointError, Problem
from mimo_jax.checkpoint.files import copy_tokenizer
from mimo_jax.checkpoint.hub import ModelNotFoundError, bundled, resolve
from mimo_jax.checkpoint.layout import Layout, release_layout
from mimo_jax.checkpoint.loading import load
from mimo_jax.checkpoint.progress import progress_bar
from mimo_jax.checkpoint.report import Report, inspect
from mimo_jax.checkpoint.saving import save
from mimo_jax.checkpoint.streaming import Progress
from mimo_jax.checkpoint.synthetic import random_weights

__all__ = [
    "CheckpointError",
    "Layout",
    "Loaded",
    "ModelNotFoundError",
    "Problem",
    "Progress",
    "Report",
    "bundled",
    "convert",
    "copy_tokenizer",
    "inspect",
    "load",
    "progress_bar",
    "random_weights",
    "release_layout",
    "resolve",
    "save",
]
