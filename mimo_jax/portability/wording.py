"""How a report writes numbers, statuses and other programs' messages."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from mimo_jax.portability.results import STAGES, Row, Speed, StageName, Status

SYMBOLS: Mapping[Status, str] = {"ok": "✓", "failed": "✗", "refused": "⊘", "not run": "○"}
NO_ROW = "· not in the study"

# What a stage that is ok says of a row and of several, and one that failed of a row.
WORKS: Mapping[StageName, str] = {
    "trace": "traces",
    "lower": "lowers",
    "compile": "compiles",
    "agree": "agrees",
    "time": "timed",
}
GETS: Mapping[StageName, str] = {
    "trace": "trace",
    "lower": "lower",
    "compile": "compile",
    "agree": "agree",
    "time": "timed",
}
FAILS: Mapping[StageName, str] = {
    "trace": "fails to trace",
    "lower": "fails to lower",
    "compile": "fails to compile",
    "agree": "disagrees",
    "time": "fails when timed",
}

# Beginnings of targets in the order in which they are shown; others come last.
_TARGETS = ("cpu", "ampere", "a100", "hopper", "h100", "h200", "blackwell", "b200")
_TARGETS += ("v4", "v5e", "v5p", "v6e", "tpu7x")

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")  # colours, of a compiler that thinks it
_PICTURES = {c: 0x2400 + c for c in range(32) if chr(c) not in "\t\n"}  # writes to a terminal
_PICTURES |= {127: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_PICTURES |= dict.fromkeys([*range(0xD800, 0xE000), 0xFFFE, 0xFFFF], 0xFFFD)
# Characters that reorder the text around them, or are line ends to some and not to others.
_PICTURES |= dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)
_PICTURES |= dict.fromkeys([0x2028, 0x2029], "\n")


def size(nbytes: float | int) -> str:
    """Bytes in the unit that suits them."""
    for unit, digits in (("B", 0), ("KiB", 1), ("MiB", 1)):
        if round(nbytes, digits) < 1024:
            return f"{nbytes:.{digits}f} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.2f} GiB"


def duration(seconds: float | int) -> str:
    """A time in three digits, or minutes and seconds."""
    if not math.isfinite(seconds) or seconds < 0:
        return f"{seconds} s"
    if seconds >= 99.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes:,} min {rest:02} s"
    for scale, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * scale >= 0.9995 or unit == "us":
            return f"{_three(seconds * scale)} {unit}"
    raise AssertionError


def percent(fraction: float | int) -> str:
    """A fraction of something; a decimal below 10%."""
    return f"{fraction:.1%}" if abs(fraction) < 0.0995 else f"{fraction:.0%}"


def number(value: float | int, unit: str = "") -> str:
    """A large number in three digits and a prefix, such as 12.3 GFLOP."""
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale * 0.9995:
            return f"{_three(value / scale)} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def _three(value: float | int) -> str:
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}"


def error(value: float | int) -> str:
    """A relative error."""
    return f"{value:.1e}"


def count(n: int, one: str, many: str = "") -> str:
    """A number and a noun."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def plain(text: str) -> str:
    """Text without what a terminal or a browser would obey: control characters become visible."""
    return _ESCAPES.sub("", text.replace("\r\n", "\n")).translate(_PICTURES)


def line(text: str, most: int = 300) -> str:
    """The beginning of a message, in a line."""
    words = " ".join(plain(text).split())
    return words if len(words) <= most else words[: most - 1].rstrip() + "…"


def headline(text: str) -> str:
    """The first line of a message, or its beginning."""
    lines = [part for part in plain(text).splitlines() if part.strip()]
    return line(lines[0] if lines else "", 160) + (" […]" if len(lines) > 1 else "")


def excerpt(text: str, characters: int = 1200, lines: int = 16) -> str:
    """The beginning of a message, and how much is left out."""
    text = plain(text).strip("\n")
    shown = "\n".join(text.splitlines()[:lines])[:characters]
    left = len(text) - len(shown)
    return shown if not left else f"{shown}\n[{left:,} more characters in results.json]"


def target_order(target: str) -> tuple[int, str]:
    """For sorting: the CPU, GPUs, TPUs by age, others."""
    kind = target.partition(":")[0]
    return (_TARGETS.index(kind) if kind in _TARGETS else len(_TARGETS)), kind


def subject(row: Row) -> str:
    """What a row is about."""
    return f"{line(row.subject)}, {line(row.case)}" if row.case else line(row.subject)


def place(row: Row) -> str:
    """Where a row's program runs."""
    target = line(row.target)
    if row.devices > 1:
        target += f", {row.devices:,} devices"
    return f"{target}, {line(row.mesh)}" if row.mesh else target


def worst(row: Row) -> tuple[Status, StageName]:
    """A row in one status, and the stage that gives it.

    The first that failed or was refused; else the last that is ok; else the first, not run.
    """
    last: StageName | None = None
    for name in STAGES:
        stage = row.stages[name]
        if stage.status in ("failed", "refused"):
            return stage.status, name
        last = name if stage.status == "ok" else last
    return ("ok", last) if last else ("not run", STAGES[0])


def outcome(row: Row) -> str:
    """A row in a few words."""
    status, name = worst(row)
    if status == "failed":
        return FAILS[name]
    if status != "ok":
        return status
    checked = row.stages["agree"].status == "ok"
    if name != "time":
        return WORKS[name]
    return f"{'agrees' if checked else 'not checked'}, {speed(row.speed)}"


def speed(measured: Speed | None) -> str:
    """A speed in a few words."""
    if measured is None:
        return "timed"
    if measured.fraction is None:
        return duration(measured.seconds)
    return f"{percent(measured.fraction)} of roofline"
