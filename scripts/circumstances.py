"""What a measurement was made with: machine, versions, commit and arguments."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import jax

from mimo_jax.engine.machine import machine

ROOT = Path(__file__).resolve().parents[1]


def circumstances(args: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions, commit and arguments of a result; files by their names alone."""
    hidden = ("torch_python", "out", "run", "cache")
    return {
        "arguments": {
            k: v.name if isinstance(v, Path) else v
            for k, v in vars(args).items()
            if k not in hidden
        },
        **machine(jax.devices()),
        "commit": git("rev-parse", "HEAD"),
        "changed_files": len((git("status", "--porcelain") or "").splitlines()),
    }


def write_result(result: dict[str, Any], out: Path) -> None:
    """Writes a result as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")


def git(*command: str) -> str | None:
    """Output of a git command in the repository; None where there is none."""
    try:
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
