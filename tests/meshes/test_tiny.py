"""mimo-tiny from its checkpoint on a mesh: quantised, fused QKV in two chunks, narrow experts."""

import functools

import jax
import numpy as np
import pytest
from tiny import two_layers

import mimo_jax as mj

IDS = np.random.default_rng(0).integers(0, 4000, (3, 40))
PROMPTS = ["import os\n\n\ndef main():\n", "class A:\n"]
PARAMS = [
    mj.SamplingParams(max_tokens=20, temperature=0.0),
    mj.SamplingParams(max_tokens=20, temperature=0.8, top_p=0.9, seed=3),
]


@functools.cache
def on_one_device() -> mj.LanguageModel:
    return two_layers(dtype="float32")


@pytest.mark.parametrize(
    ("mesh", "rules"),
    [
        ("tensor=8", "latency"),  # attention whole: four KV heads in groups of two
        ("data=2,expert=2,tensor=2", "throughput"),  # three rows of logits on four parts of a batch
    ],
)
def test_mimo_tiny_gives_what_it_gives_on_one_device(mesh, rules):
    """Logits of full sequences, greedy and sampled tokens, in float32, of two layers."""
    lm = two_layers(dtype="float32", mesh=mesh, rules=rules)
    assert lm.mesh is not None
    held = jax.tree.leaves(lm.model.layers[1].mlp.down_proj.get_value())
    assert all(len({s.index for s in a.addressable_shards}) > 1 for a in held)
    expected = np.asarray(on_one_device().logits(IDS))
    got = np.asarray(lm.logits(IDS))
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    tokens, on_mesh = (
        [o.token_ids for o in m.generate(PROMPTS, PARAMS)] for m in (on_one_device(), lm)
    )
    assert on_mesh == tokens
