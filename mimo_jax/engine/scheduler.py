"""Continuous batching: which prompt's chunk, which row's tokens are computed next.

The scheduler knows no arrays.  It says what to dispatch (`next`), and is told what came of it later
(`report`).  The device works in the order of dispatch.  So what follows from a dispatch alone (a
chunk is in its lane, a snapshot can be read, a lane is empty once its rows are inserted) counts at
once, and only tokens and ends of rows are reported.

Nothing here depends on time or chance: the same calls get the same actions, in every process of a
job that has several.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

from mimo_jax.engine.actions import Action, Decode, Insert, Job, Prefill, Result, Row
from mimo_jax.engine.lanes import Lanes, Prompt
from mimo_jax.engine.rows import Rows


class Stats(NamedTuple):
    """What goes on at the moment, and how often prefixes were shared so far.

    Attributes:
      waiting: jobs in the queue.
      prefilling: jobs in lanes.
      running: rows in slots.
      free_slots: slots without a row.
      free_lanes: lanes without a job.
      cache_used: positions that have something of use, in slots, lanes and snapshots.
      cache_capacity: positions that there are.
      prefix_hits: jobs that started from a snapshot.
      prefix_tokens: tokens of prompts that they didn't have to compute.
    """

    waiting: int
    prefilling: int
    running: int
    free_slots: int
    free_lanes: int
    cache_used: int
    cache_capacity: int
    prefix_hits: int
    prefix_tokens: int


@dataclasses.dataclass(eq=False)
class _Task:
    """An unfinished job.

    Attributes:
      max_tokens: of each completion.
      to_insert: indices of completions that have no row yet.
      rows: of completions that have not ended, by index.
    """

    prompt: Prompt
    max_tokens: int
    to_insert: list[int]
    rows: dict[int, Row] = dataclasses.field(default_factory=dict)


class Scheduler:
    """Continuous batching over a fixed number of rows.

    The loop around it:

        while not scheduler.idle:
            action = scheduler.next()
            if action is not None:
                dispatched.append((action, dispatch(action)))
            else:
                action, output = dispatched.popleft()
                rows = scheduler.report(action, fetch(output))

    Args:
      slots: rows of the decode batch.
      lanes: prompts that are prefilled at the same time.
      max_len: positions of the cache of a slot, lane or snapshot.
      chunk_sizes: what T may be, ascending.
      snapshots: how many prefixes are kept; 0 shares none.
      prefill_share: prefill dispatches that there may be for each decode dispatch while rows
        decode; a fraction is possible.  Less gives tokens in a more even flow, but a share with
        which slots aren't filled as fast as they become free costs throughput.
      prefill_batch: while rows decode and other lanes are ready to be inserted, chunks wait until
        so many lanes have one, since a prefill dispatch costs the same for one lane as for all; by
        default all of them.  It delays nobody for whom a slot is free.
      steps: tokens that an unfinished row gets from a decode dispatch at least (its steps, or its
        rounds of speculation), so that the slot of a row that reaches its max_tokens is free
        without waiting for the report; 0 if unknown.
      in_flight: prefill and decode dispatches that may be unreported.
      lookahead: how many later jobs may overtake one that waits for a prefix.

    Raises:
      ValueError: a size is out of range.
    """

    def __init__(
        self,
        slots: int,
        lanes: int,
        max_len: int,
        chunk_sizes: Sequence[int],
        *,
        snapshots: int = 0,
        prefill_share: float | int = 4,
        prefill_batch: int | None = None,
        steps: int = 0,
        in_flight: int = 2,
        lookahead: int = 32,
    ):
        if prefill_batch is None:
            prefill_batch = lanes
        for name, value, least in (
            ("slots", slots, 1),
            ("lanes", lanes, 1),
            ("max_len", max_len, 2),
            ("snapshots", snapshots, 0),
            ("steps", steps, 0),
            ("in_flight", in_flight, 1),
            ("lookahead", lookahead, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if not 1 <= prefill_batch <= lanes:
            raise ValueError(f"prefill_batch is {prefill_batch}; it must be from 1 to {lanes}")
        if not prefill_share > 0:
            raise ValueError(f"prefill_share is {prefill_share}; it must be positive")
        sizes = tuple(chunk_sizes)
        if not sizes or sizes[0] < 1 or sizes != tuple(sorted(set(sizes))):
            raise ValueError(f"chunk_sizes are {sizes}; give positive ones in ascending order")
        self.max_len = max_len
        self.prefill_share = prefill_share
        self.prefill_batch = prefill_batch
        self.in_flight = in_flight
        self.draining = False
        self._lane_count = lanes
        self._tasks: dict[Hashable, _Task] = {}
        self._lanes = Lanes(lanes, sizes, snapshots, lookahead)
        self._slots = Rows(slots, steps)
        self._unreported: deque[Action] = deque()
        self._unreported_inserts = 0
        self._serial = 0
        self._credit = float(prefill_share)

    def submit(self, job: Job) -> int:
        """Puts a job at the end of the queue.

        Returns:
          How many tokens each of its completions may have: max_tokens, or what the cache holds
          beside the prompt.

        Raises:
          ValueError: it can't be done, or its key is in use.
          RuntimeError: `drain` was called.
        """
        length = len(job.tokens)
        if self.draining:
            raise RuntimeError(f"job {job.key!r} comes after drain(); give it to a new scheduler")
        if job.key in self._tasks:
            raise ValueError(f"there is an unfinished job {job.key!r} already; give it another key")
        if not length:
            raise ValueError("the prompt has no tokens; give it at least one")
        if length >= self.max_len:
            raise ValueError(
                f"the prompt has {length} tokens, which leaves no room to generate within the "
                f"cache's max_len of {self.max_len}; shorten it"
            )
        if job.max_tokens < 1 or job.n < 1:
            raise ValueError(f"max_tokens is {job.max_tokens}, n is {job.n}; each is at least 1")
        max_tokens = min(job.max_tokens, self.max_len - length)
        self._tasks[job.key] = _Task(self._lanes.add(job), max_tokens, list(range(job.n)))
        return max_tokens

    def end(self, key: Hashable, index: int | None = None) -> bool:
        """Ends a job, or one of its completions, wherever it is: at a stop string, or given up.

        What it gets by actions that are yet to be reported belongs to nobody.

        Returns:
          Whether there was anything to end.
        """
        task = self._tasks.get(key)
        if task is None:
            return False
        indices = [*task.to_insert, *task.rows] if index is None else [index]
        found = False
        for i in indices:
            if i in task.rows:
                self._slots.end(task.rows.pop(i))
                found = True
            elif i in task.to_insert:
                task.to_insert.remove(i)
                found = True
        self._let_go(key, task)
        return found

    def drain(self) -> list[Hashable]:
        """Ends admission: what is in lanes and slots is finished, and nothing else begins.

        Returns:
          The keys of the jobs that waited, which are given up.
        """
        self.draining = True
        keys = [prompt.job.key for prompt in self._lanes.queue]
        for key in keys:
            self.end(key)
        return keys

    def next(self) -> Action | None:
        """What to dispatch next; None if something must be reported (or submitted) first."""
        action = self._insert()
        if action is not None:
            self._unreported_inserts += 1
        elif len(self._unreported) - self._unreported_inserts < self.in_flight:
            self._lanes.admit()
            action = self._prefill_or_decode()
        if action is not None:
            self._unreported.append(action)
        return action

    def _insert(self) -> Insert | None:
        ready, slot = self._lanes.ready, self._slots.free
        if not ready or slot is None or self._unreported_inserts >= len(self._slots):
            return None
        lane, job = ready[0].lane, ready[0].job
        assert lane is not None
        task = self._tasks[job.key]
        self._serial += 1
        row = Row(self._serial, slot, job, task.to_insert.pop(0), task.max_tokens)
        task.rows[row.index] = row
        self._slots.insert(row)
        self._let_go(job.key, task)
        return Insert(lane, row)

    def _prefill_or_decode(self) -> Prefill | Decode | None:
        prefilling = len(self._lanes.prefilling)
        if not self._slots.running:
            return self._lanes.prefill() if prefilling else None
        enough = prefilling >= self.prefill_batch or not self._lanes.ready
        if prefilling and enough and self._credit >= 1:
            self._credit -= 1
            return self._lanes.prefill()
        self._credit = min(self._credit + self.prefill_share, max(1, self.prefill_share))
        return self._slots.decode()

    def report(self, action: Action, results: Mapping[int, Result] | None = None) -> list[Row]:
        """Takes what an action gave its rows.

        Args:
          action: the one whose dispatch is longest ago of those that aren't reported.
          results: of each row of a Decode, by slot.

        Returns:
          The rows whose tokens are to be kept.  Others had ended before, by the host or by what was
          reported.

        Raises:
          ValueError: reports came in another order than actions, or the device can't have done
            this.
        """
        results = results or {}
        if not self._unreported or self._unreported[0] is not action:
            expected = self._unreported[0] if self._unreported else "none"
            raise ValueError(f"{action} is reported; expected {expected}: report in order")
        rows = action.rows if isinstance(action, Decode) else ()
        if set(results) != {row.slot for row in rows}:
            raise ValueError(
                f"there are results of the slots {sorted(results)}, but the action has rows in "
                f"{sorted(row.slot for row in rows)}; give one for each"
            )
        self._unreported.popleft()
        self._unreported_inserts -= isinstance(action, Insert)
        kept = self._slots.report(rows, results)
        for row in kept:
            if results[row.slot].ended:
                task = self._tasks[row.job.key]
                del task.rows[row.index]
                self._let_go(row.job.key, task)
        return kept

    def _let_go(self, key: Hashable, task: _Task) -> None:
        """Frees what a job needs no more."""
        if not task.to_insert:
            self._lanes.remove(task.prompt)
            if not task.rows:
                del self._tasks[key]

    @property
    def idle(self) -> bool:
        """Whether all jobs are done and everything is reported."""
        return not self._tasks and not self._unreported

    @property
    def waiting(self) -> int:
        """Jobs in the queue: a loop that reads jobs from a file keeps some there, but not all."""
        return len(self._lanes.queue)

    @property
    def stats(self) -> Stats:
        """For progress bars and logs."""
        in_lanes = [*self._lanes.prefilling, *self._lanes.ready]
        prefixes, running = self._lanes.prefixes, len(self._slots.running)
        used = self._slots.cache_used + sum(prompt.position for prompt in in_lanes)
        caches = len(self._slots) + self._lane_count + prefixes.capacity
        return Stats(
            waiting=self.waiting,
            prefilling=len(in_lanes),
            running=running,
            free_slots=len(self._slots) - running,
            free_lanes=self._lane_count - len(in_lanes),
            cache_used=used + sum(prefixes.lengths()) * prefixes.chunk,
            cache_capacity=caches * self.max_len,
            prefix_hits=self._lanes.prefix_hits,
            prefix_tokens=self._lanes.prefix_tokens,
        )

    def check(self) -> None:
        """Compares what is stored twice; raises AssertionError."""
        decodes = [action for action in self._unreported if isinstance(action, Decode)]
        unreported = Counter(row for action in decodes for row in action.rows)
        inserts = [action for action in self._unreported if isinstance(action, Insert)]
        assert len(inserts) == self._unreported_inserts
        unfinished = [row for task in self._tasks.values() for row in task.rows.values()]
        self._slots.check(unreported, unfinished)
        self._lanes.check()
        prompts = {*self._lanes.queue, *self._lanes.prefilling, *self._lanes.ready}
        assert prompts == {task.prompt for task in self._tasks.values() if task.to_insert}
        for key, task in self._tasks.items():
            assert task.prompt.job.key == key
            assert task.to_insert or task.rows
            assert not set(task.to_insert) & set(task.rows)
