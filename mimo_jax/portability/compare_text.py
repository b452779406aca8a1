"""A comparison of two studies in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from mimo_jax.portability import wording
from mimo_jax.portability.markdown import escaped
from mimo_jax.portability.results import Row

if TYPE_CHECKING:
    from mimo_jax.portability.compare import Change, Comparison


def markdown(comparison: Comparison) -> str:
    """The whole comparison, regressions first.

    Args:
      comparison: of two studies.

    Returns:
      Markdown with a list for each kind of change that there is.
    """
    parts = ["# What changed between two studies", verdict(comparison)]
    parts += _circumstances(comparison)
    for title, text, lines in _lists(comparison):
        if lines:
            parts += [f"## {title} ({len(lines):,})", *([text] if text else []), "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def verdict(comparison: Comparison) -> str:
    """A sentence on whether anything became worse."""
    rows = f"{wording.count(comparison.compared, 'row')} in both studies"
    if comparison.regressions:
        return f"**{wording.count(len(comparison.regressions), 'regression')}**; {rows}."
    if not comparison.compared:
        return "**Nothing could be compared**: the studies have no row in common."
    if comparison.same:
        return f"No regressions, and no other changes; {rows}."
    return f"No regressions; {rows}."


def _circumstances(comparison: Comparison) -> Iterator[str]:
    yield "## Circumstances"
    lines = [_line(what, x, y) for what, x, y in comparison.circumstances]
    yield "\n".join(lines) or "The same in both."
    if comparison.shared and lines:
        shared = [f"{escaped(what)} {escaped(value)}" for what, value in comparison.shared]
        yield f"The same in both: {', '.join(shared)}."


def _lists(comparison: Comparison) -> Iterator[tuple[str, str, Sequence[str]]]:
    c = comparison
    yield "Regressions", "These were ok.", _changes(c.regressions)
    yield "Repaired", "", _changes(c.repairs)
    yield (
        "Not run any more",
        "These were ok and weren't run this time: neither better nor worse.",
        _changes(c.not_run),
    )
    yield "Other stages", "", _changes(c.statuses)
    yield "New rows", "", _rows(c.appeared)
    yield "Rows that are gone", "", _rows(c.vanished)
    yield "Memory of a device", "", _changes(c.memory)
    yield "What programs are made of", "", _changes(c.programs)
    yield "Speed", "Slower ones first.", _changes(c.speed)
    yield "Errors beside the reference", "Larger ones first.", _changes(c.errors)
    yield "Smallest slices", "", [_line(what, x, y) for what, x, y in c.slices]


def _changes(changes: Iterable[Change]) -> list[str]:
    """A line for each; what explains it stands behind."""
    found: list[str] = []
    for change in changes:
        line = _line(f"{_who(change.row)}: {change.what}", change.before, change.after)
        if change.reason:
            line += f" ({escaped(wording.headline(change.reason))})"
        found.append(line)
    return found


def _rows(rows: Iterable[Row]) -> list[str]:
    return [f"- {escaped(_who(row))}: {escaped(wording.outcome(row))}" for row in rows]


def _line(what: str, before: str, after: str) -> str:
    return f"- {escaped(what)}: {escaped(before)} -> {escaped(after)}"


def _who(row: Row) -> str:
    return f"{wording.subject(row)} on {wording.place(row)} by {wording.line(row.backend)}"
