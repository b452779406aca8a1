"""Why things aren't ok: equal reasons together, each with a number."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

from mimo_jax.portability import wording
from mimo_jax.portability.results import STAGES, Results, Row, Stage, StageName, Status

# In the order in which they are told.
_ORDER: tuple[Status, ...] = ("failed", "refused", "not run")


@dataclasses.dataclass(frozen=True)
class Reason:
    """One reason, and everything that it is given for.

    Attributes:
      number: in the report, from 1 on.
      status: what it explains.
      text: whole.
      places: rows, and the stages of each.
    """

    number: int
    status: Status
    text: str
    places: tuple[tuple[Row, tuple[StageName, ...]], ...]

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"R{self.number}"

    def summary(self) -> str:
        """How often it occurs."""
        stages = wording.count(sum(len(s) for _, s in self.places), "stage")
        return f"{self.status}: {stages} of {wording.count(len(self.places), 'row')}"

    def where(self) -> Iterator[str]:
        """A line for each subject, with the cases and targets that have this reason."""
        return gathered((row, ", ".join(stages)) for row, stages in self.places)


def gathered(rows: Iterable[tuple[Row, str]]) -> Iterator[str]:
    """Rows and what is said of them in few lines: cases and targets of the same together."""
    targets: dict[tuple[str, str, str, str], list[str]] = {}
    for row, said in rows:
        key = row.subject, row.backend, said, row.case
        targets.setdefault(key, []).append(wording.place(row))
    cases: dict[tuple[str, ...], list[str]] = {}
    for (subject, backend, said, case), places in targets.items():
        key = subject, backend, said, "; ".join(dict.fromkeys(places))
        cases.setdefault(key, []).append(case)
    for (subject, backend, said, places), names in cases.items():
        of = "; ".join(wording.line(name) for name in names)
        yield f"{wording.line(subject)} ({of}) by {wording.line(backend)} on {places}: {said}"


@dataclasses.dataclass(frozen=True)
class Reasons:
    """All of a study, by status and text."""

    found: Mapping[tuple[Status, str], Reason]

    @classmethod
    def of(cls, results: Results) -> Reasons:
        """Failures first, and of each status the most frequent."""
        places: dict[tuple[Status, str], list[tuple[Row, tuple[StageName, ...]]]] = {}
        for row in results:
            mine: dict[tuple[Status, str], list[StageName]] = {}
            for name in STAGES:
                stage = row.stages[name]
                if stage.status != "ok":
                    mine.setdefault((stage.status, stage.reason), []).append(name)
            for key, stages in mine.items():
                places.setdefault(key, []).append((row, tuple(stages)))
        order = sorted(places, key=lambda key: (_ORDER.index(key[0]), -len(places[key])))
        return cls({k: Reason(n, *k, tuple(places[k])) for n, k in enumerate(order, 1)})

    def __iter__(self) -> Iterator[Reason]:
        return iter(self.found.values())

    def name(self, stage: Stage) -> str:
        """Of a stage's reason; "" if it is ok."""
        reason = self.found.get((stage.status, stage.reason))
        return reason.name if reason else ""
