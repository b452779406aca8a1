"""Bars of a report as SVG within HTML: the words are HTML, so that they wrap on narrow screens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from html import escape

from mimo_jax.portability import wording
from mimo_jax.portability.matrices import is_step
from mimo_jax.portability.results import Program, Results, Row
from mimo_jax.portability.table import ordered

# Beyond this bars are cut off; the number beside says how long they would be.
_LONGEST = 2.0
PARTS = ("arguments", "results", "temporary", "code")


@dataclasses.dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
      label: what it is of.
      text: its length in words, and what it means.
      details: more, for those who point at it or can't see it.
      parts: lengths by the class of their colour, as fractions of the limit.
      good: whether it is as it should be; None if there is no saying.
    """

    label: str
    text: str
    details: str
    parts: Sequence[tuple[str, float]]
    good: bool | None = None

    @property
    def length(self) -> float:
        """Of all parts, as a fraction of the limit."""
        return sum(length for _, length in self.parts)


@dataclasses.dataclass(frozen=True)
class Group:
    """Bars that are compared with each other, and what they have in common."""

    title: str
    bars: Sequence[Bar]


def memory_groups(results: Results) -> list[Group]:
    """Bars of steps of models beside a device's memory, by target; operations are small."""
    rows = [row for row in results if is_step(row)]
    groups = [
        Group(wording.line(target), [_memory(r, r.program) for r in rows if _on(r, target)])
        for target in ordered(rows)
    ]
    return [group for group in groups if group.bars]


def _on(row: Row, target: str) -> bool:
    return row.target == target and row.program is not None and bool(row.program.usable_bytes)


def _memory(row: Row, program: Program | None) -> Bar:
    assert program is not None  # `_on` says so, and
    assert program.usable_bytes
    sizes = (
        program.argument_bytes,
        program.output_bytes - program.alias_bytes,
        program.temp_bytes,
        program.code_bytes or 0,
    )
    used = [(name, n) for name, n in zip(PARTS, sizes, strict=True) if n > 0]
    verdict = "✓ fits" if program.fits else "✗ too large"
    needed, usable = wording.size(program.needed_bytes), wording.size(program.usable_bytes)
    spent = ", ".join(f"{name} {wording.size(n)}" for name, n in used)
    mesh = f" · {wording.line(row.mesh)}" if row.mesh else ""
    backend = "" if row.backend == "auto" else f" · {wording.line(row.backend)}"
    return Bar(
        f"{wording.subject(row)}{mesh}{backend}",
        f"{verdict}: {needed} of {usable}",
        f"{needed} of {usable}: {spent}",
        [(name, n / program.usable_bytes) for name, n in used],
        program.fits,
    )


def roofline_groups(results: Results) -> list[Group]:
    """Bars of what was timed, by target and subject."""
    found: dict[tuple[str, str], list[Bar]] = {}
    for target in ordered(results):
        for row in results:
            speed = row.speed
            if row.target == target and speed is not None and speed.fraction is not None:
                found.setdefault((row.target, row.subject), []).append(
                    Bar(
                        f"{wording.line(row.case)} · {wording.line(row.backend)}",
                        f"{wording.percent(speed.fraction)} in {wording.duration(speed.seconds)}",
                        f"{wording.percent(speed.fraction)} of the roofline",
                        [("speed", speed.fraction)],
                    )
                )
    return [Group(f"{wording.line(t)}: {wording.line(s)}", bars) for (t, s), bars in found.items()]


def figure(name: str, caption: str, limit: str, groups: Sequence[Group]) -> Iterator[str]:
    """Groups of bars on one scale.

    Args:
      name: unique in the page.
      caption: what the bars are; HTML.
      limit: what the line on each bar is.
      groups: of bars.

    Yields:
      HTML.
    """
    lengths = [bar.length for group in groups for bar in group.bars]
    scale = min(max([1.0, *(x for x in lengths if x == x)]) * 1.02, _LONGEST)
    yield f'<figure id="plot-{name}" class="bars"><figcaption>{caption}</figcaption>'
    for g, group in enumerate(groups):
        yield f'<div class="group"><h4>{escape(group.title)}</h4><ul>'
        for b, bar in enumerate(group.bars):
            yield from _bar(f"{name}-{g}-{b}", bar, limit, scale)
        yield "</ul></div>"
    yield "</figure>"


def _bar(name: str, bar: Bar, limit: str, scale: float) -> Iterator[str]:
    kind = "" if bar.good is not False else " bad"
    yield f'<li><span class="label">{escape(bar.label)}</span>'
    yield f'<span class="value{kind}">{escape(bar.text)}</span>'
    yield (
        f'<svg role="img" aria-labelledby="{name}-t {name}-d" width="100%" height="16">'
        f'<title id="{name}-t">{escape(bar.label)}</title>'
        f'<desc id="{name}-d">{escape(f"{bar.details}; the line is {limit}")}</desc>'
    )
    yield f'<rect class="track" width="{_percent(1 / scale)}" height="16"/>'
    start = 0.0
    for part, length in bar.parts:
        end = min(max(start + length, start), scale) if length == length else start
        x, width = _percent(start / scale), _percent((end - start) / scale)
        yield f'<rect class="{part}" x="{x}" width="{width}" y="2" height="12"/>'
        start = end
    at = _percent(1 / scale)
    yield f'<line class="limit" x1="{at}" x2="{at}" y1="0" y2="16"/></svg></li>'


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}%"
