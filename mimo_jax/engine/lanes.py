"""Prompts on their way: waiting in the queue, then prefilled in lanes chunk by chunk."""

from __future__ import annotations

import dataclasses
import itertools
from collections import OrderedDict

from mimo_jax.engine.actions import Chunk, Job, Prefill
from mimo_jax.engine.prefixes import Keys, Prefixes


@dataclasses.dataclass(eq=False)
class Prompt:
    """A job's prompt, until its last completion is in a slot.

    Attributes:
      arrival: its number in the order of arrival.
      chunks: (T, start) of each.
      keys: of its prefixes.
      starts: those of them that it could start from: a token must be left, to compute logits.
      done: how many chunks need not be dispatched any more.
      overtaken: how many later ones were admitted while it waited for a prefix.
      lane: that it is in, if any.
      source: the pinned snapshot that its next chunk starts from, if any.
      since: when its lane had its last turn.
    """

    job: Job
    arrival: int
    chunks: list[tuple[int, int]]
    keys: Keys
    starts: Keys
    done: int = 0
    overtaken: int = 0
    lane: int | None = None
    source: int | None = None
    since: int = 0

    @property
    def ready(self) -> bool:
        """Whether all its chunks are dispatched."""
        return self.done == len(self.chunks)

    @property
    def position(self) -> int:
        """How many tokens need not be dispatched any more."""
        return len(self.job.tokens) if self.ready else self.chunks[self.done][1]


class Lanes:
    """The queue, and the lanes that it fills.

    Admission is in the order of arrival, except that a prompt waits while a lane computes a longer
    prefix of it than is saved, and there is room for a snapshot of that; it may be overtaken by
    `lookahead` others meanwhile, then all wait.  If what it waits for is given up, it is admitted
    as any other, and so computes the prefix itself.

    Args:
      lanes: how many.
      chunk_sizes: ascending.
      snapshots: how many prefixes are kept.
      lookahead: by how many others a prompt may be overtaken, and how many beyond the first of the
        queue are looked at.
    """

    def __init__(self, lanes: int, chunk_sizes: tuple[int, ...], snapshots: int, lookahead: int):
        self.chunk_sizes = chunk_sizes
        self.lookahead = lookahead
        self.prefixes = Prefixes(chunk_sizes[-1], snapshots)
        self.queue: OrderedDict[Prompt, None] = OrderedDict()
        self.prefix_hits = self.prefix_tokens = 0
        self._lanes: list[Prompt | None] = [None] * lanes
        self._count = itertools.count(1)

    @property
    def prefilling(self) -> list[Prompt]:
        """Prompts in lanes, some of whose chunks are yet to be dispatched."""
        return [prompt for prompt in self._lanes if prompt and not prompt.ready]

    @property
    def ready(self) -> list[Prompt]:
        """Prompts in lanes, all of whose chunks are dispatched, in the order of arrival."""
        prompts = [prompt for prompt in self._lanes if prompt and prompt.ready]
        return sorted(prompts, key=lambda prompt: prompt.arrival)

    def add(self, job: Job) -> Prompt:
        """Puts a job's prompt at the end of the queue."""
        keys = self.prefixes.keys(job.tokens)
        starts = keys[: (len(job.tokens) - 1) // self.chunk_sizes[-1]]
        chunks = plan_chunks(len(job.tokens), self.chunk_sizes)
        prompt = Prompt(job, next(self._count), chunks, keys, starts)
        self.queue[prompt] = None
        self.prefixes.wait(prompt.starts)
        return prompt

    def remove(self, prompt: Prompt) -> None:
        """Takes a prompt from the queue or its lane."""
        if prompt in self.queue:
            del self.queue[prompt]
            self.prefixes.cease_to_wait(prompt.starts)
        if prompt.lane is not None:
            self._lanes[prompt.lane] = prompt.lane = None
            self.prefixes.cease_to_compute(prompt.keys[prompt.done :])
            if prompt.source is not None:
                self.prefixes.unpin(prompt.source)
                prompt.source = None

    def admit(self) -> None:
        """Fills the lanes that are free."""
        for lane, occupant in enumerate(self._lanes):
            if occupant is None:
                prompt = self._admissible()
                if prompt is None:
                    return
                self._count_overtaken(prompt)
                self._start(prompt, lane)

    def _count_overtaken(self, by: Prompt) -> None:
        for prompt in self.queue:
            if prompt is by:
                return
            prompt.overtaken += 1

    def _admissible(self) -> Prompt | None:
        """The first prompt that need not wait for a prefix."""
        room = None
        for prompt in itertools.islice(self.queue, self.lookahead + 1):
            coming = self.prefixes.coming(prompt.starts)
            if coming <= self.prefixes.saved(prompt.starts):
                return prompt
            room = self.prefixes.has_room() if room is None else room
            if not room:
                return prompt
            if prompt.overtaken >= self.lookahead:
                return None
        return None

    def _start(self, prompt: Prompt, lane: int) -> None:
        self.remove(prompt)
        self._lanes[lane] = prompt
        prompt.lane, prompt.since = lane, next(self._count)
        prompt.done = self.prefixes.saved(prompt.starts)
        if prompt.done:
            prompt.source = self.prefixes.pin(prompt.keys[prompt.done - 1])
            self.prefix_hits += 1
            self.prefix_tokens += prompt.position
        self.prefixes.compute(prompt.keys[prompt.done :])

    def prefill(self) -> Prefill:
        """The next chunk of the lane whose last turn is longest ago, and of all with its T."""
        oldest = min(self.prefilling, key=lambda prompt: (prompt.since, prompt.arrival))
        T = oldest.chunks[oldest.done][0]
        turn = next(self._count)
        chunks, pinned = [], []
        for prompt in self.prefilling:
            if prompt.chunks[prompt.done][0] == T:
                prompt.since = turn
                chunks.append(self._next_chunk(prompt, T, pinned))
        for snapshot in pinned:
            self.prefixes.unpin(snapshot)
        return Prefill(T, tuple(chunks))

    def _next_chunk(self, prompt: Prompt, T: int, pinned: list[int]) -> Chunk:
        """Moves a prompt on; what it reads and writes stays pinned until the action is complete."""
        assert prompt.lane is not None
        start, source, snapshot = prompt.position, prompt.source, None
        prompt.done += 1
        prompt.source = None
        if source is not None:
            pinned.append(source)
        if prompt.done <= len(prompt.keys):
            key = prompt.keys[prompt.done - 1]
            self.prefixes.cease_to_compute((key,))
            snapshot = self.prefixes.save(prompt.keys, prompt.done)
            if snapshot is not None:
                pinned.append(self.prefixes.pin(key))
        tokens = prompt.job.tokens[start : start + T]
        return Chunk(prompt.lane, prompt.job, start, tokens, source, snapshot, prompt.ready)

    def check(self) -> None:
        """Compares what is stored twice; raises AssertionError."""
        in_lanes = [prompt for prompt in self._lanes if prompt]
        for lane, prompt in enumerate(self._lanes):
            assert prompt is None or prompt.lane == lane
            assert prompt not in self.queue
        for prompt in self.queue:
            assert (prompt.lane, prompt.done) == (None, 0)
            assert prompt.overtaken <= self.lookahead
        assert len(set(in_lanes)) == len(in_lanes)
        self.prefixes.check(
            (prompt.starts for prompt in self.queue),
            (prompt.keys[prompt.done :] for prompt in in_lanes),
            (prompt.source for prompt in in_lanes if prompt.source is not None),
        )


def plan_chunks(length: int, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """How a prompt is cut: (T, start) of each chunk.

    It depends on nothing but the length, since in bfloat16 other shapes round differently: as many
    of the largest size as are full, then one of the smallest size that holds the rest.

    Args:
      length: tokens of the prompt, at least one.
      sizes: ascending.
    """
    largest = sizes[-1]
    rest = length % largest
    chunks = [(largest, start) for start in range(0, length - rest, largest)]
    if rest:
        chunks.append((next(size for size in sizes if size >= rest), length - rest))
    return chunks
