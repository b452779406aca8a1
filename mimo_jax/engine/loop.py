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
from mimo_jax.decoding.slots import Piece, Slots
from mimo_jax.decoding.state import Block, Seen
from mimo_jax.engine.actions import Action, Chunk, Decode, Insert, Job, Prefill, Result
from mimo_jax.engine.scheduler import Scheduler, Stats
from sharding import distributed

# Tokens of a prompt that are read at once: the largest as often as it goes, then one for the rest.
# Those of all lanes together are at most as many as the largest, so that rows that decode meanwhile
# never wait for long.
CHUNK_SIZES = (32, 128, 512, 2048)
# In a job of several processes, dispatches after which all hear whether one wants to drain.
AGREE = 16
# Seconds between looks for a request that hasn't come yet.
PAUSE = 1e-3
# Requests that are taken before they can begin, so that prefixes that several have are seen.
AHEAD = 64

Ended = tuple[Hashable, GenerationOutput]


@dataclasses.dataclass(frozen=True)
class Work:
    """A request.

    Attributes:
      key: its name, which no other unfinished one has.
      tokens: of the prompt, at least one.
      params: how it is sampled; `n` of it are made.
      seed: of its randomness.
      since: from when on its time counts, of `time.perf_counter`; None for when it is taken up.
    """

    key: Hashable
    tokens: list[int]
    params: SamplingParams
    seed: int
    since: float | None = None


@dataclasses.dataclass
class Totals:
    """What an engine did so far.

    Attributes:
      requests: that have ended.
      prompt_tokens: of requests that have ended.
      generated_tokens: of all that were begun.
      rounds: of speculation.
      decodes: dispatches of steps.
    """

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    rounds: int = 0
    decodes: int = 0


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

    Attributes:
      max_len: as given.
      totals: what it did so far.

    Raises:
      ValueError: max_len is not positive or exceeds the model's.
      ShardingError: the mesh does not divide slots or lanes.
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
        self.max_len = max_len
        self.totals = Totals()
        most = min(max_len - 1, max(CHUNK_SIZES[0], CHUNK_SIZES[-1] // lanes))
        sizes = [size for size in CHUNK_SIZES if size <= most]
        self._scheduler = Scheduler(
            slots, lanes, max_len, sizes or [most], snapshots=snapshots, steps=decoder.least
        )
        self._snapshots: dict[int, Any] = {}
        self._open: dict[Hashable, _Open] = {}
        self._rows: dict[int, Row] = {}
        self._draining = self._agreed = False
        self._decoded: float | None = None  # when, if the last thing looked at was a Decode

    @property
    def stats(self) -> Stats:
        """What goes on at the moment."""
        return self._scheduler.stats

    def drain(self) -> None:
        """Makes `run` end when the requests under way have ended; no other ones begin any more.

        A signal's handler may call it.  In a job of several processes it counts what process 0 is
        told.
        """
        self._draining = True

    def run(self, requests: Iterable[Work | None]) -> Iterator[list[Ended]]:
        """Completes requests.

        Requests are taken as they are needed.  They may come later: an iterator says by None that
        there is none at present.

        Yields:
          After every dispatch of steps the requests that have ended with it, often none.

        Raises:
          ValueError: a prompt is empty or longer than the cache.
        """
        coming, more = iter(requests), True
        sent: collections.deque[tuple[Action, Seen | None]] = collections.deque()
        while True:
            if self._ends_early:
                for key in self._scheduler.drain():
                    del self._open[key]
                more = False
            more = more and self._take_up(coming)
            action = self._scheduler.next()
            if action is not None:
                sent.append((action, self._dispatch(action)))
            elif sent:
                yield from self._look_at(*sent.popleft())
            elif not more:
                return
            else:
                self._decoded = None
                time.sleep(PAUSE)

    def _take_up(self, coming: Iterator[Work | None]) -> bool:
        """Takes the next requests, and says whether there may be more."""
        while self._scheduler.waiting < AHEAD:
            try:
                work = next(coming)
            except StopIteration:
                return False
            if work is None:
                return True
            self._submit(work)
        return True

    @property
    def _ends_early(self) -> bool:
        return self._agreed if jax.process_count() > 1 else self._draining

    def _submit(self, work: Work) -> None:
        params, room = work.params, self.max_len - len(work.tokens)
        if not work.tokens or room < 1:
            raise ValueError(
                f"the prompt of {work.key!r} has {len(work.tokens)} tokens; a row of the cache has "
                f"{self.max_len} positions, for prompt and completion: shorten it"
            )
        # The last token is not read but is the newest of its slot.  (Where it is the only one it
        # is both, which changes nothing.)
        read = work.tokens[:-1] or work.tokens
        self._scheduler.submit(Job(work.key, read, min(params.max_tokens, room), params.n))
        rows = [self._new_row(params) for _ in range(params.n)]
        started = time.perf_counter() if work.since is None else work.since
        self._open[work.key] = _Open(work, started, rows, params.n)

    def _dispatch(self, action: Action) -> Seen | None:
        match action:
            case Prefill():
                for chunk in action.chunks:
                    if chunk.from_snapshot is not None:
                        self._device.restore(chunk.lane, self._snapshots[chunk.from_snapshot])
                self._device.read([self._piece(chunk) for chunk in action.chunks], action.T)
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
                return self._device.decode([row.slot for row in action.rows])
        return None

    def _piece(self, chunk: Chunk) -> Piece:
        prompt, end = self._open[chunk.job.key].work.tokens, chunk.start + len(chunk.tokens)
        return Piece(chunk.lane, chunk.start, chunk.tokens, prompt[min(end, len(prompt) - 1)])

    def _look_at(self, action: Action, seen: Seen | None) -> Iterator[list[Ended]]:
        """Takes what an action gave; yields what has ended by a Decode."""
        if not isinstance(action, Decode):
            self._scheduler.report(action)
            self._decoded = None
            return
        got = jax.device_get(seen)
        block = Block.of(got)
        self._learn(block, got.compiled)
        produced = (block.tokens >= 0).sum(axis=1)
        results = {
            row.slot: Result(int(produced[row.slot]), not got.remaining[row.slot])
            for row in action.rows
        }
        self.totals.decodes += 1
        if jax.process_count() > 1 and self.totals.decodes % AGREE == 0:
            wanted = distributed.from_leader("whether to drain", str(int(self._draining)))
            self._agreed = wanted == "1"
        ended = []
        for row in self._scheduler.report(action, results):
            slot, taken = row.slot, self._rows[row.serial]
            taken.take(block, slot)
            self.totals.generated_tokens += results[slot].tokens
            if block.lengths is not None:
                self.totals.rounds += int((block.lengths[slot] > 0).sum())
            done = results[slot].ended
            if taken.ended and not done:
                self._scheduler.end(row.job.key, row.index)
            if taken.ended or done:
                taken.finish()
                del self._rows[row.serial]
                ended += self._completed(row.job.key)
        yield ended

    def _learn(self, block: Block, compiled: bool) -> None:
        """Tells the decoder what a Decode gave, and what time it took if that is known: where
        nothing was compiled, and nothing else was done, since the one before."""
        before, self._decoded = self._decoded, time.perf_counter()
        seconds = None if before is None or compiled else self._decoded - before
        self._decoder.learn(block, seconds)

    def _completed(self, key: Hashable) -> list[Ended]:
        """Counts a completion of a request; the request, if it was the last one."""
        request = self._open[key]
        request.left -= 1
        if request.left:
            return []
        del self._open[key]
        output = output_of(request.work.tokens, [(r, request.started) for r in request.completions])
        self.totals.requests += 1
        self.totals.prompt_tokens += len(request.work.tokens)
        return [(key, output)]
