"""The tables of a report that aren't support matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mimo_jax.portability import wording
from mimo_jax.portability.matrices import is_step
from mimo_jax.portability.reasons import Reasons
from mimo_jax.portability.results import STAGES, Program, Results, Room, Row, Run, Slice
from mimo_jax.portability.table import Cell, Table, cells, listed, room_cell, stage_cell, state

_WHO = ("what", "where", "backend")


def _who(row: Row) -> tuple[str, str, str]:
    return wording.subject(row), wording.place(row), wording.line(row.backend)


def _compiled(rows: Sequence[Row]) -> Iterator[tuple[Row, Program]]:
    for row in rows:
        if row.program is not None:
            yield row, row.program


def memory(results: Results) -> Iterator[Table]:
    """What programs need of a device's memory: steps of models, then operations."""
    for what, wanted in (("Steps of models", True), ("Operations", False)):
        found = list(_compiled([row for row in results if is_step(row) is wanted]))
        if found:
            yield Table(
                f"{what}: memory of one device",
                [*_WHO, "needed, of usable", "arguments", "results", "temporary", "code"],
                "<<<<>>>>",
                [cells(*_who(row), *_buffers(program)) for row, program in found],
                "Results that take the place of arguments are counted once, as arguments.",
                folded=not wanted,
            )


def _buffers(program: Program) -> tuple[str | Cell, ...]:
    code = program.code_bytes
    return (
        room_cell(program.needed_bytes, program.usable_bytes, program.fits),
        wording.size(program.argument_bytes),
        wording.size(program.output_bytes - program.alias_bytes),
        wording.size(program.temp_bytes),
        "not said" if code is None else wording.size(code),
    )


def collectives(results: Results) -> Table:
    """What devices exchange, a row for each program that exchanges anything."""
    found = [(row, p) for row, p in _compiled(results.rows) if p.collectives]
    rest = sum(row.program is not None for row in results) - len(found)
    return Table(
        "Collectives: what the devices of a program exchange",
        [*_WHO, "kind", "how many", "bytes on a device"],
        "<<<<>>",
        [
            cells(
                *_who(row),
                [Cell(wording.line(kind)) for kind in p.collectives],
                [Cell(f"{x.count:,}") for x in p.collectives.values()],
                [Cell(wording.size(x.bytes)) for x in p.collectives.values()],
            )
            for row, p in found
        ],
        "Sums by kernels of our own (`all_reduce`) are among the kernels, and not here."
        + (f" {wording.count(rest, 'further program')} compiled without any." if rest else ""),
    )


def launches(results: Results) -> Table:
    """What a program is made of."""
    return Table(
        "Programs: kernels, fusions and calls of libraries",
        [*_WHO, "own kernels", "fusions", "library calls", "most registers", "spills"],
        "<<<<>><<",
        [
            cells(
                *_who(row),
                listed(p.kernels),
                f"{p.fusions:,}",
                f"{p.library_calls:,}",
                _registers(p),
                [Cell(f"✗ {wording.line(name)}", "failed") for name in p.spills] or "none",
            )
            for row, p in _compiled(results.rows)
        ],
        "Registers of a thread are known of Mosaic GPU kernels only. A kernel that spills keeps "
        "values in memory for want of registers, which is slow.",
        folded=True,
    )


def _registers(program: Program) -> str:
    if not program.registers:
        return "not known"
    name = max(program.registers, key=lambda name: program.registers[name])
    return f"{program.registers[name]} ({wording.line(name)})"


def numerics(results: Results, reasons: Reasons) -> Table:
    """Errors and speeds of what was run."""
    found = [row for row in results if row.agreement is not None or row.speed is not None]
    compared = dict.fromkeys(wording.line(r.agreement.compared) for r in found if r.agreement)
    return Table(
        "Numbers and speed of what was run",
        [*_WHO, "error", "allowed", "time", "at full speed", "of roofline", "read", "work", "run"],
        "<<<>>>>>>><",
        [cells(*_who(row), *_measured(row, reasons), f"run {row.run + 1}") for row in found],
        " ".join(
            [
                "Error: norm of the difference over the norm of the float32 reference.",
                *(f"Compared: {text.rstrip('.')}." for text in compared if text),
            ]
        ),
        folded=len(found) > 40,
    )


def _measured(row: Row, reasons: Reasons) -> list[str | Cell]:
    agreement, speed = row.agreement, row.speed
    error = wording.error(agreement.error) if agreement else ""
    found: list[str | Cell] = [
        stage_cell(row.stages["agree"], reasons, error),
        wording.error(agreement.limit) if agreement else "not run",
    ]
    if agreement and row.stages["agree"].status == "failed":
        name = reasons.name(row.stages["agree"])
        found[0] = Cell(f"✗ {error}", "failed", name)
    if speed is None:
        none = Cell("not run", "no row")
        return [*found, stage_cell(row.stages["time"], reasons), *[none] * 4]
    known = speed.roofline_seconds is not None
    return [
        *found,
        wording.duration(speed.seconds),
        wording.duration(speed.roofline_seconds) if speed.roofline_seconds is not None else "-",
        wording.percent(speed.fraction) if known and speed.fraction is not None else "not known",
        wording.size(speed.bytes),
        wording.number(speed.flops, "FLOP"),
    ]


def unmeasured(results: Results, reasons: Reasons) -> Table:
    """Why rows were not checked or not timed, by reason."""
    found: dict[tuple[str, str], int] = {}
    for row in results:
        mine: dict[str, list[str]] = {}
        for name, verb in (("agree", "not checked"), ("time", "not timed")):
            if row.stages[name].status not in ("ok", "failed"):
                mine.setdefault(reasons.name(row.stages[name]), []).append(verb)
        for why, verbs in mine.items():
            key = ", ".join(verbs), why
            found[key] = found.get(key, 0) + 1
    by_name = {reason.name: reason for reason in reasons}
    return Table(
        "What was not checked or not timed, and why",
        ["what", "rows", "status", "why"],
        "<><<",
        [
            cells(
                verbs,
                f"{n:,}",
                state(by_name[why].status, reason=why),
                wording.headline(by_name[why].text),
            )
            for (verbs, why), n in sorted(found.items(), key=lambda item: -item[1])
        ],
    )


def slices(results: Results) -> Table:
    """The smallest slice of each device that holds a model."""
    at = sorted({(room.batch, room.context) for s in results.slices for room in s.rooms})
    headings = [f"batch {batch:,} x {context:,}" for batch, context in at]
    return Table(
        "The smallest slice of each kind of device that holds a model, by its plan",
        ["model", "device", "slice", "mesh", "weights", "usable", *headings],
        "<<<<>>" + "<" * len(at),
        [_slice(s, at) for s in results.slices],
        "Bytes are those of one device. Columns by batch x context are all that a device needs: "
        "weights, cache and an estimate of temporary memory. It is computed, not compiled."
        if results.slices
        else "",
    )


def _slice(s: Slice, at: Sequence[tuple[int, int]]) -> list[Sequence[Cell]]:
    rooms: dict[tuple[int, int], Room] = {(r.batch, r.context): r for r in s.rooms}
    name, device = wording.line(s.model), wording.line(s.device)
    if s.reason:
        none = Cell(f"✗ none: {wording.line(s.reason)}", "failed")
        blank = Cell("no slice", "no row")
        return cells(name, device, none, *[blank] * (3 + len(at)))
    return cells(
        name,
        device,
        f"{wording.line(s.topology)} ({wording.count(s.devices, 'device')})",
        wording.line(s.mesh) or "one device",
        wording.size(s.weight_bytes),
        wording.size(s.usable_bytes),
        *(
            room_cell(rooms[key].bytes, s.usable_bytes, rooms[key].fits)
            if key in rooms
            else Cell("not computed", "no row")
            for key in at
        ),
    )


def runs(results: Results) -> Table:
    """Where and when rows were made."""
    return Table(
        "Where and when it was run",
        ["run", "when", "machine", "devices present", "versions", "compilers", "command"],
        "<<<<<<<",
        [_run(n, run, results) for n, run in enumerate(results.runs)],
    )


def _run(n: int, run: Run, results: Results) -> list[Sequence[Cell]]:
    rows = sum(row.run == n for row in results)
    commit = f"commit {wording.line(run.commit)[:12]}" if run.commit else "commit not known"
    return cells(
        f"run {n + 1}",
        [
            Cell(wording.line(run.at)),
            Cell(f"took {wording.duration(run.seconds)}"),
            Cell(wording.count(rows, "row")),
        ],
        [
            Cell(wording.line(run.cpu)),
            Cell(wording.count(run.cores, "core")),
            Cell(f"Python {wording.line(run.python)}"),
        ],
        "; ".join(f"{n} x {wording.line(kind)}" for kind, n in run.devices.items()) or "CPU only",
        [Cell(text) for text in (*_named(run.versions), commit)],
        [Cell(text) for text in _named(run.compilers)] or "none",
        wording.line(run.command),
    )


def _named(versions: Mapping[str, str]) -> list[str]:
    return [f"{wording.line(name)} {wording.line(version)}" for name, version in versions.items()]


def everything(results: Results, reasons: Reasons) -> Table:
    """Each row with how each of its stages ended."""
    return Table(
        "All rows: how each stage ended, and how long it took",
        [*_WHO, *STAGES, "run"],
        "<" * (len(_WHO) + len(STAGES) + 1),
        [
            cells(
                *_who(row),
                *(stage_cell(row.stages[name], reasons) for name in STAGES),
                f"run {row.run + 1}",
            )
            for row in results
        ],
        folded=True,
    )
