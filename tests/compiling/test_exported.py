"""Exported programs, compiled for hardware that isn't there: the same bytes for each."""

import functools
import math

import jax
import pytest
from jax import export
from tiny import two_layers

from mimo_jax.portability.step import PLATFORMS, Step
from pallas_kernels import targets


@functools.cache
def serialized(tokens: int) -> tuple[bytes, int]:
    """A program for so many tokens, and the arrays of its cache."""
    step = Step(two_layers(dtype="float32", kernels="reference").model, 1, 256, 4000)
    return bytes(step.export(tokens, PLATFORMS).serialize()), len(step.cache())


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize(
    "hardware", [targets.HOPPER, targets.V5E, targets.TPU7X], ids=lambda h: h.name
)
def test_it_compiles_and_copies_no_cache(hardware, tokens):
    data, cached = serialized(tokens)
    program = export.deserialize(bytearray(data))
    arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in program.in_avals]
    donated = tuple(range(len(arrays) - cached, len(arrays)))
    jitted = jax.jit(program.call, donate_argnums=donated)
    # Spills are XLA's own here, in loops that it makes.
    compiled = targets.compile(hardware, jitted, *arrays, spills=True).program
    size = sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays[-cached:])
    assert compiled.memory_analysis().alias_size_in_bytes >= size
