"""Completes the prompts of a JSONL file with a model, into another JSONL file.

    python scripts/batch_generate.py IN.jsonl OUT.jsonl --model mimo-tiny

The same as `mimo-jax batch`, for those who have the repository and no installed command.
"""

from __future__ import annotations

import typer

from mimo_jax.cli.batch import batch

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(batch)

if __name__ == "__main__":
    app()
