"""Runs what the documents show, and compares what they say comes out.

- A `python` block runs, after those above it in its document, with their names.
- A `console` block has commands, each after a `$`, with what they print (stdout and stderr).
- An `output` block is what the block of Python above it prints.

In what is expected, `...` stands for anything, on a line by itself for any number of lines, and a
number with a decimal point for any other: times differ, and with them the widths of tables, so
that blanks within a line and strokes of a frame count once.  `<!-- skip: next "reason" -->` leaves
the next block out; the reason is shown in the report.

Each document runs in a folder of its own, in which the repository's folders are found by name.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("scripts", "examples", "notebooks", "benchmarks", "mimo_jax")
NUMBER = re.compile(r"\d[\d,]*\.\d+")
# Blanks after the first in a line, and strokes of a frame; with its groups, one of each is left.
WIDTH = re.compile(r"(?<=\S)( ) +|([─━])\2+")
END_OF_COMMAND = re.compile(r"(?<!\\)\n")
TIMEOUT = 900  # seconds; only against what never ends


class Python(PythonEvaluator):
    """Runs a block and keeps what it printed, for the `output` block that may follow."""

    def __call__(self, example: Example) -> None:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            super().__call__(example)
        example.namespace["_printed"] = printed.getvalue()


def compared(example: Example) -> str | None:
    """What is wrong with an `output` block, if anything."""
    return difference(str(example.parsed), example.namespace.get("_printed", ""))


def console(example: Example) -> str | None:
    """Runs the commands of a `console` block; what is wrong with their outputs, if anything."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PATH": path}
    for command, expected in commands(str(example.parsed)):
        ran = subprocess.run(
            ["bash", "-c", command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        if wrong := difference(expected, ran.stdout):
            return f"{command}  (exit status {ran.returncode})\n{wrong}"
    return None


def commands(block: str) -> list[tuple[str, str]]:
    """The commands of a block, and what each prints."""
    parts = re.split(r"^\$ ", block, flags=re.MULTILINE)
    if parts[0].strip():
        raise ValueError(f"a console block begins with a command after a $, not {parts[0]!r}")
    found = []
    for part in parts[1:]:
        command, expected = re.split(END_OF_COMMAND, part + "\n", maxsplit=1)
        shlex.split(command)  # raises if a quote is open
        found.append((command, expected.rstrip("\n")))
    return found


def difference(expected: str, printed: str) -> str | None:
    """None if what was printed is as expected, else both."""
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == "..." else f"{_pattern(line)}\n"
        for line in _even(expected).split("\n")
    )
    if not expected.strip() or re.fullmatch(pattern, _even(printed) + "\n"):
        return None
    return f"expected:\n{expected.rstrip()}\n\nprinted:\n{printed.rstrip()}"


def _pattern(line: str) -> str:
    parts = re.split(rf"(\.\.\.|{NUMBER.pattern})", line)
    return "".join(
        ".*" if part == "..." else NUMBER.pattern if NUMBER.fullmatch(part) else re.escape(part)
        for part in parts
    )


def _even(printed: str) -> str:
    """Without widths, and without blanks and empty lines at ends."""
    return "\n".join(WIDTH.sub(r"\1\2", line.rstrip()) for line in printed.rstrip().split("\n"))


def setup(namespace: dict[str, Any]) -> None:
    """Goes to a new folder, in which those of the repository are found."""
    folder = tempfile.TemporaryDirectory()
    namespace["_folder"], namespace["_back"] = folder, os.getcwd()
    for name in FOLDERS:
        (Path(folder.name) / name).symlink_to(ROOT / name)
    os.chdir(folder.name)


def teardown(namespace: dict[str, Any]) -> None:
    """Goes back, and removes it."""
    os.chdir(namespace["_back"])
    namespace["_folder"].cleanup()


EXAMPLES = Sybil(
    parsers=[
        CodeBlockParser("python", Python()),
        CodeBlockParser("console", console),
        CodeBlockParser("output", compared),
        SkipParser(),
    ],
    patterns=["README.md", "docs/*.md", "docs/*/*.md"],
    path=str(ROOT),
    setup=setup,
    teardown=teardown,
)
