"""Looking into a model, and changing it to see what happens.

`taps` runs a text through a model once and brings what was asked for to the host, as a dictionary
of arrays whose dimensions have names.  Everything else here is numpy on that dictionary:

    lm = mj.load("mimo-tiny")
    seen = explore.taps(lm, "def read(path):", "experts.*", "router.*", "attention.3")
    explore.router_stats(lm, seen).counts
    explore.attention_maps(lm, seen)[3].sink
    small = explore.changed(lm, explore.top_k(2))

`mimo_jax.explore.plots` draws it, the only module that needs matplotlib (the extra `notebooks`).
A model that nobody looks into computes nothing for it (`mimo_jax.model.taps`).  The package isn't
called `inspect` since the standard library has a module and the command line a command of that
name, and neither does this.
"""

from mimo_jax.explore.attending import AttentionMap, attention_maps
from mimo_jax.explore.changes import (
    Change,
    changed,
    top_k,
    window,
    without_experts,
    without_heads,
)
from mimo_jax.explore.lens import LogitLens, logit_lens, read_out
from mimo_jax.explore.losses import divergence, token_losses
from mimo_jax.explore.named import NamedArray
from mimo_jax.explore.routing import Favourite, RouterStats, router_stats
from mimo_jax.explore.tapping import tap_names, taps, token_texts

__all__ = [
    "AttentionMap",
    "Change",
    "Favourite",
    "LogitLens",
    "NamedArray",
    "RouterStats",
    "attention_maps",
    "changed",
    "divergence",
    "logit_lens",
    "read_out",
    "router_stats",
    "tap_names",
    "taps",
    "token_losses",
    "token_texts",
    "top_k",
    "window",
    "without_experts",
    "without_heads",
]
