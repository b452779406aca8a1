"""The progress of loading, for people at a terminal or a notebook."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mimo_jax.checkpoint import streaming


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[streaming.Progress | None]:
    """A bar on stderr, or in a notebook, with bytes and bytes a second; it vanishes at the end.

    Yields:
      What `load` calls; None where nobody would see it, and then nothing is printed.
    """
    console = Console(stderr=True)
    widgets = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
    if not (console.is_terminal or widgets):
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield update
