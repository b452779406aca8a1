"""A report as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from mimo_jax.portability import schema, texts, wording
from mimo_jax.portability.reasons import Reason, Reasons
from mimo_jax.portability.results import FILE, SCHEMA, Results
from mimo_jax.portability.sections import Section, sections
from mimo_jax.portability.table import Cell, Table

# What Markdown would read; underscores within words are left alone by it.
_SPECIAL = re.compile(r"[\\`*\[\]<>|~&#$]|(?<![^\W_])_|_(?![^\W_])")


def markdown(results: Results) -> str:
    """The whole report.

    Args:
      results: of a study.

    Returns:
      GitHub's Markdown, which ends in a line end.
    """
    reasons = Reasons.of(results)
    parts = [*_head(results)]
    for section in sections(results, reasons):
        parts += _section(section)
    parts += _reasons(reasons)
    parts += _schema()
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, on a line."""
    return _SPECIAL.sub(r"\\\g<0>", wording.line(text, most=10**6))


def _head(results: Results) -> Iterator[str]:
    yield f"# {texts.TITLE}"
    yield from texts.INTRO
    yield f"**{escaped(texts.summary(results))}**"
    runs = [f"- {escaped(text)}" for text in texts.circumstances(results)]
    yield "\n".join(runs) or "Where and when is not known."
    yield "## How to read it"
    stages = [f"{n}. **{name}**: {text}" for n, (name, text) in enumerate(texts.STAGES, 1)]
    yield "Each row of the study goes through five stages:\n\n" + "\n".join(stages)
    statuses = [f"- {wording.SYMBOLS[s]} {words}: {text}" for s, words, text in texts.STATUSES]
    statuses.append(f"- {wording.NO_ROW}: no row of that kind was asked for.")
    yield "\n".join(statuses)
    yield texts.MEMORY
    yield "Names such as R1 are reasons, which are [listed below](#reasons)."
    yield "Backends:\n\n" + "\n".join(f"- `{name}`: {text}" for name, text in texts.BACKENDS)
    yield texts.TARGETS


def _section(section: Section) -> Iterator[str]:
    yield f"## {section.title}"
    if section.text:
        yield section.text
    if not section.filled:
        yield section.empty
    for table in section.filled:
        yield from markdown_table(table)


def markdown_table(table: Table) -> Iterator[str]:
    """A caption, the table, and its note."""
    yield f"**{escaped(table.caption)}**"
    rule = [{"<": "---", ">": "---:"}[align] for align in table.align]
    lines = [list(map(escaped, table.columns)), rule]
    lines += [["<br>".join(map(_cell, cell)) for cell in row] for row in table.rows]
    yield "\n".join(_row(line) for line in lines)
    if table.note:
        yield escaped(table.note)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(cell: Cell) -> str:
    text = escaped(cell.text)
    return f"{text} [{cell.reason}](#{cell.reason.lower()})" if cell.reason else text


def _reasons(reasons: Reasons) -> Iterator[str]:
    yield "## Reasons"
    yield f"Why rows failed, were refused or weren't run. Long messages are whole in {FILE}."
    if not reasons.found:
        yield "There are none: everything is ok."
    for reason in reasons:
        yield f"### {reason.name}"
        yield f"{wording.SYMBOLS[reason.status]} {reason.summary()}"
        yield fenced(wording.excerpt(reason.text))
        yield "\n".join(_places(reason))


def _places(reason: Reason) -> Iterator[str]:
    for text in reason.where():
        yield f"- {escaped(text)}"


def fenced(text: str) -> str:
    """A block of text, whatever backquotes it has."""
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _schema() -> Iterator[str]:
    yield f"## The schema of {FILE}"
    yield (
        f"An object with the fields of Results and `schema`, which is {SCHEMA}: another number is "
        "another schema. Numbers may be NaN or Infinity, as Python writes them."
    )
    for entry in schema.entries():
        yield f"### {entry.name}"
        yield escaped(entry.text)
        lines = [["field", "type", "meaning"], ["---"] * 3]
        lines += [[f"`{n}`", escaped(kind), escaped(text)] for n, kind, text in entry.fields]
        yield "\n".join(_row(line) for line in lines)
