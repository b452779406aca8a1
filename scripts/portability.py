"""Tries kernels and steps on devices that need not be there, and writes a report.

    python scripts/portability.py --out portability

The same as `mimo-jax portability`, for those who have the repository and no installed command.
"""

from __future__ import annotations

import typer

from mimo_jax.cli.portability import portability

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(portability)

if __name__ == "__main__":
    app()
