"""The loop of continuous batching: what the scheduler says is sent to the device, and looked at
one dispatch later."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import jax

from mimo_jax.decoding.autoregressive import Decoder
from mimo_jax.decoding.outputs import GenerationOutput, Row, output_of
from mimo_jax.decoding.sampling import SamplingParams, sample_seed
from mimo_jax.decoding.slots import Chunk, Slots
from mimo_jax.decoding.state import Block, Seen
from mimo_jax.engine import actions
from mimo_jax.engine.actions import Action, Decode, Insert, Job, Prefill, Result
from mimo_jax.engine.scheduler import Scheduler, Stats

# Tokens of a prompt that are read at once: the largest as often as it goes, then one for the rest.
CHUNK_SIZES = (32, 128, 512, 2048)
# Requests that are taken before they can begin, so that prefixes that several have are seen.
AHEAD = 64


@dataclasses.dataclass(frozen=True)
class Work:
    """A request.

    Attributes:
      key: its name, which no other unfinished one has.
      tokens: of the prompt, at least one.
      params: how it is sampled; `n` of it are made.
      seed: of its randomness.
    """

    key: Hashable
    tokens: list[int]
    params: SamplingParams
    seed: int


@dataclasses.dataclass
class _Open:
    """A request under way: its completions, and how many of them have not ended."""

    work: Work
    started: float
    completions: list[Row]
    left: int


class Engine:
    """Continuous batching over a fixed number of rows.

    What a request produces depends on nothing but itself, the decoder and these arguments: its
    prompt is cut into the same chunks and its rows are decoded in programs of the same shapes,
    whatever else runs.

    Args:
      decoder: plain or speculative.
      new_row: makes what takes the tokens of a completion with these parameters.
      slots: completions decoded at once.
      lanes: prompts read at once.
      max_len: positions of the cache of a row, prompt and completion together.
      snapshots: how many prefixes of prompts are kept, for requests that begin alike.
      top_logprobs: the most that a request asks for; None if none does.

    Raises:
      ValueError: as `Slots`.
    """

    def __init__(
        self,
        decoder: Decoder,
        new_row: Callable[[SamplingParams], Row],
        *,
        slots: int,
        lanes: int,
        max_len: int,
        snapshots: int = 0,
        top_logprobs: int | None = None,
    ):
        self._decoder, self._new_row = decoder, new_row
        self._device = Slots(
            decoder, slots=slots, lanes=lanes, max_len=max_len, top_logprobs=top_logprobs
        )
        sizes = [size for size in CHUNK_SIZES if size < max_len]
        self._scheduler = Scheduler(
            slots, lanes, max_len, sizes or [max_len], snapshots=snapshots, steps=decoder.least
        )
        self._snapshots: dict[int, Any] = {}
        self._open: dict[Hashable, _Open] = {}
        self._rows: dict[int, Row] = {}

    @property
    def stats(self) -> Stats:
        """What goes on at the moment."""
        return self._scheduler.stats

    def run(self, requests: Iterable[Work]) -> Iterator[tuple[Hashable, GenerationOutput]]:
        """Completes requests, and yields each one's key and output when it has ended.

        Requests are taken as they are needed.

        Raises:
          ValueError: a prompt is empty or longer than the cache.
        """
        coming = iter(requests)
        sent: collections.deque[tuple[Action, Seen | None]] = collections.deque()
        more = True
        try:
            while True:
                while more and self._scheduler.waiting < AHEAD:
                    work = next(coming, None)
                    more = work is not None
                    if work is not None:
                        self._submit(work)
                action = self._scheduler.next()
                if action is not None:
                    sent.append((action, self._dispatch(action)))
                elif sent:
                    yield from self._look_at(*sent.popleft())
                elif not more:
                    return
        finally:
            # After Ctrl-C steps may be under way; a process that ends meanwhile is aborted.
            jax.block_until_ready([seen for _, seen in sent])

    def _submit(self, work: Work) -> None:
        params, room = work.params, self._device.max_len - len(work.tokens)
        if not work.tokens or room < 1:
            raise ValueError(
                f"the prompt of {work.key!r} has {len(work.tokens)} tokens; a row of the cache has "
                f"{self._device.max_len} positions, for prompt and completion: shorten it"
            )
        # The last token is not read but is the newest of its slot.  (Where it is the only one it
        # is both, which changes nothing.)
        read = work.tokens[:-1] or work.tokens
        self._scheduler.submit(Job(work.key, read, min(params.max_tokens, room), params.n))
        rows = [self._new_row(params) for _ in range(params.n)]
        self._open[work.key] = _Open(work, time.perf_counter(), rows, params.n)

    def _dispatch(self, action: Action) -> Seen | None:
        match action:
            case Prefill():
                for chunk in action.chunks:
                    if chunk.from_snapshot is not None:
                        self._device.restore(chunk.lane, self._snapshots[chunk.from_snapshot])
                self._device.read([self._chunk(chunk) for chunk in action.chunks], action.T)
                for chunk in action.chunks:
                    if chunk.save_snapshot is not None:
                        self._snapshots[chunk.save_snapshot] = self._device.snapshot(chunk.lane)
            case Insert():
                row, work = action.row, self._open[action.row.job.key].work
                self._rows[row.serial] = self._open[work.key].completions[row.index]
                newest = (work.tokens[-1], len(work.tokens) - 1)
                seed = sample_seed(work.seed, row.index)
                self._device.insert(
                    row.slot, action.lane, newest, work.params, seed, row.max_tokens
                )
            case Decode():
                if action.stopped:
                    self._device.end(action.stopped)
                return self._device.decode()
        return None

    def _chunk(self, chunk: actions.Chunk) -> Chunk:
        prompt, end = self._open[chunk.job.key].work.tokens, chunk.start + len(chunk.tokens)
        return Chunk(chunk.lane, chunk.start, chunk.tokens, prompt[min(end, len(prompt) - 1)])

    def _look_at(
        self, action: Action, seen: Seen | None
    ) -> Iterator[tuple[Hashable, GenerationOutput]]:
        """Takes what an action gave; yields what has ended by it."""
        if not isinstance(action, Decode):
            nothing = {action.row.slot: Result(0, False)} if isinstance(action, Insert) else {}
            self._scheduler.report(action, nothing)
            return
        got = jax.device_get(seen)
        block = Block.of(got)
        self._decoder.learn(block, None)
        produced = (block.tokens >= 0).sum(axis=1)
        results = {
            row.slot: Result(int(produced[row.slot]), not got.remaining[row.slot])
            for row in action.rows
        }
        for row in self._scheduler.report(action, results):
            taken = self._rows[row.serial]
            taken.take(block, row.slot)
            done = results[row.slot].ended
            if taken.ended and not done:
                self._scheduler.end(row.job.key, row.index)
            if taken.ended or done:
                taken.finish()
                del self._rows[row.serial]
                ended = self._open[row.job.key]
                ended.left -= 1
                if not ended.left:
                    del self._open[row.job.key]
                    rows = [(r, ended.started) for r in ended.completions]
                    yield row.job.key, output_of(ended.work.tokens, rows)
