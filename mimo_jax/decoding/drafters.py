"""What proposes tokens for the backbone to verify: the MTP blocks and the DFlash drafter.

A drafter looks at what the backbone has just computed, a prompt or the rows of a verified block,
and proposes the tokens that follow.  Its own caches are located by position alone, as the
backbone's are, so what it stored for rejected tokens is never looked at and later written over.
Proposals are drawn from the drafter's logits as tokens are from the backbone's, with the same noise
for the same position: so where both distributions are alike, so are the tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, no_type_check, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from mimo_jax.config import MiMoConfig
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.cache import RING_SLACK, LayerCache, empty_layers
from mimo_jax.model.dflash import DFlash
from mimo_jax.model.mtp import MTP
from mimo_jax.model.placement import Placement
from sharding.types import put

# From logits [B, n, V] and the positions [B, n] that their tokens will have, those tokens.
Choose = Callable[[Float[Array, "B n V"], Int32[Array, "B n"]], Int32[Array, "B n"]]


@no_type_check  # at run time: jax also puts what it knows of an array in an array's place
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows that the backbone has just run.

    Attributes:
      positions: increasing by one along a row; negative where nothing was run.
      hidden: residual stream after the last layer, before the final norm.
      taps: what the drafter asked for.
      following: the token after each row, up to `last`.
      last: index of the newest row that stays; of the rows after it nothing is valid.
    """

    positions: Int32[Array, "B T"]
    hidden: Float[Array, "B T D"]
    taps: dict[str, Float[Array, "B T D"]]
    following: Int32[Array, "B T"]
    last: Int32[Array, " B"]

    def newest(self, count: int) -> Rows:
        """Only `count` rows, the newest of those up to `last` first of all."""
        if self.positions.shape[1] <= count:
            return self
        begin = jnp.maximum(self.last - (count - 1), 0)
        at = begin[:, None] + jnp.arange(count, dtype=jnp.int32)
        return Rows(
            jnp.take_along_axis(self.positions, at, axis=1),
            _rows(self.hidden, at),
            {name: _rows(a, at) for name, a in self.taps.items()},
            jnp.take_along_axis(self.following, at, axis=1),
            self.last - begin,
        )


@runtime_checkable
class Drafter(Protocol):
    """A way to propose tokens."""

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    @property
    def module(self) -> nnx.Module:
        """Its parameters."""
        ...

    @property
    def taps(self) -> tuple[str, ...]:
        """What it wants to know of the backbone (`mimo_jax.model.taps`)."""
        ...

    @property
    def tokens(self) -> int:
        """How many tokens it proposes."""
        ...

    def init(self, batch: int, dtype: Any, placement: Placement | None) -> Any:
        """Its state before a prompt."""
        ...

    def draft(
        self, module: Any, backbone: MiMo, state: Any, rows: Rows, choose: Choose
    ) -> tuple[Int32[Array, "B n"], Any]:
        """Tokens that may follow those that are known, and the state with these rows in it."""
        ...


@no_type_check  # at run time: jax also puts what it knows of an array in an array's place
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MTPState:
    """What MTP blocks carry.

    Attributes:
      caches: each block's ring.
      hidden: the backbone's residual stream at the newest n - 1 rows, with n blocks.
      positions: of these rows; negative where there is none yet.
    """

    caches: tuple[LayerCache, ...]
    hidden: Float[Array, "B rows D"]
    positions: Int32[Array, "B rows"]


@dataclasses.dataclass(frozen=True)
class MTPDrafter:
    """One proposed token a block; every block gets the backbone's own hidden states.

    Block k reads the token k + 1 positions after a row.  For the last k rows these are proposals of
    the blocks before it, so it runs these rows again once their tokens are known.
    """

    module: MTP
    config: MiMoConfig
    name: str = "mtp"
    taps: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """A token a block."""
        return len(self.module.layers)

    def init(self, batch: int, dtype: Any, placement: Placement | None) -> MTPState:
        """Empty rings, and no rows."""
        specs = [block.layer for block in self.module.layers]
        sizes = [
            (_window(s.window) + RING_SLACK, s.num_kv_heads, s.head_dim, s.v_head_dim)
            for s in specs
        ]
        rows = self.tokens - 1
        nothing = (
            np.zeros((batch, rows, self.config.hidden_size), jnp.dtype(dtype)),
            np.full((batch, rows), -1, np.int32),
        )
        if placement is None:
            nothing = jax.device_put(nothing)
        else:
            nothing = put(nothing, placement.mesh, *placement.rules.spec(["batch"]))
        return MTPState(empty_layers(sizes, batch, dtype, placement), *nothing)

    def draft(
        self, module: MTP, backbone: MiMo, state: MTPState, rows: Rows, choose: Choose
    ) -> tuple[Int32[Array, "B n"], MTPState]:
        """A token of each block in turn."""
        rows = rows.newest(max(_window(b.layer.window) for b in module.layers))
        carried = self.tokens - 1
        # A prompt may go on after a gap, when it is read in parts longer than the window.
        adjoins = state.positions[:, -1:] + 1 == rows.positions[:, :1]
        before = jnp.where(adjoins, state.positions, -1)
        hidden = jnp.concatenate([state.hidden, rows.hidden.astype(state.hidden.dtype)], axis=1)
        positions = jnp.concatenate([before, rows.positions], axis=1)
        # The same tokens for all blocks: block k begins k rows earlier.
        tokens = jnp.pad(rows.following, ((0, 0), (0, carried)))
        newest = jnp.take_along_axis(rows.positions, rows.last[:, None], axis=1)
        column = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        drafts, caches = [], []
        for k, block in enumerate(module.layers):
            with jax.named_scope(f"mtp{k}"):
                begin, n = carried - k, rows.positions.shape[1] + k
                x, cache = block(
                    hidden[:, begin:],
                    backbone.embed(tokens[:, :n]),
                    positions[:, begin:],
                    state.caches[k],
                )
                logits = backbone.head(_rows(x, (rows.last + k)[:, None]))
                drafts.append(choose(logits, newest + 2 + k))
                caches.append(cache)
            at = (rows.last + 1 + k)[:, None]
            tokens = jnp.where(column == at, drafts[-1], tokens)
        kept = rows.last[:, None] + 1 + jnp.arange(carried, dtype=jnp.int32)
        idle = newest < 0  # goes on from where it was
        after = MTPState(
            tuple(caches),
            jnp.where(idle[..., None], state.hidden, _rows(hidden, kept)),
            jnp.where(idle, state.positions, jnp.take_along_axis(positions, kept, axis=1)),
        )
        return jnp.concatenate(drafts, axis=1), after


@dataclasses.dataclass(frozen=True)
class DFlashDrafter:
    """A block of proposals in one pass, with context from the backbone's layers."""

    module: DFlash
    name: str = "dflash"

    @property
    def taps(self) -> tuple[str, ...]:
        """Residual streams after the target layers, none of them normed."""
        return tuple(f"hidden.{i}" for i in self.module.config.target_layer_ids)

    @property
    def tokens(self) -> int:
        """A block without its anchor."""
        return self.module.config.block_size - 1

    def init(self, batch: int, dtype: Any, placement: Placement | None) -> tuple[LayerCache, ...]:
        """Empty rings."""
        c = self.module.config
        size = (
            c.sliding_window + RING_SLACK,
            c.num_key_value_heads,
            c.head_dim,
            c.v_head_dim,
        )
        return empty_layers([size] * c.num_hidden_layers, batch, dtype, placement)

    def draft(
        self,
        module: DFlash,
        backbone: MiMo,
        state: tuple[LayerCache, ...],
        rows: Rows,
        choose: Choose,
    ) -> tuple[Int32[Array, "B n"], tuple[LayerCache, ...]]:
        """Commits the context of the rows that stay, then draws a token at each masked position."""
        rows = rows.newest(module.config.sliding_window)
        with jax.named_scope("dflash"):
            features = module.features([rows.taps[name] for name in self.taps])
            index = jnp.arange(rows.positions.shape[1], dtype=jnp.int32)
            stays = index <= rows.last[:, None]
            caches = module.commit(features, jnp.where(stays, rows.positions, -1), state)
            newest = jnp.take_along_axis(rows.positions, rows.last[:, None], axis=1)[:, 0]
            anchor = jnp.take_along_axis(rows.following, rows.last[:, None], axis=1)
            first = jnp.where(newest < 0, -1, newest + 1)
            x, caches = module(backbone.embed(anchor)[:, 0], first, caches)
            # Row r is of the token r positions after the anchor, which is known.
            logits = backbone.head(x[:, 1 : 1 + self.tokens])
            offset = jnp.arange(1, 1 + self.tokens, dtype=jnp.int32)
            return choose(logits, first[:, None] + offset), caches


def _window(window: int | None) -> int:
    assert window is not None  # MTP blocks are sliding layers
    return window


def _rows(x: Float[Array, "B T D"], at: Int32[Array, "B n"]) -> Float[Array, "B n D"]:
    return jnp.take_along_axis(x, at[:, :, None], axis=1)
