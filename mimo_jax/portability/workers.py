"""Running jobs in processes that may crash, hang or run out of memory without the study ending."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mimo_jax.portability.jobs import Job, unfinished
from mimo_jax.portability.results import Row, row_from

_LAST = 2000  # characters of what a process said before it died


def environment(compilers: Path | None, *, devices: bool) -> dict[str, str]:
    """What a worker's process is started with.

    Args:
      compilers: a folder that compilers are importable from, if they are apart.
      devices: whether jax may take the accelerators of this machine.
    """
    env = dict(os.environ)
    if not devices:
        env["JAX_PLATFORMS"] = "cpu"  # or jax tries to run programs on a compiler's devices
        # Times of compiling are those without a cache.
        env["MIMO_JAX_COMPILATION_CACHE"] = "off"
        if compilers is not None:
            paths = [str(compilers), env.get("PYTHONPATH", "")]
            env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return env


def run_jobs(
    jobs: Sequence[Job],
    env: Mapping[str, str],
    *,
    workers: int,
    timeout: float,
    done: Callable[[Job, Row], None],
) -> None:
    """Does jobs in some processes at a time.

    Args:
      jobs: those of one environment.
      env: of the processes.
      workers: how many processes there are.
      timeout: seconds after which a job is given up.
      done: called after each, by one thread at a time.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for i in range(len(jobs)):
        waiting.put(i)
    lock = threading.Lock()

    def serve() -> None:
        with _Worker(env) as worker:
            for i in _taken(waiting):
                row = worker.run(jobs[i], timeout)
                with lock:
                    done(jobs[i], row)

    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(serve) for _ in range(min(workers, len(jobs)))]:
            future.result()


def _taken(waiting: queue.SimpleQueue[int]) -> Iterator[int]:
    while True:
        try:
            yield waiting.get_nowait()
        except queue.Empty:
            return


class _Worker:
    """One process, started when it is needed, and again after it died."""

    def __init__(self, env: Mapping[str, str]):
        self.env = env
        self.process: subprocess.Popen[str] | None = None
        self.said: Any = None

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, job: Job, timeout: float) -> Row:
        """Does a job; its row says so if the process died or took too long."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        process = self.process
        assert process is not None
        assert process.stdin is not None
        self.said.seek(0, os.SEEK_END)
        before = self.said.tell()
        try:
            process.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
            process.stdin.flush()
            line = self._line(process, timeout)
        except OSError:  # it has died already
            line = ""
        if line is None:
            self._stop()
            return unfinished(job, f"not done after {timeout:.0f} s, and given up")
        if not line.endswith("\n"):
            self._stop()
            return unfinished(job, f"{_ended(process)}; it said last: {self._last(before)}")
        return row_from(json.loads(line))

    def _line(self, process: subprocess.Popen[str], timeout: float) -> str | None:
        """The next row, "" if the process ended before, None after the time."""
        deadline = time.monotonic() + timeout
        text = b""
        assert process.stdout is not None
        pipe = process.stdout.fileno()
        while not text.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                return None
            part = os.read(pipe, 1 << 16)
            if not part:
                break
            text += part
        return text.decode()

    def _start(self) -> None:
        self.said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mimo_jax.portability.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            env=dict(self.env),
            text=True,
        )

    def _stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def _last(self, start: int) -> str:
        self.said.seek(start)
        return self.said.read()[-_LAST:].strip() or "nothing"


def _ended(process: subprocess.Popen[str]) -> str:
    code = process.wait()
    if code >= 0:
        return f"the process ended with exit code {code}"
    return f"the process was ended by {signal.Signals(-code).name}"
