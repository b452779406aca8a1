"""What several figures are drawn from; draws nothing itself."""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))

from tiny_corpus import read_corpus  # noqa: E402


def result(name: str) -> dict[str, Any]:
    """A result of a benchmark."""
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))


def held_out() -> dict[str, str]:
    """The modules of the standard library that mimo-tiny was not trained on, by path."""
    return read_corpus().held_out
