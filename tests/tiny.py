"""mimo-tiny, loaded once for all tests of a process, which then share what it compiles."""

import functools

import mimo_jax as mj
from mimo_jax.api import load


@functools.cache
def tiny() -> mj.LanguageModel:
    """The bundled model."""
    return load("mimo-tiny")  # tests replace mj.load
