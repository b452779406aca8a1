"""A table as data, which the Markdown and the HTML of a report are written from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from mimo_jax.portability import wording
from mimo_jax.portability.reasons import Reasons
from mimo_jax.portability.results import Row, Stage, Status

# A status, or that there is no row; "fits" and "too large" of memory; "" for plain text.
Kind = Literal["ok", "failed", "refused", "not run", "no row", "fits", "too large", ""]


@dataclasses.dataclass(frozen=True)
class Cell:
    """Some text, what it says in a word, and the reason that explains it.

    Attributes:
      text: plain; any characters, but one line.
      kind: gives it a colour; the text says it too.
      reason: name of a reason of the report; "" for none.
    """

    text: str
    kind: Kind = ""
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A caption, headings and rows of cells that have one line or several.

    Attributes:
      caption: what it shows.
      columns: headings.
      align: "<" or ">" for each column.
      rows: a list of lines for each cell; the first cell names the row.
      note: what a reader has to know; "" for nothing.
      folded: whether it is long and of use to few.
    """

    caption: str
    columns: Sequence[str]
    align: str
    rows: Sequence[Sequence[Sequence[Cell]]]
    note: str = ""
    folded: bool = False


def cells(*texts: str | Cell | Sequence[Cell]) -> list[Sequence[Cell]]:
    """A row; plain texts are cells of one line."""
    return [[Cell(t)] if isinstance(t, str) else [t] if isinstance(t, Cell) else t for t in texts]


def state(status: Status, text: str = "", reason: str = "") -> Cell:
    """A status with its symbol."""
    return Cell(f"{wording.SYMBOLS[status]} {text or status}", status, reason)


def stage_cell(stage: Stage, reasons: Reasons, text: str = "") -> Cell:
    """A stage: what it measured or how long it took, or why it didn't."""
    if stage.status == "ok" and not text and stage.seconds is not None:
        text = wording.duration(stage.seconds)
    return state(stage.status, text if stage.status == "ok" else "", reasons.name(stage))


def row_cell(row: Row, reasons: Reasons, prefix: str = "") -> Cell:
    """A row in a few words, and the reason if it isn't ok or wasn't even compiled."""
    status, name = wording.worst(row)
    stage = row.stages[name]
    if status == "ok" and row.stages["compile"].status != "ok":
        stage = row.stages["compile"]
    return state(status, f"{prefix}{wording.outcome(row)}", reasons.name(stage))


def room_cell(needed: int, usable: int | None, fits: bool | None) -> Cell:
    """Memory that is needed, of that which there is."""
    if fits is None or usable is None:
        return Cell(f"{wording.size(needed)}, limit not known")
    text = f"{wording.size(needed)} of {wording.size(usable)}"
    return Cell(f"✓ {text}", "fits") if fits else Cell(f"✗ {text}, too large", "too large")


def ordered(rows: Iterable[Row]) -> list[str]:
    """Targets of rows, in the order in which they are shown."""
    return sorted(dict.fromkeys(row.target for row in rows), key=wording.target_order)


def listed(counts: Mapping[str, int | str]) -> str:
    """Names and numbers in a line; "none" if there are none."""
    return ", ".join(f"{wording.line(k)} {v}" for k, v in counts.items()) or "none"
