"""`mimo-jax inspect`: what a checkpoint holds, without its weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mimo_jax.cli import options
from mimo_jax.cli.console import FAILED, printable, readable_errors

if TYPE_CHECKING:
    from mimo_jax.checkpoint import Report


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A bundled name or a folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    qkv: options.QKV = None,
) -> None:
    """Describe a checkpoint without loading it; the exit code is 1 when it has problems."""
    with readable_errors():
        from mimo_jax import checkpoint as checkpoints

        # Not `resolve` for hub ids: that would download the weights.
        is_path = "/" in checkpoint or Path(checkpoint).is_dir()
        folder = Path(checkpoint).expanduser() if is_path else checkpoints.resolve(checkpoint)
        report = checkpoints.inspect(folder, qkv=qkv)
        print(_report_json(report) if as_json else printable(str(report)))
    raise typer.Exit(FAILED if report.problems else 0)


def _report_json(report: Report) -> str:
    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, frozenset) else str(value)

    fields = dataclasses.asdict(report)
    for name in ("config", "drafter"):
        config = getattr(report, name)
        fields[name] = None if config is None else config.to_dict()
    return json.dumps(fields, default=plain, indent=2)
