"""A report as one HTML page that needs nothing else."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator, Sequence
from html import escape

from mimo_jax.portability import plots, schema, texts, wording
from mimo_jax.portability.reasons import Reason, Reasons
from mimo_jax.portability.results import FILE, SCHEMA, Results
from mimo_jax.portability.sections import Section, sections
from mimo_jax.portability.table import Cell, Table

_CSS = "report.css"
# Nothing is loaded or run, whatever a message may have brought in.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
# Characters of a cell from which on its lines may break.
_LONG = 60
# Characters of a message that the page has.
_MESSAGE = 6000


def html(results: Results) -> str:
    """The whole report.

    Args:
      results: of a study.

    Returns:
      A page in UTF-8 without scripts, which loads nothing.
    """
    reasons = Reasons.of(results)
    parts = list(sections(results, reasons))
    return "\n".join(
        [
            *_head(),
            *_top(results, parts),
            "<main>",
            *_how(),
            *(line for part in parts[:-2] for line in _section(part, results)),
            *_reasons(reasons),
            *(line for part in parts[-2:] for line in _section(part, results)),
            *_schema(),
            "</main>\n</body>\n</html>\n",
        ]
    )


def _head() -> Iterator[str]:
    css = importlib.resources.files(__package__).joinpath(_CSS).read_text(encoding="utf-8")
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield '<meta name="color-scheme" content="light dark">'
    yield f"<title>{escape(texts.TITLE)}</title>\n<style>\n{css}</style>\n</head>\n<body>"


def _top(results: Results, parts: Sequence[Section]) -> Iterator[str]:
    yield f"<header>\n<h1>{escape(texts.TITLE)}</h1>"
    yield from (f"<p>{escape(text)}</p>" for text in texts.INTRO)
    yield from _tiles(results)
    yield "<ul class=circumstances>"
    yield from (f"<li>{escape(text)}</li>" for text in texts.circumstances(results))
    yield '</ul>\n<nav aria-label="Parts of the report">'
    links = [("how", "How to read it"), *((part.name, part.short) for part in parts)]
    links[-2:-2] = [("reasons", "Failures and reasons")]
    links.append(("schema", "Schema"))
    yield from (f'<a href="#{name}">{escape(title)}</a>' for name, title in links)
    yield "</nav>\n</header>"


def _tiles(results: Results) -> Iterator[str]:
    """The study in six numbers, and in a sentence."""
    yield '<ul class="tiles">'
    for status, n, words in texts.totals(results):
        mark = f"<b>{wording.SYMBOLS[status]} {n:,}</b> {escape(words)}"
        yield f'<li class="{_class(status)}">{mark}</li>'
    yield f"</ul>\n<p>{escape(texts.summary(results))}</p>"


def _how() -> Iterator[str]:
    yield '<section id="how"><h2>How to read it</h2>'
    yield "<p>A row of the study is one case on one target by one backend. It goes through five "
    yield "stages:</p><ol>"
    yield from (f"<li><b>{escape(n)}</b>: {escape(text)}</li>" for n, text in texts.STAGES)
    yield '</ol><p>How it ended:</p><dl class="legend">'
    for status, words, text in texts.STATUSES:
        mark = f'<span class="{_class(status)}">{wording.SYMBOLS[status]} {words}</span>'
        yield f"<dt>{mark}</dt><dd>{escape(text)}</dd>"
    yield f'<dt><span class="no-row">{wording.NO_ROW}</span></dt>'
    yield "<dd>No such row was asked for.</dd></dl>"
    yield f"<p>{escape(texts.MEMORY)}</p>"
    yield '<p>Names such as R1 lead to <a href="#reasons">the reasons</a>.</p>'
    yield "<details><summary>What backends and targets are</summary><dl>"
    for name, text in texts.BACKENDS:
        yield f"<dt><code>{escape(name)}</code></dt><dd>{escape(text)}</dd>"
    yield f"</dl><p>{escape(texts.TARGETS)}</p></details></section>"


def _section(section: Section, results: Results) -> Iterator[str]:
    yield f'<section id="{section.name}"><h2>{escape(section.title)}</h2>'
    if section.text:
        yield f"<p>{escape(section.text)}</p>"
    if section.plot == "memory":
        yield from _memory_plot(results)
    if section.plot == "roofline":
        yield from _roofline_plot(results)
    if not section.filled:
        yield f'<p class="empty">{escape(section.empty)}</p>'
    for table in section.filled:
        yield from html_table(table)
    yield "</section>"


def _memory_plot(results: Results) -> Iterator[str]:
    groups = plots.memory_groups(results)
    if groups:
        keys = " ".join(f'<span class="key {part}">{part}</span>' for part in plots.PARTS)
        caption = (
            "Steps of models: memory of one device. The line is what programs can have of it. "
            + keys
        )
        yield from plots.figure("memory", caption, "the memory that programs can have", groups)


def _roofline_plot(results: Results) -> Iterator[str]:
    groups = plots.roofline_groups(results)
    if not groups:
        yield "<p>Nothing was timed on a device whose full speed is known: there are no bars.</p>"
        return
    caption = "Fraction of the roofline. The line is 100%: the device's full speed."
    yield from plots.figure("roofline", caption, "100%", groups)


def html_table(table: Table) -> Iterator[str]:
    """A table that scrolls by itself, folded if it is long."""
    caption = escape(table.caption)
    if table.folded:
        rows = wording.count(len(table.rows), "row")
        yield f"<details><summary>{caption} ({rows})</summary>"
    yield f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}"><table>'
    yield f"<caption><span>{caption}</span></caption><thead><tr>"
    for column, align in zip(table.columns, table.align, strict=True):
        yield f'<th scope="col"{_align(align)}>{escape(column)}</th>'
    yield "</tr></thead><tbody>"
    for row in table.rows:
        pairs = list(zip(row, table.align, strict=True))
        first = f'<th scope="row">{"<br>".join(map(_cell, row[0]))}</th>'
        yield f"<tr>{first}{''.join(_td(cells, align) for cells, align in pairs[1:])}</tr>"
    yield "</tbody></table></div>"
    if table.note:
        yield f'<p class="note">{escape(table.note)}</p>'
    if table.folded:
        yield "</details>"


def _align(align: str) -> str:
    return ' class="number"' if align == ">" else ""


def _td(cells: Sequence[Cell], align: str) -> str:
    return f"<td{_align(align)}>{''.join(map(_line, cells))}</td>"


def _line(cell: Cell) -> str:
    long = ' class="long"' if len(cell.text) > _LONG else ""
    return f"<div{long}>{_cell(cell)}</div>"


def _cell(cell: Cell) -> str:
    text = escape(wording.plain(cell.text))
    if cell.kind:
        text = f'<span class="{_class(cell.kind)}">{text}</span>'
    if cell.reason:
        text += f' <a href="#{cell.reason.lower()}">{cell.reason}</a>'
    return text


def _class(kind: str) -> str:
    return kind.replace(" ", "-")


def _reasons(reasons: Reasons) -> Iterator[str]:
    yield '<section id="reasons"><h2>Failures, and other reasons</h2>'
    yield (
        "<p>Why rows failed, were refused or were not run; equal reasons together. "
        f"Messages that are cut here are whole in {FILE}.</p>"
    )
    if not reasons.found:
        yield '<p class="empty">There are none: everything is ok.</p>'
    for reason in reasons:
        yield from _reason(reason)
    yield "</section>"


def _reason(reason: Reason) -> Iterator[str]:
    """Folded, but for failures; a link to what is within unfolds it."""
    status, shown = reason.status, " open" if reason.status == "failed" else ""
    yield (
        f'<details class="reason"{shown}><summary><b>{reason.name}</b> '
        f'<span class="{_class(status)}">{wording.SYMBOLS[status]} {reason.summary()}</span> '
        f"{escape(wording.headline(reason.text))}</summary>"
    )
    text = wording.excerpt(reason.text, _MESSAGE, 120)
    yield f'<pre id="{reason.name.lower()}" tabindex="0">{escape(text)}</pre><ul>'
    yield from (f"<li>{escape(place)}</li>" for place in reason.where())
    yield "</ul></details>"


def _schema() -> Iterator[str]:
    yield f'<section id="schema"><h2>The schema of {FILE}</h2>'
    yield (
        f"<p>The data behind this page is in {FILE} beside it: an object with the fields of "
        f"Results and <code>schema</code>, which is {SCHEMA}.</p>"
    )
    for entry in schema.entries():
        yield f"<details><summary>{entry.name}: {escape(entry.text)}</summary><dl>"
        for name, kind, text in entry.fields:
            yield f"<dt><code>{name}</code> ({escape(kind)})</dt><dd>{escape(text)}</dd>"
        yield "</dl></details>"
    yield "</section>"
