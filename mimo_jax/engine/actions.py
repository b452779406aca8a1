"""What the scheduler and the device loop say to each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import NamedTuple


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A prompt to complete.

    Attributes:
      key: its name, which no other unfinished job has.
      tokens: of the prompt, at least one.
      max_tokens: tokens that each completion may have.
      n: completions.
    """

    key: Hashable
    tokens: Sequence[int]
    max_tokens: int
    n: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One completion in one slot.

    Attributes:
      serial: no other row ever has it, so that results of a slot's earlier row are told apart.
      slot: where it is decoded.
      job: whose completion it is.
      index: which of the job's completions, from 0 to job.n - 1.
      max_tokens: tokens that it may have, with which prompt and completion fit into the cache.
    """

    serial: int
    slot: int
    job: Job
    index: int
    max_tokens: int


class Chunk(NamedTuple):
    """A part of a prompt, to be appended to the cache of a lane.

    Attributes:
      lane: whose cache it is.
      job: whose prompt it is.
      start: position of the first token.  At 0 the lane begins anew, whatever its cache has.
      tokens: 1 to T of them.  The rest up to T is padding, which must not be stored: `start` + T
        may be beyond the cache.
      from_snapshot: to be copied to the lane before, or None.
      save_snapshot: to which the lane is to be copied afterwards, or None.
      last: whether the prompt ends with it.
    """

    lane: int
    job: Job
    start: int
    tokens: Sequence[int]
    from_snapshot: int | None
    save_snapshot: int | None
    last: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Prefill:
    """Runs a chunk of T tokens in each of some lanes, of which all others stay as they are.

    Snapshots are read before the chunks run, and written afterwards.
    """

    T: int
    chunks: tuple[Chunk, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Insert:
    """Copies a lane's cache to a slot, where a row begins; its first token is that of a Decode.

    Attributes:
      lane: whose prompt is complete.
      row: what the slot has from now on; what it had before is over.
    """

    lane: int
    row: Row


@dataclasses.dataclass(frozen=True, eq=False)
class Decode:
    """Advances the rows of the slots.

    Attributes:
      rows: the rows that may be unfinished, by slot.  All others do nothing.
      stopped: slots whose rows the device takes for unfinished, but which the host has ended: the
        device must end them first.  Empty unless `Scheduler.end` was called.
    """

    rows: tuple[Row, ...]
    stopped: tuple[int, ...]


Action = Prefill | Insert | Decode


class Result(NamedTuple):
    """What an action gave a row: how many tokens, and whether it has ended with them."""

    tokens: int
    ended: bool
