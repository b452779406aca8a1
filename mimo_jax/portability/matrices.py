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


def is_step(row: Row) -> bool:
    """Whether a row is a step of a model, rather than an operation."""
    return row.subject in STEPS or row.backend == "auto"


def overview(results: Results) -> Table:
    """Targets by operations: how far the cases of each backend get."""
    rows = [row for row in results if not is_step(row)]
    subjects = list(dict.fromkeys(row.subject for row in rows))
    return Table(
        "Operations on each target: backends, and how many cases get how far",
        ["target", *map(wording.line, subjects)],
        "<" * (1 + len(subjects)),
        [
            cells(
                wording.line(target),
                *(
                    _tally([r for r in rows if (r.target, r.subject) == (target, subject)])
                    for subject in subjects
                ),
            )
            for target in ordered(rows)
        ],
        "Where a device was not present, compiling is as far as a case can get.",
    )


def _tally(rows: Sequence[Row]) -> list[Cell]:
    if not rows:
        return [_EMPTY]
    found: dict[str, collections.Counter[tuple[Status, str]]] = {}
    for row in rows:
        status, name = wording.worst(row)
        words = wording.GETS[name] if status == "ok" else status
        found.setdefault(row.backend, collections.Counter())[status, words] += 1
    return [
        Cell(f"{wording.SYMBOLS[status]} {wording.line(backend)}: {n} {words}", status)
        for backend, counts in found.items()
        for (status, words), n in counts.items()
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
    return ", ".join(
        dict.fromkeys(wording.line(row.case).split(" ")[0].strip(":,") for row in rows)
    )


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
