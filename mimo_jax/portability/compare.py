"""What changed from one study to another: between versions of jax, devices or commits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from mimo_jax.portability import wording
from mimo_jax.portability.results import STAGES, Program, Results, Row, Run, Slice

# Changes that are smaller are not told, as parts of the first study's number.
MEMORY = 0.01
SPEED = 0.05
ERROR = 0.10

Key = tuple[str, str, str, str, str]


@dataclasses.dataclass(frozen=True)
class Change:
    """One thing that isn't as it was.

    Attributes:
      row: of the second study; of the first where the second has none.
      what: a stage, or a measurement.
      before, after: in words.
      reason: of a stage that isn't ok any more, whole.
    """

    row: Row
    what: str
    before: str
    after: str
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All that changed.

    Attributes:
      circumstances: what, before, after: versions, devices, commits and times that differ.
      shared: those that don't: what, and its value.
      compared: how many rows both studies have.
      regressions: stages that were ok, and failed or were refused, and programs that fitted.
      repairs: stages that failed or were refused, and are ok.
      not_run: stages that were ok and weren't run; that is no regression.
      statuses: other stages whose status changed.
      appeared: rows of the second study only.
      vanished: rows of the first study only.
      memory: bytes of a device, by more than MEMORY.
      programs: collectives, kernels, fusions, calls of libraries and spills.
      speed: times, by more than SPEED; those that became longer come first.
      errors: beside the reference, by more than ERROR; those that became larger come first.
      slices: model and device, before, after.
    """

    circumstances: tuple[tuple[str, str, str], ...]
    shared: tuple[tuple[str, str], ...]
    compared: int
    regressions: tuple[Change, ...]
    repairs: tuple[Change, ...]
    not_run: tuple[Change, ...]
    statuses: tuple[Change, ...]
    appeared: tuple[Row, ...]
    vanished: tuple[Row, ...]
    memory: tuple[Change, ...]
    programs: tuple[Change, ...]
    speed: tuple[Change, ...]
    errors: tuple[Change, ...]
    slices: tuple[tuple[str, str, str], ...]

    @property
    def same(self) -> bool:
        """Whether nothing that was studied changed, whatever the circumstances."""
        lists = (self.regressions, self.repairs, self.not_run, self.statuses, self.appeared)
        more = (self.vanished, self.memory, self.programs, self.speed, self.errors, self.slices)
        return not any((*lists, *more))

    def markdown(self) -> str:
        """The comparison as Markdown, which also reads well in a terminal."""
        from mimo_jax.portability.compare_text import markdown

        return markdown(self)


def compare(a: Results, b: Results, targets: Mapping[str, str] | None = None) -> Comparison:
    """What changed from one study to another.

    Args:
      a: before.
      b: after.
      targets: names in `b` of targets of `a` that have another name there, such as
        {"h100": "h200"}. Rows of `a` on h200, and of `b` on h100, are then left out.

    Raises:
      ValueError: `targets` names one that a study doesn't have, or has one twice.
    """
    before, after = _paired(a, b, dict(targets or {}))
    both = [(before[key], after[key]) for key in before if key in after]
    stages = [change for x, y in both for change in _stages(x, y)]
    programs = [(x, y, x.program, y.program) for x, y in both]
    pairs = [(x, y, p, q) for x, y, p, q in programs if p is not None and q is not None]
    circumstances, shared = _circumstances(a.runs, b.runs)
    return Comparison(
        circumstances=circumstances,
        shared=shared,
        compared=len(both),
        regressions=(*_of("regression", stages), *_outgrown(pairs)),
        repairs=_of("repair", stages),
        not_run=_of("not run", stages),
        statuses=_of("status", stages),
        appeared=tuple(row for key, row in after.items() if key not in before),
        vanished=tuple(row for key, row in before.items() if key not in after),
        memory=tuple(c for _, y, p, q in pairs for c in _memory(y, p, q)),
        programs=tuple(c for _, y, p, q in pairs for c in _made_of(y, p, q)),
        speed=_measured(both, "time", SPEED, _seconds, _speed),
        errors=_measured(both, "error", ERROR, _error, _error_text),
        slices=tuple(_slices(a.slices, b.slices)),
    )


def _paired(
    a: Results, b: Results, targets: dict[str, str]
) -> tuple[dict[Key, Row], dict[Key, Row]]:
    """Rows by key, those of the first study under the second's names of targets."""
    for side, names, results in (("first", targets, a), ("second", targets.values(), b)):
        there = {row.target for row in results}
        if missing := sorted(set(names) - there):
            have = ", ".join(sorted(there)) or "none"
            raise ValueError(f"the {side} study has no target {', '.join(missing)}; it has {have}")
    if len(set(targets.values())) < len(targets):
        raise ValueError("two targets of the first study can't be one of the second")
    only_a, only_b = set(targets) - set(targets.values()), set(targets.values()) - set(targets)
    before = {_renamed(row, targets).key: row for row in a if row.target not in only_b}
    return before, {row.key: row for row in b if row.target not in only_a}


def _renamed(row: Row, targets: Mapping[str, str]) -> Row:
    return dataclasses.replace(row, target=targets.get(row.target, row.target))


def _stages(x: Row, y: Row) -> Iterator[tuple[str, Change]]:
    """Stages of a row whose status changed, each with the kind of change.

    What wasn't run behind a regression follows from it, and isn't told.
    """
    broken = False
    for name in STAGES:
        before, after = x.stages[name].status, y.stages[name].status
        if before == after or (broken and after == "not run"):
            continue
        kind = "status"
        if before == "ok":
            kind = "not run" if after == "not run" else "regression"
        elif after == "ok" and before != "not run":
            kind = "repair"
        broken = broken or kind == "regression"
        reason = y.stages[name].reason or x.stages[name].reason
        yield kind, Change(y, name, before, after, reason)


def _of(kind: str, changes: Sequence[tuple[str, Change]]) -> tuple[Change, ...]:
    return tuple(change for k, change in changes if k == kind)


Pair = tuple[Row, Row, Program, Program]


def _outgrown(pairs: Iterable[Pair]) -> Iterator[Change]:
    """Programs that fitted into a device's memory, and don't."""
    for _, y, p, q in pairs:
        if p.fits and q.fits is False:
            yield Change(y, "memory", f"fits: {_of_usable(p)}", f"too large: {_of_usable(q)}")


def _of_usable(program: Program) -> str:
    usable = program.usable_bytes
    text = wording.size(program.needed_bytes)
    return text if usable is None else f"{text} of {wording.size(usable)}"


def _changed(before: float | int, after: float | int, limit: float) -> bool:
    if math.isnan(before) or math.isnan(after):
        return math.isnan(before) != math.isnan(after)
    return abs(after - before) > limit * abs(before)


def _memory(row: Row, p: Program, q: Program) -> Iterator[Change]:
    if _changed(p.needed_bytes, q.needed_bytes, MEMORY):
        after = f"{_of_usable(q)} ({change(p.needed_bytes, q.needed_bytes)})"
        yield Change(row, "memory needed", _of_usable(p), after)


def _made_of(row: Row, p: Program, q: Program) -> Iterator[Change]:
    """What a program is made of: each kind whose number or bytes changed."""
    for kind in sorted({*p.collectives, *q.collectives}):
        x, y = p.collectives.get(kind), q.collectives.get(kind)
        if x != y:
            texts = [f"{e.count:,} of {wording.size(e.bytes)}" if e else "none" for e in (x, y)]
            yield Change(row, kind, *texts)
    for backend in sorted({*p.kernels, *q.kernels}):
        n, m = p.kernels.get(backend, 0), q.kernels.get(backend, 0)
        if n != m:
            yield Change(row, f"kernels of {backend}", f"{n:,}", f"{m:,}")
    for what, n, m in (
        ("fusions", p.fusions, q.fusions),
        ("library calls", p.library_calls, q.library_calls),
    ):
        if n != m:
            yield Change(row, what, f"{n:,}", f"{m:,}")
    if set(p.spills) != set(q.spills):
        yield Change(row, "spills", ", ".join(p.spills) or "none", ", ".join(q.spills) or "none")


def _measured(
    both: Iterable[tuple[Row, Row]],
    what: str,
    limit: float,
    value: Callable[[Row], float | None],
    text: Callable[[Row], str],
) -> tuple[Change, ...]:
    """Rows whose number changed, those that grew most first."""
    found: list[tuple[float, Change]] = []
    for x, y in both:
        before, after = value(x), value(y)
        if before is None or after is None or not _changed(before, after, limit):
            continue
        growth = after / before if before and after == after and before == before else math.inf
        words = f"{text(y)} ({change(before, after)})"
        found.append((growth, Change(y, what, text(x), words)))
    return tuple(c for _, c in sorted(found, key=lambda item: -item[0]))


def change(before: float | int, after: float | int) -> str:
    """A change as a signed part of what was before."""
    if not before or not math.isfinite(before) or not math.isfinite(after):
        return "was none" if not before else "not a number"
    part = after / before - 1
    return f"{part:+.1%}" if abs(part) < 0.0995 else f"{part:+.0%}"


def _seconds(row: Row) -> float | None:
    return row.speed and row.speed.seconds


def _error(row: Row) -> float | None:
    return row.agreement and row.agreement.error


def _speed(row: Row) -> str:
    assert row.speed is not None
    text, fraction = wording.duration(row.speed.seconds), row.speed.fraction
    return text if fraction is None else f"{text}, {wording.percent(fraction)} of roofline"


def _error_text(row: Row) -> str:
    assert row.agreement is not None
    return f"{wording.error(row.agreement.error)}, {wording.error(row.agreement.limit)} allowed"


def _slices(a: Sequence[Slice], b: Sequence[Slice]) -> Iterator[tuple[str, str, str]]:
    before, after = ({(s.model, s.device): _slice(s) for s in slices} for slices in (a, b))
    for key in dict.fromkeys((*before, *after)):
        x, y = before.get(key, "not in the study"), after.get(key, "not in the study")
        if x != y:
            yield f"{key[0]} on {key[1]}", x, y


def _slice(s: Slice) -> str:
    if s.reason:
        return f"none: {s.reason}"
    weights = f"{wording.size(s.weight_bytes)} of weights a device"
    fitting = sum(room.fits for room in s.rooms)
    rooms = f"{fitting} of {len(s.rooms)} batches and contexts fit"
    return f"{s.topology}, {s.mesh or 'one device'}, {weights}, {rooms}"


def _circumstances(
    a: Sequence[Run], b: Sequence[Run]
) -> tuple[tuple[tuple[str, str, str], ...], tuple[tuple[str, str], ...]]:
    """Those that differ, and those that don't."""
    before, after = _facts(a), _facts(b)
    names = list(dict.fromkeys((*before, *after)))
    pairs = [(n, before.get(n, "not known"), after.get(n, "not known")) for n in names]
    differ = tuple(pair for pair in pairs if pair[1] != pair[2])
    return differ, tuple((n, x) for n, x, y in pairs if x == y)


def _facts(runs: Sequence[Run]) -> dict[str, str]:
    """What is known of runs by name; several values of one name together."""
    found: dict[str, list[str]] = {}
    for run in runs:
        devices = ", ".join(f"{n} x {kind}" for kind, n in run.devices.items())
        facts = {"when": run.at, "commit": run.commit or "not known"}
        facts |= {"devices": devices or "CPU only", "CPU": f"{run.cpu}, {run.cores} cores"}
        facts |= {"Python": run.python, **run.versions, **run.compilers, "command": run.command}
        for name, value in facts.items():
            found.setdefault(name, []).append(value)
    return {name: "; ".join(dict.fromkeys(values)) for name, values in found.items()}
