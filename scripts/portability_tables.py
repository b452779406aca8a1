"""The tables of docs/portability.md, for scripts/tables.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

STEPS = ("decode", "verify", "prefill")
GIB, MIB = 2**30, 2**20


def support(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Targets by operations: the backends that do some or all of the cases."""
    rows = [row for row in result["rows"] if row["subject"] not in STEPS]
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    lines = []
    for target in dict.fromkeys(row["target"] for row in rows):
        here = [row for row in rows if row["target"] == target]
        lines.append([target, *(_backends(here, subject) for subject in subjects)])
    return ["target", *subjects], lines


def _backends(rows: Sequence[dict[str, Any]], subject: str) -> str:
    found: dict[str, list[bool]] = {}
    for row in rows:
        if row["subject"] == subject:
            tried = [s["status"] for s in row["stages"].values() if s["status"] != "not run"]
            found.setdefault(row["backend"], []).append(set(tried) == {"ok"})
    cells = []
    for backend, did in found.items():
        if any(did):
            part = "" if all(did) else f" ({sum(did)} of {len(did)})"
            cells.append(backend + part)
    return ", ".join(cells) or "none"


def steps(result: dict[str, Any], model: str) -> tuple[list[str], list[list[str]]]:
    """A model's decoding step on each target that it was compiled for."""
    lines = []
    for row in result["rows"]:
        # Those that were cut to be run are in the other table.
        if row["subject"] == "decode" and row["case"].startswith(f"{model}:"):
            lines.append([row["target"], row["mesh"] or "one device", *_step(row)])
    header = ["target", "mesh", "compiles", "GiB a device", "of", "temporary MiB"]
    return [*header, "all-reduce", "kernels", "seconds"], lines


def _step(row: dict[str, Any]) -> Iterator[str]:
    program, stages = row["program"], row["stages"]
    if program is None:
        reason = next(s["reason"] for s in stages.values() if s["status"] in ("failed", "refused"))
        yield "too large" if "RESOURCE_EXHAUSTED" in reason else "no"
        yield from [""] * 6
        return
    names = ("argument_bytes", "output_bytes", "temp_bytes", "code_bytes")
    needed = sum(program[name] or 0 for name in names) - program["alias_bytes"]
    usable = program["usable_bytes"]
    fits = usable is None or needed <= usable
    yield "yes" if fits else "yes, doesn't fit"
    yield f"{needed / GIB:.1f}"
    yield "" if usable is None else f"{usable / GIB:.1f}"
    yield f"{program['temp_bytes'] / MIB:,.1f}"
    yield str(program["collectives"].get("all-reduce", {"count": 0})["count"])
    yield str(sum(program["kernels"].values()))
    yield f"{sum(stages[name]['seconds'] for name in ('trace', 'lower', 'compile')):.0f}"


def hardware(result: dict[str, Any], *targets: str) -> tuple[list[str], list[list[str]]]:
    """What was timed on all of these targets, side by side."""
    by_case: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["speed"] is not None and row["target"] in targets:
            key = row["subject"], row["case"], row["backend"]
            by_case.setdefault(key, {})[row["target"]] = row
    lines = []
    for (subject, case, backend), found in by_case.items():
        if len(found) == len(targets):
            error = max(found[t]["agreement"]["error"] for t in targets)
            times = [found[t]["speed"]["seconds"] for t in targets]
            cells = [_time(found[t]["speed"]) for t in targets]
            faster = f"{times[0] / times[-1]:.2f}"
            lines.append([f"{subject}, {case}", backend, f"{error:.1e}", *cells, faster])
    return ["", "backend", "error", *targets, "times as fast"], lines


def _time(speed: dict[str, Any]) -> str:
    us = speed["seconds"] * 1e6
    text = f"{us / 1e3:.2f} ms" if us >= 1e3 else f"{us:.1f} us"
    bound = speed["roofline_seconds"]
    return text if bound is None else f"{text} ({bound / speed['seconds']:.0%})"
