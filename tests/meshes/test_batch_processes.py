"""A batch that two processes run as one writes what one process writes."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from two_processes import run_in_processes

from mimo_jax.cli import app
from mimo_jax.decoding.slots import Slots
from mimo_jax.engine import loop
from sharding import distributed

LINES = [
    {"token_ids": [5, 6, 7 + i], "max_tokens": 5 + 3 * i, "temperature": float(i % 2)}
    for i in range(12)
]
OPTIONS = ["--dtype", "float32", "--batch-size", "2", "--max-len", "64"]


def runs_a_batch(source: str, out: str, interrupted: bool) -> None:
    """As a program would, whose first process is told to end after its first dispatch."""
    real = Slots.decode

    def decode(*args: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        patch.undo()
        return real(*args)

    patch = pytest.MonkeyPatch()
    if interrupted and distributed.is_leader():
        patch.setattr(Slots, "decode", decode)
    loop.AGREE = 2
    app(["batch", source, out, *OPTIONS, "--mesh", "expert=2,tensor=2"])


def untimed(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(
        ({k: v for k, v in r.items() if k != "metrics"} for r in found), key=lambda r: r["line"]
    )


def test_two_processes_drain_go_on_and_write_what_one_does(tmp_path):
    source, out, alone = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "alone.jsonl"))
    source.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    ends = run_in_processes(runs_a_batch, str(source), str(out), True, devices=2)
    assert [end.returncode for end in ends] == [130, 130], "".join(end.stderr for end in ends)
    assert "finishing the requests under way" in ends[0].stderr
    assert 1 <= len(untimed(out)) < len(LINES)
    ends = run_in_processes(runs_a_batch, str(source), str(out), False, devices=2)
    assert [end.returncode for end in ends] == [0, 0], "".join(end.stderr for end in ends)
    assert "12 of 12 requests done" in ends[0].stderr
    assert "requests done" not in ends[1].stderr
    app(["batch", str(source), str(alone), *OPTIONS], standalone_mode=False)
    assert untimed(out) == untimed(alone)
