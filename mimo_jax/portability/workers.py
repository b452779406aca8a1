"""Running jobs in processes that may crash, hang or run out of memory without the study ending."""

from __future__ import annotations

import concurrent.futures
import contextlib
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
from pathlib import Path
from typing import Any

from mimo_jax.portability.jobs import Job, unfinished
from mimo_jax.portability.results import Row, row_from

WORKER = (sys.executable, "-m", "mimo_jax.portability.worker")
THREADS = 8
_LAST = 2000  # characters of what a process said before it died
_ENDING = 10.0  # seconds that a process may take to end once it answers no more
_POLL = 0.2  # seconds after which a thread looks whether it is to stop


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
        # XLA has as many threads as devices or cores, and those of an interpreted kernel wait for
        # each other: with two, all wait.
        threads = f"--xla_force_host_platform_device_count={THREADS}"
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {threads}".strip()
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
    command: Sequence[str] = WORKER,
) -> None:
    """Does jobs in some processes at a time.

    What `done` raises ends it, and so does Ctrl-C: the processes are ended first, and jobs that
    they were at have no row.

    Args:
      jobs: those of one environment.
      env: of the processes.
      workers: how many processes there are.
      timeout: seconds after which a job is given up.
      done: called after each, by one thread at a time.
      command: that starts a process.
    """
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    lock, stopping = threading.Lock(), threading.Event()

    def serve() -> None:
        with _Worker(command, env, stopping) as worker:
            for job in _taken(waiting):
                row = worker.run(job, timeout)
                with lock:
                    if row is None or stopping.is_set():
                        return
                    done(job, row)

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            serving = [pool.submit(serve) for _ in range(min(workers, len(jobs)))]
            ended, _ = concurrent.futures.wait(serving, return_when="FIRST_EXCEPTION")
            for future in ended:
                future.result()
        except BaseException:
            stopping.set()
            raise


def _taken(waiting: queue.SimpleQueue[Job]) -> Iterator[Job]:
    while True:
        try:
            yield waiting.get_nowait()
        except queue.Empty:
            return


class _Worker:
    """One process, started when it is needed, and again after it died."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], stopping: threading.Event):
        self.command, self.env, self.stopping = command, env, stopping
        self.process: subprocess.Popen[bytes] | None = None
        self.said: Any = None

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, job: Job, timeout: float) -> Row | None:
        """Does a job; its row says so if the process died or took too long.  None to stop."""
        if self.process is not None and self.process.poll() is not None:
            self._stop()
        process = self.process or self._start()
        assert process.stdin is not None
        before = self.said.seek(0, os.SEEK_END)
        try:
            process.stdin.write(json.dumps(dataclasses.asdict(job)).encode() + b"\n")
            line = self._line(process, timeout)
        except BrokenPipeError:  # it has died already
            line = b""
        if line is not None and line.endswith(b"\n"):
            return row_from(json.loads(line))
        if self.stopping.is_set():
            return None
        reason = f"not done after {timeout:g} s, and given up" if line is None else _ended(process)
        said = self._last(before)
        self._stop()
        return unfinished(job, f"{reason}; it said last: {said}")

    def _line(self, process: subprocess.Popen[bytes], timeout: float) -> bytes | None:
        """The next row, less if the process ended before; None after the time, or to stop."""
        deadline = time.monotonic() + timeout
        text = b""
        assert process.stdout is not None
        while not text.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or self.stopping.is_set():
                return None
            if not select.select([process.stdout], [], [], min(left, _POLL))[0]:
                continue
            part = process.stdout.read(1 << 16)
            if not part:
                break
            text += part
        return text

    def _start(self) -> subprocess.Popen[bytes]:
        self.said = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            env=dict(self.env),
            bufsize=0,
            # In a group of its own: what it starts ends with it, and Ctrl-C isn't for it.
            start_new_session=True,
        )
        return self.process

    def _stop(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        # The group may have gone, or be of processes that have ended.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with process:  # closes its pipes and waits
            self.said.close()

    def _last(self, start: int) -> str:
        """The end of what was said from a place of the file on."""
        end = self.said.seek(0, os.SEEK_END)
        self.said.seek(max(start, end - 4 * _LAST))  # bytes: a character has up to four
        return self.said.read().decode(errors="replace")[-_LAST:].strip() or "nothing"


def _ended(process: subprocess.Popen[bytes]) -> str:
    """How a process ended whose output has."""
    try:
        code = process.wait(_ENDING)
    except subprocess.TimeoutExpired:
        return "the process closed its output and went on"
    if code >= 0:
        return f"the process ended with exit code {code}"
    names = {int(s): s.name for s in signal.Signals}
    return f"the process was ended by {names.get(-code, f'signal {-code}')}"
