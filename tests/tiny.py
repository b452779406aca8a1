"""mimo-tiny, loaded once for all tests of a process, which then share what it compiles."""

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from flax import nnx

import mimo_jax as mj
from mimo_jax import checkpoint
from mimo_jax.api import load

FOLDER = checkpoint.resolve("mimo-tiny")


OPTIMIZED = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})


def optimized() -> contextlib.AbstractContextManager[Any]:
    """Has what is jitted optimised a little: programs that run longer than that takes
    (tests/conftest.py)."""
    return mock.patch.object(jax, "jit", OPTIMIZED)


@functools.cache
def tiny() -> mj.LanguageModel:
    """The bundled model."""
    return _optimized(lambda: load("mimo-tiny"))  # tests replace mj.load


@functools.cache
def exact() -> mj.LanguageModel:
    """The bundled model in float32, where rounding decides nothing."""
    return _optimized(lambda: mj.LanguageModel(checkpoint.load(FOLDER, dtype="float32")))


def _optimized(make: Callable[[], mj.LanguageModel]) -> mj.LanguageModel:
    """A model whose decoders' programs are optimised a little, since many tests run them."""
    with optimized():
        lm = make()
        lm.decoder_for("mtp")
        lm.decoder_for("dflash")
    return lm


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
