"""The parts of a report in their order, before they are Markdown or HTML."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

from mimo_jax.portability import matrices, tables
from mimo_jax.portability.reasons import Reasons
from mimo_jax.portability.results import Results
from mimo_jax.portability.table import Table


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
      name: for links to it.
      title: of the part.
      short: of the link to it.
      text: what it is about.
      tables: that it has; those without rows are left out.
      empty: what to say if none is left.
      plot: drawn above the tables, where that can be.
    """

    name: str
    title: str
    short: str
    text: str
    tables: Sequence[Table]
    empty: str
    plot: Literal["memory", "roofline", ""] = ""

    @property
    def filled(self) -> list[Table]:
        """The tables that have rows."""
        return [table for table in self.tables if table.rows]


def sections(results: Results, reasons: Reasons) -> Iterator[Section]:
    """Everything between the introduction and the list of reasons."""
    yield Section(
        "overview",
        "At a glance",
        "At a glance",
        "Which operations work where, counted. The next two parts have each step and each case.",
        [matrices.overview(results)],
        "The study has no operations.",
    )
    yield Section(
        "steps",
        "Whole steps of models",
        "Models",
        "Prefill reads a prompt, decode produces one token of each sequence, verify checks several "
        "drafted tokens at once. The second line is the memory that each device needs, of that "
        "which programs can have.",
        list(matrices.steps(results, reasons)),
        "The study has no steps of models.",
    )
    yield Section(
        "operations",
        "Operations, one backend at a time",
        "Operations",
        "A case is a size, named after the model that has it, with its tokens; small ones are "
        "awkward on purpose.",
        list(matrices.operations(results, reasons)),
        "The study has no operations.",
    )
    yield Section(
        "memory",
        "Memory",
        "Memory",
        "What compilers say that programs need on one device.",
        list(tables.memory(results)),
        "Nothing was compiled, so nothing is known of memory.",
        "memory",
    )
    yield Section(
        "programs",
        "What programs are made of",
        "Programs",
        "Read from the compiled programs: what travels between devices, and what is launched.",
        [tables.collectives(results), tables.launches(results)],
        "Nothing was compiled.",
    )
    yield from _measured(results, reasons)


def _measured(results: Results, reasons: Reasons) -> Iterator[Section]:
    yield Section(
        "speed",
        "Numbers and speed",
        "Speed",
        "Only what was run has these. The bars are fractions of the roofline: the time that "
        "reading the data or doing the arithmetic would take at the device's full speed, over the "
        "time that was measured.",
        [tables.numerics(results, reasons), tables.unmeasured(results, reasons)],
        "The study has no rows.",
        "roofline",
    )
    yield Section(
        "slices",
        "How large a machine a model needs",
        "Slices",
        "A slice is a number of devices that are connected. This is what the planner "
        "(mimo-jax plan) says.",
        [tables.slices(results)],
        "Slices were not planned in this study.",
    )
    yield Section(
        "rows",
        "Every row",
        "All rows",
        "",
        [tables.everything(results, reasons)],
        "The study has no rows.",
    )
    yield Section(
        "runs",
        "Where and when",
        "Runs",
        "",
        [tables.runs(results)],
        "The study says nothing of where and when it was run.",
    )
