"""A process that does the jobs it is given on stdin, a line of JSON each, and writes their rows.

Compilers crash now and then, and take the process with them: so they get one of their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import queue
import signal
import sys
import threading
import typing
import warnings
from collections.abc import Iterator

import jax

from mimo_jax.portability.jobs import Job, run_job


def main() -> None:
    """Serves until stdin ends, which ends a job that is under way too."""
    warnings.simplefilter("ignore")
    rows = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # compilers print
    # What is printed counts when the process dies right after it.
    typing.cast(io.TextIOWrapper, sys.stdout).reconfigure(line_buffering=True)
    for line in _lines():
        row = run_job(Job(**json.loads(line)))
        rows.write(json.dumps(dataclasses.asdict(row)) + "\n")
        rows.flush()
        jax.clear_caches()  # a study's programs would fill gigabytes


def _lines() -> Iterator[str]:
    """The lines of stdin, until the process is ended.

    Nobody waits for a job's row when who asked for it has gone, however it ended: so the job ends
    with it, and what it started.
    """
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgrp() == os.getpid():  # a group of its own, as workers are started
                os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield lines.get()


if __name__ == "__main__":
    main()
