"""A comparison of two studies in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mimo_jax.portability import wording
from mimo_jax.portability.markdown import escaped
from mimo_jax.portability.reasons import gathered
from mimo_jax.portability.results import Row

if TYPE_CHECKING:
    from mimo_jax.portability.compare import Change, Comparison

    _Item = Change | Row | tuple[str, str, str]


def markdown(comparison: Comparison) -> str:
    """The whole comparison, regressions first.

    Args:
      comparison: of two studies.

    Returns:
      Markdown with a list for each kind of change that there is.
    """
    parts = ["# What changed between two studies", verdict(comparison)]
    parts += _circumstances(comparison)
    for title, text, found in _lists(comparison):
        if found:
            parts += [f"## {title} ({len(found):,})", *([text] if text else [])]
            parts.append("\n".join(_lines(found)))
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


def _lists(comparison: Comparison) -> Iterator[tuple[str, str, Sequence[_Item]]]:
    c = comparison
    yield "Regressions", "These were ok.", c.regressions
    yield "Repaired", "", c.repairs
    yield (
        "Not run any more",
        "These were ok and weren't run this time: neither better nor worse.",
        c.not_run,
    )
    yield "Other stages", "", c.statuses
    yield "New rows", "", c.appeared
    yield "Rows that are gone", "", c.vanished
    yield "Memory of a device", "", c.memory
    yield "What programs are made of", "", c.programs
    yield "Speed", "Slower ones first.", c.speed
    yield "Errors beside the reference", "Larger ones first.", c.errors
    yield "Smallest slices", "", c.slices


def _lines(found: Sequence[_Item]) -> Iterator[str]:
    """A line for each change; rows that are alike are in one."""
    rows = [(item, _got(item)) for item in found if isinstance(item, Row)]
    yield from (f"- {escaped(text)}" for text in gathered(rows))
    for item in found:
        if isinstance(item, tuple):
            yield _line(*item)
        elif not isinstance(item, Row):
            why = f" ({escaped(wording.headline(item.reason))})" if item.reason else ""
            yield _line(f"{_who(item.row)}: {item.what}", item.before, item.after) + why


def _got(row: Row) -> str:
    """How far a row got, without numbers."""
    status, name = wording.worst(row)
    said = {"ok": wording.WORKS[name], "failed": wording.FAILS[name]}
    return said.get(status, status)


def _line(what: str, before: str, after: str) -> str:
    return f"- {escaped(what)}: {escaped(before)} -> {escaped(after)}"


def _who(row: Row) -> str:
    return f"{wording.subject(row)} on {wording.place(row)} by {wording.line(row.backend)}"
