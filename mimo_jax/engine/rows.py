"""The rows of the decode batch: which slots are free, and whose the results are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from mimo_jax.engine.actions import Decode, Result, Row


@dataclasses.dataclass(eq=False)
class _State:
    """A row, until it is over and all actions it takes part in are reported.

    Attributes:
      tokens: how many are reported.
      unreported: how many actions are not.
      over: whether it has ended by a report, or by the host.
      by_host: the latter.
    """

    row: Row
    tokens: int = 0
    unreported: int = 0
    over: bool = False
    by_host: bool = False


class Rows:
    """Rows in slots, and rows that have left theirs, but whose results are still to come.

    A slot is free as soon as the device is sure to have ended its row when it comes to the next
    action.  That is before the report for rows that reach their max_tokens.

    Args:
      slots: how many.
      steps: tokens that an unfinished row gets from a Decode at least.
    """

    def __init__(self, slots: int, steps: int):
        self.steps = steps
        self._slots: list[_State | None] = [None] * slots
        self._states: dict[Row, _State] = {}
        self._stopped: set[int] = set()  # the device doesn't know yet that their rows are over

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def free(self) -> int | None:
        """A slot without a row."""
        return next((i for i, state in enumerate(self._slots) if state is None), None)

    @property
    def running(self) -> list[Row]:
        """The rows in slots."""
        return [state.row for state in self._slots if state]

    @property
    def cache_used(self) -> int:
        """Positions that are known to have something of use."""
        states = [state for state in self._slots if state]
        return sum(len(state.row.job.tokens) + state.tokens for state in states)

    def insert(self, row: Row) -> None:
        """Puts a row into its slot, which is free."""
        state = _State(row)
        self._states[row] = self._slots[row.slot] = state
        self._stopped.discard(row.slot)

    def decode(self) -> Decode:
        """The next action for all rows in slots."""
        action = Decode(tuple(self.running), tuple(sorted(self._stopped)))
        self._stopped.clear()
        for row in action.rows:
            state = self._states[row]
            state.unreported += 1
            if self._certain_to_end(state):
                self._leave(state)
        return action

    def end(self, row: Row) -> None:
        """Ends an unfinished row, of whose results nothing is kept any more."""
        state = self._states[row]
        state.over = state.by_host = True
        if self._leave(state):
            self._stopped.add(row.slot)
        self._forget_if_reported(state)

    def report(self, rows: Iterable[Row], results: Mapping[int, Result]) -> list[Row]:
        """Counts what an action gave its rows, and says of which rows it is to be kept.

        Args:
          rows: of the action.
          results: by slot.

        Raises:
          ValueError: the device can't have done this.
        """
        return [row for row in rows if self._take(self._states[row], results[row.slot])]

    def _take(self, state: _State, result: Result) -> bool:
        kept = not state.over
        state.unreported -= 1
        if kept:
            state.tokens += result.tokens
            _refuse_impossible(state, result, self.steps)
            state.over = result.ended
            if state.over or self._certain_to_end(state):
                self._leave(state)
        elif result.tokens and not state.by_host:
            raise ValueError(f"{_name(state.row)} got {result.tokens} tokens after it had ended")
        self._forget_if_reported(state)
        return kept

    def _certain_to_end(self, state: _State) -> bool:
        return state.tokens + state.unreported * self.steps >= state.row.max_tokens

    def _leave(self, state: _State) -> bool:
        """Frees the row's slot, if it still has it."""
        if self._slots[state.row.slot] is not state:
            return False
        self._slots[state.row.slot] = None
        return True

    def _forget_if_reported(self, state: _State) -> None:
        if state.over and not state.unreported:
            del self._states[state.row]

    def check(self, unreported: Mapping[Row, int], unfinished: Iterable[Row]) -> None:
        """Compares what is known with what it should be; raises AssertionError.

        Args:
          unreported: how many unreported actions each row takes part in.
          unfinished: rows of completions that have not ended.
        """
        known = {row: state.unreported for row, state in self._states.items() if state.unreported}
        assert known == unreported
        assert {row for row, state in self._states.items() if not state.over} == set(unfinished)
        for slot, state in enumerate(self._slots):
            if state:
                assert self._states[state.row] is state
                assert state.row.slot == slot
                assert not state.over
                assert slot not in self._stopped
        for state in self._states.values():
            assert state.unreported or state in self._slots


def _name(row: Row) -> str:
    return f"completion {row.index} of job {row.job.key!r} in slot {row.slot}"


def _refuse_impossible(state: _State, result: Result, least: int) -> None:
    most, ended = state.row.max_tokens, result.ended
    if state.tokens > most or (state.tokens == most and not ended):
        raise ValueError(
            f"{_name(state.row)} has {state.tokens} tokens and "
            f"{'has ended' if ended else 'goes on'}; the device must end it with {most}"
        )
    if result.tokens < least and not ended:
        raise ValueError(
            f"{_name(state.row)} got {result.tokens} tokens and goes on, but an unfinished row "
            f"gets at least {least}: give the scheduler the least that a dispatch does as `steps`"
        )
