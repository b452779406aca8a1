"""A process that does the jobs it is given on stdin, a line of JSON each, and writes their rows.

Compilers crash now and then, and take the process with them: so they get one of their own.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
import typing
import warnings

import jax

from mimo_jax.portability.jobs import Job, run_job


def main() -> None:
    """Serves until stdin ends."""
    warnings.simplefilter("ignore")
    rows = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # compilers print
    # What is printed counts when the process dies right after it.
    typing.cast(io.TextIOWrapper, sys.stdout).reconfigure(line_buffering=True)
    for line in sys.stdin:
        row = run_job(Job(**json.loads(line)))
        rows.write(json.dumps(dataclasses.asdict(row)) + "\n")
        rows.flush()
        jax.clear_caches()  # a study's programs would fill gigabytes


if __name__ == "__main__":
    main()
