"""What a batch shows while it runs: a bar or lines on stderr, a file of metrics, a profile."""

from __future__ import annotations

import contextlib
import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mimo_jax.engine.meter import Meter

# Seconds between looks: of a terminal, of metrics, of lines in a log.
BAR_EVERY, METRICS_EVERY, LINE_EVERY = 0.2, 1.0, 10.0
# Dispatches of steps before a profile begins, by which most programs are compiled, and in it.
PROFILE_AFTER, PROFILED = 16, 16


class Display:
    """Shows what a meter reads; enter it, and call `update` after every dispatch.

    Args:
      meter: what it shows.
      err: where; a bar if that is a terminal, lines otherwise.
      metrics: a file to which a line of JSON is added every second.
      profile: a folder for a `jax.profiler` trace of some dispatches.

    Raises:
      OSError: the file of metrics can't be opened.
    """

    def __init__(
        self, meter: Meter, err: Console, metrics: Path | None = None, profile: Path | None = None
    ):
        self._meter, self._err, self._profile = meter, err, profile
        self._file = None if metrics is None else metrics.open("a", encoding="utf-8")
        self._dispatches, self._tracing = 0, False
        now = time.perf_counter()
        self._due = {"bar": now, "metrics": now + METRICS_EVERY, "line": now + LINE_EVERY}
        self._bar: Progress | None = None

    def __enter__(self) -> Display:
        if self._err.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(
                *columns, TextColumn("{task.description}"), console=self._err, transient=True
            )
            self._bar.start()
            self._task = self._bar.add_task("compiling", total=self._meter.total)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._stop_trace()
        if self._file is not None:
            self._write_metrics(self._meter.read())
        if self._file is not None:
            self._file.close()
        if self._profile is not None and self._dispatches <= PROFILE_AFTER:
            self._err.print(
                f"no profile: the run ended within the first {PROFILE_AFTER} dispatches of steps"
            )
        self._err.print(f"{self._meter.done} of {self._meter.total} requests done")

    def update(self) -> None:
        """Shows what is due."""
        self._dispatches += 1
        if self._profile is not None and self._dispatches == PROFILE_AFTER:
            jax.profiler.start_trace(str(self._profile))
            self._tracing = True
        if self._dispatches == PROFILE_AFTER + PROFILED:
            self._stop_trace()
        now = time.perf_counter()
        due = [what for what, at in self._due.items() if now >= at]
        if not due:
            return
        read = self._meter.read()
        for what in due:
            every = {"bar": BAR_EVERY, "metrics": METRICS_EVERY, "line": LINE_EVERY}[what]
            self._due[what] = now + every
        if "bar" in due and self._bar is not None:
            self._bar.update(self._task, completed=read["done"], description=describe(read))
        if "line" in due and self._bar is None:
            self._err.print(f"{read['done']} of {read['total']} requests done; {describe(read)}")
        if "metrics" in due and self._file is not None:
            self._write_metrics(read)

    def _write_metrics(self, read: dict[str, Any]) -> None:
        """Adds a line; a disk that is full ends the metrics but not the run."""
        assert self._file is not None
        try:
            self._file.write(json.dumps(read) + "\n")
            self._file.flush()
        except OSError as error:
            self._err.print(f"no more metrics: writing {self._file.name} failed ({error})")
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _stop_trace(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            self._err.print(f"a profile of {PROFILED} dispatches is in {self._profile}")


def describe(read: dict[str, Any]) -> str:
    """What a meter reads, in a line."""
    parts = [
        f"{read['generated_tokens_s']:.0f} tokens/s out, {read['prompt_tokens_s']:.0f} in",
        f"{read['running']} running, {read['prefilling'] + read['waiting']} waiting",
        f"cache {read['cache_used']:.0%}",
    ]
    if read["tokens_per_round"] is not None:
        parts.append(f"{read['tokens_per_round']:.2f} tokens a round")
    if read["eta_s"] is not None:
        parts.append(f"{timedelta(seconds=round(read['eta_s']))} left")
    return "; ".join(parts)
