"""Drafters are trained as they are run, and what is saved of them is a drafter of the backbone."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import drafter_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import train_drafter
from drafter_forward import (
    Seen,
    block_rows,
    context_rings,
    decoding_rows,
    in_groups,
    mtp_loss,
    observe,
    sample_anchors,
    summary,
)
from drafter_forward import Scores, dflash_loss

import mimo_jax as mj
from mimo_jax import checkpoint
from mimo_jax.config import DFlashConfig, MiMoConfig
from mimo_jax.decoding.drafters import DFlashDrafter, MTPDrafter
from mimo_jax.model.dflash import DFlash
from mimo_jax.model.mtp import MTP

LENGTH, PROMPT, PROMPTS, STEPS = 48, 12, 4, 40
WINDOW = 24


@functools.cache
def backbone() -> mj.LanguageModel:
    """Two layers of mimo-tiny in float32."""
    return tiny.two_layers(dtype="float32")


def small_config(**changes: Any) -> DFlashConfig:
    config = drafter_weights.drafter_config(backbone().config, 4080)
    return dataclasses.replace(config, block_size=4, **changes)


def random_module(build: Any, seed: int = 0) -> Any:
    """Float32 parameters, of which none is what it is at first."""
    rng = np.random.default_rng(seed)

    def make(spec):
        around = 1.0 if spec.init == "ones" else 0.0
        return jnp.asarray(around + 0.2 * rng.standard_normal(spec.shape), jnp.float32)

    return build(make)


@functools.cache
def seen() -> Seen:
    """A batch of random tokens whose later ones count."""
    lm = backbone()
    tokens = np.random.default_rng(0).integers(4064, size=(2, 60))
    mask = np.broadcast_to(np.arange(60) >= 20, tokens.shape)
    run = jax.jit(lambda m, t, k: observe(m, t, k, (0, 1), jnp.float32))
    return run(lm.model, tokens, mask)


# -- the same numbers as decoding -----------------------------------------------------------------


@pytest.mark.parametrize("slots", [WINDOW + 3, 128])
def test_blocks_are_run_as_in_decoding(slots):
    """Of anchors before, at and after the window's width, and where the ring has been overwritten."""
    config = small_config(sliding_window=WINDOW)
    module, lm, batch = random_module(lambda make: DFlash(config, make)), backbone(), seen()
    anchors = np.array([[1, 23, 24, 25, 52], [52, 40, 3, 30, 28]])

    @jax.jit
    def trained(module, model):
        embedded = model.embed(jnp.take_along_axis(batch.tokens, anchors, axis=1))
        rows = block_rows(module, embedded, anchors, context_rings(module, batch.taps))
        return model.head(rows)

    got = np.asarray(trained(module, lm.model))
    for anchor in (1, 24, 52):
        run = jax.jit(
            lambda module, model, anchor=anchor: model.head(
                decoding_rows(module, model, batch.tokens, batch.taps, anchor, slots)
            )
        )
        expected = np.asarray(run(module, lm.model))
        where = np.argwhere(anchors == anchor)
        assert len(where)
        for b, a in where:
            np.testing.assert_allclose(got[b, a], expected[b], rtol=1e-4, atol=1e-4)
    assert np.abs(got[0, 0] - got[0, 1]).max() > 0.1


@functools.cache
def observed_losses() -> tuple[Any, Any]:
    lm, batch = backbone(), seen()
    mtp = random_module(lambda make: MTP(lm.config, 2, make, 2))
    dflash = random_module(lambda make: DFlash(small_config(), make))
    of_mtp = jax.jit(functools.partial(mtp_loss, distill=0.0, group=30))(mtp, lm.model, batch)
    return mtp, dflash, of_mtp
