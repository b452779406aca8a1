"""Speculative decoding: a drafter proposes tokens and the backbone verifies them, losing nothing.

The backbone runs the newest token and the proposals at once and draws, at every row, the token that
plain decoding would draw there: the most probable one, or one by noise that depends on nothing but
the request's seed and the position (`sampling.sample`).  Proposals are kept up to the first that
differs from what was drawn, and the token drawn in its place, or after the last, is kept too.  So
the tokens are those of plain decoding with the same seed, whatever the drafter proposes, and their
distribution is the processed one of the backbone: nothing is rejected that has to be made up for.

All of it, several rounds, is one program on the device.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from mimo_jax.decoding import sampling
from mimo_jax.decoding.autoregressive import Decoder, idle
from mimo_jax.decoding.draft_width import AdaptiveWidth
from mimo_jax.decoding.drafters import Drafter, Rows
from mimo_jax.decoding.sampling import RowParams, SamplingParams
from mimo_jax.decoding.state import Block, DecodeState, Seen
from mimo_jax.decoding.static_batch import StaticBatch
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.cache import KVCache
from mimo_jax.model.placement import Placement
from pallas_kernels import clock
from sharding.types import by_rows, replicated

Width = int | Literal["adaptive"] | None

# Rounds a dispatch, as many as produce some ten tokens or two.
ROUNDS = 6


def accepted(drafts: Int32[Array, "B n"], drawn: Int32[Array, "B n+1"]) -> Int32[Array, " B"]:
    """How many proposals are kept: those before the first that differs from what was drawn."""
    same = (drafts == drawn[:, :-1]).astype(jnp.int32)
    return jnp.cumprod(same, axis=1).sum(axis=1)


def kept(
    drawn: Int32[Array, "B W"],
    accepted: Int32[Array, " B"],
    remaining: Int32[Array, " B"],
    ends: Bool[Array, "B W"],
) -> tuple[Int32[Array, " B"], Bool[Array, " B"]]:
    """How many of the drawn tokens a row produces, and whether the last of them ends it.

    Args:
      drawn: a row's tokens.
      accepted: proposals that are right, after which one more token is.
      remaining: how many more tokens the row may produce; 0 when it is done.
      ends: which of the tokens would end it.
    """
    column = jnp.arange(drawn.shape[1], dtype=jnp.int32)
    count = jnp.minimum(accepted + 1, remaining)
    first_end = jnp.min(jnp.where(ends, column, drawn.shape[1]), axis=1)
    return jnp.minimum(count, first_end + 1), first_end < count


class SpeculativeDecoder(Decoder):
    """`Decoder` with a drafter: the same tokens in fewer steps.

    Args:
      model: the backbone, as of `Decoder`; so are the next three.
      drafter: what proposes tokens.
      valid_vocabulary: ids from here on are never produced.
      eos_ids: tokens that end a row.
      placement: the mesh and its rules.
      width: tokens of a row that are verified at once, the newest and proposals: a number, None for
        all, or "adaptive" for what pays best with the acceptance so far (`AdaptiveWidth`).

    Raises:
      ValueError: the width is not 2 to one more than the drafter proposes.
    """

    def __init__(
        self,
        model: MiMo,
        drafter: Drafter,
        *,
        valid_vocabulary: int,
        eos_ids: Sequence[int],
        placement: Placement | None = None,
        width: Width = None,
    ):
        self.drafter = drafter
        most = 1 + drafter.tokens
        if width not in (None, "adaptive", *range(2, most + 1)):
            raise ValueError(
                f"draft width {width!r}: expected 2 to {most}, the newest token and up to "
                f'{drafter.tokens} proposals of {drafter.name}, or "adaptive"'
            )
        self.width = width if isinstance(width, int) else most
        self._adapts = width == "adaptive"
        self._adaptive: dict[int, AdaptiveWidth] = {}  # by rows of the batch
        self._rows = 1
        super().__init__(
            model, valid_vocabulary=valid_vocabulary, eos_ids=eos_ids, placement=placement
        )

    def _modules(self, model: MiMo) -> Any:
        return model, self.drafter.module

    @property
    def least(self) -> int:
        """One token a round."""
        return ROUNDS

    @property
    def most(self) -> int:
        """All proposals right, and one token more a round."""
        return ROUNDS * (1 + self.drafter.tokens)

    @property
    def settled(self) -> bool:
        """As `Decoder.settled`: whether each width has been tried."""
        return not self._adapts or (
            self._rows in self._adaptive and self._adaptive[self._rows].settled
        )

    def _options(self) -> dict[str, Any]:
        return {"rounds": ROUNDS, "width": self.width}

    def learn(self, block: Block, seconds: float | None) -> None:
        """As `Decoder.learn`; chooses how wide the next rounds are."""
        if self._adapts and block.lengths is not None:
            policy = self._adaptive[self._rows]
            each = None if seconds is None else seconds / ROUNDS
            if each is not None and block.phases is not None:
                each = float(block.phases.sum(axis=2).mean())
            policy.learn(block.lengths, block.width, each)
            self.width = policy.choose()

    def begin(self, rows: int) -> None:
        """As `Decoder.begin`; how wide rounds are best depends on the rows."""
        if self._adapts:
            self._rows = rows
            policy = self._adaptive.setdefault(rows, AdaptiveWidth(1 + self.drafter.tokens))
            self.width = policy.choose()

    def empty(self, rows: int, max_len: int) -> tuple[KVCache, Any]:
        """As `Decoder.empty`; the drafts are tokens that may follow, and what the drafter keeps."""
        carried = self.drafter.init(rows, self.config.dtype, self.placement)
        drafts = self.put(np.zeros((rows, self.drafter.tokens), np.int32))
        return super().empty(rows, max_len)[0], (drafts, carried)

    def _prefill_step(
        self,
        leaves: list[Any],
        tokens: Int32[Array, "B T"],
        positions: Int32[Array, "B T"],
        held: Any,
        rows: RowParams,
        remaining: Int32[Array, " B"],
        *,
        top_logprobs: int | None,
    ) -> tuple[DecodeState, Seen]:
        model, module = jax.tree.unflatten(self._treedef, leaves)
        cache, (_, carried) = held
        hidden, cache, taps = model.hidden_states(tokens, positions, cache, taps=self.drafter.taps)
        state, seen = self._first(
            model, hidden, positions, cache, tokens, rows, remaining, top_logprobs
        )
        last = jnp.maximum(positions.max(axis=1), 0)
        column = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        following = jnp.where(
            column == last[:, None], state.tokens[:, None], jnp.roll(tokens, -1, axis=1)
        )
        run = Rows(positions, hidden, taps, following, last)
        choose = functools.partial(self._choose, rows)
        drafts = self.drafter.draft(module, model, carried, run, choose)
        return dataclasses.replace(state, drafts=drafts), seen

    def _read_step(
        self,
        leaves: list[Any],
        tokens: Int32[Array, "B T"],
        positions: Int32[Array, "B T"],
        following: Int32[Array, "B T"],
        held: Any,
    ) -> Any:
        model, module = jax.tree.unflatten(self._treedef, leaves)
        cache, (drafts, carried) = held
        hidden, cache, taps = model.hidden_states(tokens, positions, cache, taps=self.drafter.taps)
        last = jnp.argmax(positions, axis=1).astype(jnp.int32)
        run = Rows(positions, hidden, taps, following, last)

        def most_probable(logits: Array, _: Array) -> Array:
            """Without noise: it isn't known yet with whose seeds the rows will be sampled."""
            masked = sampling.mask_vocabulary(logits, self.valid_vocabulary)
            return jnp.argmax(masked, axis=-1).astype(jnp.int32)

        proposed, carried = self.drafter.draft(module, model, carried, run, most_probable)
        something = (positions >= 0).any(axis=1)[:, None]
        return cache, (jnp.where(something, proposed, drafts), carried)

    def _decode_steps(
        self,
        leaves: list[Any],
        state: DecodeState,
        rows: RowParams,
        *,
        rounds: int,
        width: int,
        top_logprobs: int | None,
    ) -> tuple[DecodeState, Seen]:
        model, module = jax.tree.unflatten(self._treedef, leaves)
        choose = functools.partial(self._choose, rows)

        def one(carry: tuple[DecodeState, Any], _: None) -> tuple[Any, Any]:
            state, began = carry
            state, run, made = self._verify(model, rows, top_logprobs, width, state)
            following, verified = _timed(run.following)
            run = dataclasses.replace(run, following=following)
            tokens, carried = self.drafter.draft(module, model, state.drafts[1], run, choose)
            tokens, drafted = _timed(tokens)
            state = dataclasses.replace(state, drafts=(tokens, carried))
            took = [clock.elapsed(began, verified), clock.elapsed(verified, drafted)]
            return (state, drafted), (*made, jnp.stack(took, axis=-1))

        tokens, began = _timed(state.tokens)
        state = dataclasses.replace(state, tokens=tokens)
        (state, _), made = jax.lax.scan(one, (state, began), length=rounds)
        tokens, logprobs, lengths, ticks = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), made)
        tokens, logprobs = jax.tree.map(
            lambda a: a.reshape(a.shape[0], -1, *a.shape[3:]), (tokens, logprobs)
        )
        return state, replicated(Seen(tokens, logprobs, state.remaining, lengths, ticks, width))

    def _verify(
        self,
        model: MiMo,
        rows: RowParams,
        top_logprobs: int | None,
        width: int,
        state: DecodeState,
    ) -> tuple[DecodeState, Rows, Any]:
        """Runs each row's newest token and proposals; what is kept, and all for the drafter."""
        proposed = state.drafts[0][:, : width - 1]
        tokens = jnp.concatenate([state.tokens[:, None], proposed], axis=1)
        offset = jnp.arange(width, dtype=jnp.int32)
        tokens, positions = idle(state, tokens, state.positions[:, None] + offset)
        hidden, cache, taps = model.hidden_states(
            tokens, positions, state.cache, taps=self.drafter.taps
        )
        logits = sampling.mask_vocabulary(model.logits(hidden), self.valid_vocabulary)
        drawn = sampling.sample(logits, rows, positions + 1)
        logprobs = None
        if top_logprobs is not None:
            logprobs = sampling.logprobs(logits, drawn, top_logprobs)
        ends = jnp.isin(drawn, jnp.asarray(self.eos_ids, jnp.int32)) & ~rows.ignore_eos[:, None]
        count, ended = kept(drawn, accepted(proposed, drawn), state.remaining, ends)
        last = jnp.maximum(count - 1, 0)
        newest = jnp.take_along_axis(drawn, last[:, None], axis=1)[:, 0]
        assert cache is not None
        after = DecodeState(
            cache,
            jnp.where(count > 0, newest, state.tokens),
            state.positions + count,
            jnp.where(ended, 0, state.remaining - count),
            state.drafts,
        )
        made = jnp.where(offset < count[:, None], drawn, -1)
        return after, Rows(positions, hidden, taps, drawn, last), (made, logprobs, count)

    def phase_seconds(
        self,
        sequences: Sequence[Sequence[int]],
        params: SamplingParams,
        max_len: int,
        widths: Sequence[int],
    ) -> dict[int, tuple[float, float]]:
        """Seconds of a round's verification and of its drafting, each in a program of its own.

        The round verifies the last tokens of each sequence, as if they had been proposed: a mixture
        of experts takes longer for tokens that differ.  It is the device's time where a program can
        tell it (`pallas_kernels.clock`), as a small model's rounds are shorter than what the host
        takes to launch them; else the host's.

        Args:
          sequences: token ids, each longer than a round is wide.
          params: how all of them are sampled.
          max_len: positions of the cache.
          widths: of the rounds.

        Returns:
          By width, the seconds of both.
        """
        most = 1 + self.drafter.tokens
        endless = dataclasses.replace(params, max_tokens=max_len, ignore_eos=True, logprobs=None)
        each, seeds = [endless] * len(sequences), list(range(len(sequences)))
        run = StaticBatch(self, [s[:-most] for s in sequences], each, seeds, max_len)
        rows = len(run.state.tokens)
        newest = np.resize(np.asarray([s[-most] for s in sequences], np.int32), rows)
        proposed = np.asarray([s[1 - most :] for s in sequences], np.int32)
        tokens, drafts = self.put((newest, np.resize(proposed, (rows, most - 1))))
        start = dataclasses.replace(run.state, tokens=tokens, drafts=(drafts, run.state.drafts[1]))

        @functools.partial(jax.jit, static_argnames="width")
        def verify(leaves: list[Any], start: DecodeState, width: int) -> tuple[Rows, Array]:
            model, _ = jax.tree.unflatten(self._treedef, leaves)

            def one(carry: tuple[KVCache, Array], _: None) -> tuple[Any, tuple[Rows, Array]]:
                cache, began = carry
                # Or the compiler takes out of the loop what is the same in every round.
                tokens, began = jax.lax.optimization_barrier((start.tokens, began))
                state = dataclasses.replace(start, cache=cache, tokens=tokens)
                state, made, _ = self._verify(model, run.rows, None, width, state)
                following, ended = _timed(made.following)
                made = dataclasses.replace(made, following=following)
                return (state.cache, ended), (made, clock.elapsed(began, ended))

            began = _timed(start.tokens)[1]
            _, (made, ticks) = jax.lax.scan(one, (start.cache, began), length=ROUNDS)
            return jax.tree.map(lambda a: a[-1], made), replicated(ticks)

        @jax.jit
        def draft(leaves: list[Any], drafts: Any, made: Rows) -> tuple[Any, Array]:
            model, module = jax.tree.unflatten(self._treedef, leaves)
            choose = functools.partial(self._choose, run.rows)

            def one(carry: tuple[Any, Array], _: None) -> tuple[Any, Array]:
                (_, carried), began = carry
                rows, began = jax.lax.optimization_barrier((made, began))
                tokens, carried = self.drafter.draft(module, model, carried, rows, choose)
                tokens, ended = _timed(tokens)
                return ((tokens, carried), ended), clock.elapsed(began, ended)

            (drafts, _), ticks = jax.lax.scan(one, (drafts, _timed(drafts[0])[1]), length=ROUNDS)
            return drafts, replicated(ticks)

        seconds = {}
        with self.on_mesh():
            for width in widths:
                verifying = functools.partial(verify, run.leaves, start, width)
                made = verifying()[0]
                drafting = functools.partial(draft, run.leaves, start.drafts, made)
                seconds[width] = (_seconds(verifying), _seconds(drafting))
        return seconds

    def _choose(
        self, rows: RowParams, logits: Float[Array, "B n V"], positions: Int32[Array, "B n"]
    ) -> Int32[Array, "B n"]:
        """Draws proposals as if the drafter were the backbone."""
        return sampling.sample(
            sampling.mask_vocabulary(logits, self.valid_vocabulary), rows, positions
        )


def _timed(x: Int32[Array, " B *n"]) -> tuple[Int32[Array, " B *n"], Int32[Array, " B"]]:
    """Integers of each row, and when they had been computed (`clock.read`)."""

    def read(x: Array) -> tuple[Array, Array]:
        x, now = clock.read(x)
        return x, jnp.full(len(x), now)

    return by_rows(read, x)


def _seconds(run: Callable[[], tuple[Any, Array]], times: int = 5) -> float:
    """The median time of a round of a program that returns, at the end, the ticks of its rounds."""
    spent = []
    for _ in range(1 + times):
        started = time.perf_counter()
        ticks = np.asarray(jax.block_until_ready(run())[1])
        each = (time.perf_counter() - started) / ROUNDS
        spent.append(float(np.median(ticks)) * clock.TICK if ticks.any() else each)
    return statistics.median(spent[1:])
