"""What can be wrong with a checkpoint, and the one error that lists all of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

SHOWN = 30


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing wrong with a checkpoint.

    Attributes:
      kind: what is wrong, in two or three words ("missing tensor", "wrong shape", ...).
      found: what is there.
      expected: what should be there, or what to do.
      tensor: tensor concerned; empty where a whole file is.
      file: file concerned, relative to the checkpoint's folder; empty if there is none.
    """

    kind: str
    found: str
    expected: str
    tensor: str = ""
    file: str = ""

    def __str__(self) -> str:
        where = " in ".join(x for x in (self.tensor, self.file) if x)
        what = f"{self.kind}: {where}" if where else self.kind
        return f"{what}: found {self.found}, expected {self.expected}"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written as asked; `problems` has every reason."""

    def __init__(self, folder: str | Path, problems: Sequence[Problem]):
        self.folder = Path(folder)
        self.problems = tuple(problems)
        super().__init__(f"{folder}: " + describe(self.problems))


def describe(problems: Sequence[Problem]) -> str:
    """The problems as text, one a line; only the first `SHOWN` of very many."""
    count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
    lines = [f"- {p}" for p in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"- and {len(problems) - SHOWN} more")
    return "\n".join([count, *lines])
