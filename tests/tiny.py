"""mimo-tiny, loaded once for all tests of a process, which then share what it compiles."""

import functools
from unittest import mock

import jax

import mimo_jax as mj
from mimo_jax import checkpoint
from mimo_jax.api import load


@functools.cache
def tiny() -> mj.LanguageModel:
    """The bundled model."""
    return load("mimo-tiny")  # tests replace mj.load


@functools.cache
def exact() -> mj.LanguageModel:
    """The bundled model in float32, where rounding decides nothing."""
    return language_model(checkpoint.load(checkpoint.resolve("mimo-tiny"), dtype="float32"))


def language_model(loaded: checkpoint.Loaded) -> mj.LanguageModel:
    """A model that is compiled without LLVM's optimiser, in half the time."""
    quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    with mock.patch.object(jax, "jit", quick):
        return mj.LanguageModel(loaded)
