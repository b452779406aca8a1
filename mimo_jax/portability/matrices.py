"""Support matrices: what works where."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence

from mimo_jax.portability import wording
from mimo_jax.portability.reasons import Reasons
from mimo_jax.portability.results import Results, Row, Status
from mimo_jax.portability.table import Cell, Table, cells, ordered, room_cell, row_cell

STEPS = ("prefill", "decode", "verify")
_INTERPRETED = " interpreted"
_EMPTY = Cell(wording.NO_ROW, "no row")
_TALLY: tuple[tuple[Status, str], ...] = (
    ("ok", "ok"),
    ("failed", "failed"),
    ("refused", "refused"),
    ("not run", "not run"),
)


def is_step(row: Row) -> bool:
    """Whether a row is a step of a model, rather than an operation."""
    return row.subject in STEPS or row.backend == "auto"


def overview(results: Results) -> Table:
    """Operations by backend: how many cases work on each target."""
    rows = [row for row in results if not is_step(row)]
    targets = ordered(rows)
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        by_target = found.setdefault((row.subject, row.backend), {})
        by_target.setdefault(row.target, []).append(row)
    return Table(
        "Operations: cases of each target, by how they ended",
        ["operation", "backend", *map(wording.line, targets)],
        "<" * (2 + len(targets)),
        [
            cells(
                wording.line(subject),
                wording.line(backend),
                *(_tally(by_target.get(t, [])) for t in targets),
            )
            for (subject, backend), by_target in found.items()
        ],
        "“ok” is as far as it was run: where the device was not there, that is compiling.",
    )


def _tally(rows: Sequence[Row]) -> list[Cell]:
    if not rows:
        return [_EMPTY]
    found = collections.Counter(wording.worst(row)[0] for row in rows)
    return [
        Cell(f"{wording.SYMBOLS[status]} {found[status]} {word}", status)
        for status, word in _TALLY
        if found[status]
    ]


def steps(results: Results, reasons: Reasons) -> Iterator[Table]:
    """Whole steps of models; those that share targets in one table."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in results:
        if is_step(row):
            found.setdefault((row.case, row.subject), []).append(row)
    groups: list[tuple[set[str], list[Row]]] = []
    for rows in sorted(found.values(), key=lambda rows: -len({row.target for row in rows})):
        mine = {row.target for row in rows}
        group = next((members for targets, members in groups if mine <= targets), None)
        if group is None:
            groups.append((mine, list(rows)))
        else:
            group += rows
    for _, rows in groups:
        yield _matrix("Steps of models: " + _models(rows), rows, reasons)


def _models(rows: Sequence[Row]) -> str:
    """First words of the cases, which are the models' names."""
    return ", ".join(dict.fromkeys(wording.line(row.case).split(" ")[0] for row in rows))


def operations(results: Results, reasons: Reasons) -> Iterator[Table]:
    """The operations, a table for each backend."""
    found: dict[str, list[Row]] = {}
    for row in results:
        if not is_step(row):
            found.setdefault(row.backend.removesuffix(_INTERPRETED), []).append(row)
    for backend, rows in found.items():
        yield _matrix(f"Operations by {wording.line(backend)}", rows, reasons)


def _matrix(caption: str, rows: Sequence[Row], reasons: Reasons) -> Table:
    targets = ordered(rows)
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        by_target = found.setdefault((row.subject, row.case), {})
        by_target.setdefault(row.target, []).append(row)
    return Table(
        caption,
        ["what", *(_heading(target, rows) for target in targets)],
        "<" * (1 + len(targets)),
        [
            cells(
                wording.subject(next(iter(by_target.values()))[0]),
                *(_entries(by_target.get(target, []), reasons) for target in targets),
            )
            for by_target in found.values()
        ],
    )


def _heading(target: str, rows: Sequence[Row]) -> str:
    """A target, and how it is played if all its rows are interpreted."""
    mine = [row.backend.endswith(_INTERPRETED) for row in rows if row.target == target]
    return wording.line(target) + (_INTERPRETED if all(mine) else "")


def _entries(rows: Sequence[Row], reasons: Reasons) -> list[Cell]:
    """The rows of one subject, case and target, which differ in mesh or are interpreted."""
    if not rows:
        return [_EMPTY]
    played = {row.backend.endswith(_INTERPRETED) for row in rows}
    meshes = {row.mesh for row in rows}
    found: list[Cell] = []
    for row in rows:
        prefix = f"{row.mesh or 'one device'}: " if len(meshes) > 1 else ""
        if len(played) > 1 and row.backend.endswith(_INTERPRETED):
            prefix = f"interpreted: {prefix}"
        found.append(row_cell(row, reasons, wording.line(prefix) + " " if prefix else ""))
        if row.program is not None and is_step(row):
            program = row.program
            found.append(room_cell(program.needed_bytes, program.usable_bytes, program.fits))
    return found
