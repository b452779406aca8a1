"""A device without arrays, which refuses what a real one would compute wrongly.

A cache is the tuple of the chunks that it was computed from, and the tokens of a row say whose they
are, so that any mix-up shows.
"""

import dataclasses
import hashlib
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from mimo_jax.engine.actions import Action, Decode, Insert, Job, Prefill, Result, Row
from mimo_jax.engine.scheduler import Scheduler

SIZES = (2, 4, 8)
MAX_LEN = 48


class CachedChunk(NamedTuple):
    T: int
    start: int
    tokens: tuple[int, ...]


class Token(NamedTuple):
    job: Job
    index: int
    place: int


Cache = tuple[CachedChunk, ...]


def chance(*what: object) -> int:
    """A number that follows from its arguments."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:4])


def wanted_cache(tokens, sizes) -> Cache:
    """What the cache of a prompt must be computed from."""
    chunks, start = [], 0
    while start < len(tokens):
        rest = len(tokens) - start
        T = sizes[-1] if rest >= sizes[-1] else min(s for s in sizes if s >= rest)
        chunks.append(CachedChunk(T, start, tuple(tokens[start : start + T])))
        start += min(T, rest)
    return tuple(chunks)


@dataclasses.dataclass
class DeviceRow:
    row: Row
    text: list[Token]
    done: int = 0

    @property
    def name(self) -> tuple[Job, int]:
        return (self.row.job, self.row.index)

    @property
    def ended(self) -> bool:
        return self.done == len(self.text)

    def advance(self, n: int) -> list[Token]:
        tokens = self.text[self.done : self.done + n]
        self.done += len(tokens)
        return tokens


class Output(NamedTuple):
    """What an action gave, by slot."""

    action: Action
    tokens: dict[int, list[Token]]
    ended: dict[int, bool]


class SimulatedDevice:
    """Runs a scheduler's actions, and keeps their outputs until `report`.

    Args:
      scheduler: its only source of actions.
      options: of the scheduler.
      steps: tokens that a row gets from a dispatch.
      extra: how many more it may get, as with speculation.

    Attributes:
      has_eos: whether completions may end before max_tokens.
      log: all actions.
      texts: tokens that the host was to keep, by job and index of the completion.
      finished: completions that came to their own end.
      host_ended: completions that the host has ended before.
      computed: chunks computed for each job.
    """

    def __init__(self, scheduler: Scheduler, options: dict[str, Any], steps: int, extra: int = 0):
        self.scheduler, self.options, self.steps, self.extra = scheduler, options, steps, extra
        self.sizes = options["chunk_sizes"]
        self.lanes: dict[int, tuple[Job, Cache]] = {}
        self.slots: list[DeviceRow | None] = [None] * options["slots"]
        self.snapshots: list[Cache] = [()] * options["snapshots"]
        self.has_eos = True
        self.outputs: deque[Output] = deque()
        self.log: list[Action] = []
        self.texts: dict[tuple[Job, int], list[Token]] = {}
        self.finished: set[tuple[Job, int]] = set()
        self.host_ended: set[tuple[Job, int]] = set()
        self.computed: Counter[Job] = Counter()
        self._serials: set[int] = set()

    def text(self, job: Job, index: int) -> list[Token]:
        """A completion, as long as the cache or an end-of-sequence lets it be."""
        most = min(job.max_tokens, self.scheduler.max_len - len(job.tokens))
        length = most
        if self.has_eos:
            length = min(most, 1 + chance(tuple(job.tokens), index) % (2 * most))
        return [Token(job, index, i) for i in range(length)]

    def execute(self, action: Action) -> None:
        self.log.append(action)
        tokens: dict[int, list[Token]] = {}
        if isinstance(action, Prefill):
            self._prefill(action)
        elif isinstance(action, Insert):
            self._insert(action)
        else:
            tokens = self._decode(action)
        ended = {slot: row.ended for slot, row in enumerate(self.slots) if row and slot in tokens}
        self.outputs.append(Output(action, tokens, ended))

    def _prefill(self, action: Prefill) -> None:
        assert action.chunks
        assert len({chunk.lane for chunk in action.chunks}) == len(action.chunks)
        written = [c.save_snapshot for c in action.chunks if c.save_snapshot is not None]
        assert len(set(written)) == len(written)
        assert not set(written) & {chunk.from_snapshot for chunk in action.chunks}
        for chunk in action.chunks:
            assert 0 <= chunk.lane < self.options["lanes"]
            if chunk.from_snapshot is not None:
                owner, cache = chunk.job, self.snapshots[chunk.from_snapshot]
                assert cache, "an empty snapshot"
            elif chunk.start == 0:
                owner, cache = chunk.job, ()
            else:
                owner, cache = self.lanes[chunk.lane]
            assert owner is chunk.job
            cache = (*cache, CachedChunk(action.T, chunk.start, tuple(chunk.tokens)))
            wanted = wanted_cache(owner.tokens, self.sizes)
            assert cache == wanted[: len(cache)]
            assert chunk.last == (cache == wanted)
            self.lanes[chunk.lane] = (owner, cache)
            self.computed[owner] += 1
        for chunk in action.chunks:
            if chunk.save_snapshot is not None:
                cache = self.lanes[chunk.lane][1]
                assert all(len(part.tokens) == self.sizes[-1] for part in cache)
                self.snapshots[chunk.save_snapshot] = cache

    def _insert(self, action: Insert) -> None:
        row, before = action.row, self.slots[action.row.slot]
        job, cache = self.lanes[action.lane]
        assert job is row.job
        assert cache == wanted_cache(job.tokens, self.sizes)
        assert row.max_tokens == min(job.max_tokens, self.scheduler.max_len - len(job.tokens))
        assert row.serial not in self._serials
        assert (job, row.index) not in self.host_ended
        if before is not None and not before.ended:
            assert before.name in self.host_ended, "an unfinished row was overwritten"
        self._serials.add(row.serial)
        self.slots[row.slot] = DeviceRow(row, self.text(job, row.index))

    def _decode(self, action: Decode) -> dict[int, list[Token]]:
        assert action.rows
        for slot in action.stopped:
            row = self.slots[slot]
            assert row is not None
            assert row.name in self.host_ended
            row.text = row.text[: row.done]
        tokens = {}
        for slot, now in enumerate(self.slots):
            if now is not None and now.row in action.rows:
                more = chance(now.row.serial, now.done) % (self.extra + 1)
                tokens[slot] = now.advance(self.steps + more)
            else:
                assert now is None or now.ended, "an unfinished row stands still"
        assert set(tokens) == {row.slot for row in action.rows}
        return tokens

    def report(self) -> None:
        """Hands the oldest output to the scheduler, and its tokens to their completions."""
        action, tokens, ended = self.outputs.popleft()
        results = {slot: Result(len(tokens[slot]), ended[slot]) for slot in tokens}
        for row in self.scheduler.report(action, results):
            name = (row.job, row.index)
            assert name not in self.host_ended
            assert name not in self.finished
            self.texts.setdefault(name, []).extend(tokens[row.slot])
            if ended[row.slot]:
                self.finished.add(name)
                assert self.texts[name] == self.text(*name), "lost, doubled or another's tokens"

    def end(self, job: Job, index: int | None = None) -> None:
        indices = range(job.n) if index is None else [index]
        names = {(job, i) for i in indices} - self.finished - self.host_ended
        assert self.scheduler.end(job.key, index) == bool(names)
        self.host_ended |= names

    def step(self) -> None:
        """One turn of the loop."""
        action = self.scheduler.next()
        if action is not None:
            self.execute(action)
        else:
            assert self.outputs, "nothing to dispatch, nothing to report, but not idle"
            self.report()
        self.scheduler.check()

    def run(self) -> None:
        """Until nothing is left to do."""
        while not self.scheduler.idle:
            self.step()


def make_device(
    prompts: Iterable[Sequence[int] | Job] = (), steps: int = 4, **options: Any
) -> tuple[SimulatedDevice, list[Job]]:
    """A device whose scheduler knows its steps, and its jobs, which are submitted."""
    defaults = {"slots": 2, "lanes": 2, "max_len": MAX_LEN, "chunk_sizes": SIZES, "snapshots": 0}
    options = {**defaults, **options}
    device = SimulatedDevice(Scheduler(**options, steps=steps), options, steps)
    jobs = [job if isinstance(job, Job) else Job(i, job, 9) for i, job in enumerate(prompts)]
    for job in jobs:
        device.scheduler.submit(job)
    return device, jobs


def assert_all_is_free(device: SimulatedDevice) -> None:
    scheduler, options = device.scheduler, device.options
    scheduler.check()
    assert scheduler.idle
    assert scheduler.next() is None
    stats = scheduler.stats
    assert (stats.waiting, stats.prefilling, stats.running) == (0, 0, 0)
    assert (stats.free_slots, stats.free_lanes) == (options["slots"], options["lanes"])
    prefixes = scheduler._lanes.prefixes
    assert stats.cache_used == sum(prefixes.lengths()) * device.sizes[-1]
    prefixes.check([], [], [])
    scheduler._slots.check({}, [])
