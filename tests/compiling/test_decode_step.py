"""Decoding steps of models with kernels, compiled: what they copy, and how much they launch."""

import re

import jax
import jax.numpy as jnp
import pytest

from mimo_jax.config import MiMoConfig
from mimo_jax.model.cache import init_cache
from mimo_jax.model.packing import abstract_packed
from pallas_kernels import targets
from pallas_kernels.backends import resolve

pytestmark = pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
PRO = MiMoConfig.from_pretrained("MiMo-V2.5-Pro-FP4-DFlash")
NOT_RUN = {"parameter", "get-tuple-element", "bitcast", "tuple", "constant"}


def compiled(hardware, layers, batch, tokens, slots=4096):
    """The program of a step of Pro's first layers, and the bytes of its cache."""
    config = PRO.truncated(layers)
    model = abstract_packed(config, resolve("auto", hardware.target))
    cache = jax.eval_shape(lambda: init_cache(config, batch, slots))
    ids = jax.ShapeDtypeStruct((batch, tokens), jnp.int32)

    def step(model, ids, positions, cache):
        logits, cache = model(ids, positions, cache)
        return jnp.argmax(logits, axis=-1), cache

    jitted = jax.jit(step, donate_argnames="cache")
    program = targets.compile(hardware, jitted, model, ids, ids, cache).program
    return program, sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache))


@pytest.mark.parametrize(
    ("hardware", "batch", "tokens"),
    [
        *[(targets.HOPPER, batch, tokens) for batch, tokens in ((1, 1), (1, 8), (16, 8))],
        *[(targets.V5P, batch, tokens) for batch, tokens in ((1, 1), (4, 8))],
        (targets.V5E, 4, 8),
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_no_cache_is_copied(hardware, batch, tokens):
    program, cache = compiled(hardware, 2, batch, tokens)
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= cache
    caches = rf"= bf16\[{batch},4096,8,\d+\]\S* (?:copy|transpose)\("
    assert not re.findall(caches, program.as_text())


def test_operations_of_a_layer():
    """Of a sliding MoE layer on a GPU with one token: what is launched, one after the other."""
    counts = []
    for layers in (2, 3):
        text = compiled(targets.HOPPER, layers, 1, 1)[0].as_text()
        kinds = re.findall(r"^ .* = (?:\(.*?\)|\S+) ([a-z-]+)\(", text[text.index("ENTRY") :], re.M)
        counts.append(sum(kind not in NOT_RUN for kind in kinds))
    assert counts[1] - counts[0] == 8
