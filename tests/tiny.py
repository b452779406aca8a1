"""mimo-tiny, loaded once for all tests of a process, which then share what it compiles."""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

from flax import nnx

import mimo_jax as mj
from mimo_jax import checkpoint
from mimo_jax.api import load

FOLDER = checkpoint.resolve("mimo-tiny")


@functools.cache
def tiny() -> mj.LanguageModel:
    """The bundled model."""
    return load("mimo-tiny")  # tests replace mj.load


@functools.cache
def exact() -> mj.LanguageModel:
    """The bundled model in float32, where rounding decides nothing."""
    return mj.LanguageModel(checkpoint.load(FOLDER, dtype="float32"))


def two_layers(**options: Any) -> mj.LanguageModel:
    """Its first layers only, full and dense, sliding and MoE: the others are like these.

    Args:
      options: of `mj.load`.
    """
    whole = checkpoint.load(FOLDER)
    whole.model.layers = nnx.List(whole.model.layers[:2])
    cut = dataclasses.replace(whole, config=whole.config.truncated(2), drafter=None)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(folder, cut)
        checkpoint.copy_tokenizer(FOLDER, Path(folder))
        return load(folder, **options)
