"""The command line: `mimo-jax`, which is also `python -m mimo_jax`.

Nothing heavy is imported here: JAX is, where a command runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

import mimo_jax
from mimo_jax.cli.batch import batch, merge
from mimo_jax.cli.bench import bench
from mimo_jax.cli.console import FAILED, INTERRUPTED, USAGE, printable
from mimo_jax.cli.convert import convert
from mimo_jax.cli.export import export
from mimo_jax.cli.generate import generate
from mimo_jax.cli.inspect import inspect
from mimo_jax.cli.plan import plan
from mimo_jax.cli.portability import portability

__all__ = ["FAILED", "INTERRUPTED", "USAGE", "app", "main", "printable"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (generate, batch, merge, bench, inspect, plan, convert, export, portability):
    app.command()(command)


def main() -> None:
    """Runs the command line."""
    from sharding.distributed import ending_together

    with ending_together():
        app(prog_name="mimo-jax")


def _print_version(wanted: bool) -> bool:
    if wanted:
        print(f"mimo-jax {mimo_jax.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Xiaomi's MiMo-V2 family of language models in JAX."""
