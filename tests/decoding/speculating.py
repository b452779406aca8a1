"""What tests of speculative decoding share: small drafters, and one that knows what comes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mimo_jax.config import DFlashConfig
from mimo_jax.decoding.autoregressive import Decoder
from mimo_jax.decoding.drafters import DFlashDrafter, MTPDrafter
from mimo_jax.decoding.sampling import SamplingParams
from mimo_jax.decoding.speculative import SpeculativeDecoder
from mimo_jax.model.dflash import DFlash
from mimo_jax.model.mtp import MTP
from mimo_jax.model.parameters import random_init

VOCAB = 64
DRAFTER = DFlashConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    v_head_dim=16,
    partial_rotary_factor=0.5,
    rope_theta=1e4,
    block_size=8,
    sliding_window=24,
    target_layer_ids=(0, 1),
    mask_token_id=63,
    num_target_layers=2,
    attention_value_scale=0.612,
    attention_sink_bias=True,
)


@functools.cache
def model() -> Any:
    """Two layers, full and sliding, with a window of 8, in float32."""
    return golden.build(golden.tiny())


@functools.cache
def drafter(name: str, seed: int = 3) -> Any:
    """With random weights: its proposals are right about as often as guesses."""
    make = random_init(jax.random.key(seed), "float32")
    if name == "mtp":
        return MTPDrafter(MTP(model().config, 3, make), model().config)
    return DFlashDrafter(DFlash(DRAFTER, make))


@functools.cache
def ending_decoder(name: str | None) -> Decoder:
    """Plain (None) or with a drafter; token 3 ends a row."""
    how: dict[str, Any] = {"valid_vocabulary": VOCAB, "eos_ids": (3,)}
    return SpeculativeDecoder(model(), drafter(name), **how) if name else Decoder(model(), **how)


class Table(nnx.Module):
    """Tokens [B, positions] that `Scripted` proposes."""

    def __init__(self, tokens: Any):
        self.tokens = nnx.Param(jnp.asarray(tokens, jnp.int32))


@dataclasses.dataclass(frozen=True)
class Scripted:
    """Proposes what a table says, so that a test decides what is right."""

    module: Table
    tokens: int = 7
    name: str = "scripted"
    taps: tuple[str, ...] = ()

    def init(self, batch: int, dtype: Any, placement: Any) -> Any:
        """Nothing to carry."""
        return jnp.zeros((batch,))

    def draft(self, module: Any, backbone: Any, state: Any, rows: Any, choose: Any) -> Any:
        """The table's tokens after the one that is known."""
        newest = jnp.take_along_axis(rows.positions, rows.last[:, None], axis=1)
        at = newest + 2 + jnp.arange(self.tokens, dtype=jnp.int32)
        table = module.tokens[...]
        return jnp.take_along_axis(table, jnp.clip(at, 0, table.shape[1] - 1), axis=1), state


def generated(
    use: Decoder,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    seeds: Sequence[int] | None = None,
    stop_after: dict[int, int] | None = None,
) -> tuple[list[list[int]], list[list[int]], list[Any]]:
    """Tokens of each row, tokens of each of its rounds, and all blocks.

    Args:
      use: the decoder.
      prompts, params, seeds: of the rows.
      stop_after: rows to end once that many blocks have come.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    tokens: list[list[int]] = [[] for _ in prompts]
    rounds: list[list[int]] = [[] for _ in prompts]
    stopped: set[int] = set()
    blocks = []
    for block in use.blocks(prompts, each, seeds, stopped=stopped):
        blocks.append(block)
        for i, row in enumerate(block.tokens):
            there = row[row >= 0].tolist()
            assert (row[len(there) :] == -1).all()  # no gaps
            tokens[i] += there
            if block.lengths is not None:
                rounds[i] += [n for n in block.lengths[i].tolist() if n]
        stopped |= {i for i, n in (stop_after or {}).items() if n <= len(blocks)}
    return tokens, rounds, blocks


@functools.cache
def prompt(length: int) -> list[int]:
    """Random tokens."""
    return np.random.default_rng(length).integers(VOCAB, size=length).tolist()
