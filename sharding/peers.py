"""The links between the processes of a job, over which each learns of the others' ends.

What JAX 0.11.2 does by itself, measured on CPUs: when a process dies, its coordination service at
process 0 finds out by missing heartbeats (at once, for process 0 itself), and every other process
aborts (exit code 134, forty lines of log), be it in a collective, at a barrier or idle. The
collective itself hangs or breaks. A Python callback for this case ends in std::bad_cast, a call
that waits for the service may or may not return before the abort, and in JAX's recoverable mode a
collective may hang for good.

So every process has a connection to process 0, which its death closes, and a thread that listens on
it. They end the process with a sentence; JAX's abort stays for what they can't see, such as a
process that is stopped.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import itertools
import json
import os
import secrets
import signal
import socket
import threading
import time
from typing import Any

_FOREVER = 10 * 365 * 24 * 3600 * 1000  # milliseconds; the service takes no infinity
_LINKING = 30  # seconds in which process 0 hears from every other; they have met already
_PATIENCE = 10  # seconds for a process to greet, or to follow the others' end
_NEWS = 3  # seconds after an error in which the news of a death explains it better
# A host that is gone closes nothing: the kernel asks it after 10 seconds, then every 5, 3 times.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


class DistributedError(OSError):
    """The processes cannot start, or cannot go on, as one job.

    Where an agreement fails every process raises it. It is an OSError because the cause is in a
    process's surroundings (its arguments, files or hosts), so that programs report it as such.
    """


def say(text: str) -> None:
    """Writes an error to stderr, without Python's buffers: the main thread may hold their lock."""
    with contextlib.suppress(OSError):  # a process whose stderr is closed must end too
        os.write(2, f"error: {text}\n".encode())


def delay_abort() -> None:
    """Makes an aborting process wait for six seconds before it is gone.

    JAX aborts at once when process 0 dies, and the thread that listens needs an instant to say so.
    The handler is C's sleep() itself, called with the signal's number, 6: no Python runs on a
    thread that may hold any lock.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


class Peers:
    """The other processes of this one's job."""

    def __init__(self, state: Any) -> None:
        """Connects the processes, and waits until all are; ends this one if that fails.

        Args:
            state: JAX's record of the job, with two or more processes.
        """
        self.state, self.client = state, state.client
        self.process, self.count = state.process_id, state.num_processes
        self.steps = itertools.count()
        self.ending = threading.Lock()  # the thread that holds it ends the process
        try:
            self.links = self._accept() if self.process == 0 else {0: self._connect()}
        except OSError as error:
            say(
                f"process {self.process} of {self.count} could not connect to "
                f"{'process 0' if self.process else 'the others'}: {error}. See whether firewalls "
                f"let the hosts of the job connect to any port of process 0's host"
            )
            os._exit(1)
        self.listeners = [
            threading.Thread(target=self._listen, args=link, daemon=True)
            for link in self.links.items()
        ]
        for listener in self.listeners:
            listener.start()
        atexit.register(self.close)  # so it comes before JAX's own, which was registered earlier

    def exchange(self, step: str, value: str) -> list[str]:
        """Gives the value of every process, by process; all wait for all.

        Raises:
            DistributedError: another process calls this for another step.
        """
        number = next(self.steps)
        at = f"{step!r} in a job of {self.count} processes"
        place = f"job/step/{number}"
        name = f"{self.process:06}"  # so that sorting by name sorts by number
        try:
            self.client.key_value_set(f"{place}/{name}", json.dumps([at, value]))
            self.client.wait_at_barrier(place, _FOREVER)
            entries = self.client.key_value_dir_get(place)
            if number:  # all have read the step before, or they wouldn't be at this one
                self.client.key_value_delete(f"job/step/{number - 1}/{name}")
        except RuntimeError:
            time.sleep(_PATIENCE)  # a process has died: a listener ends this one with a sentence
            raise
        arrived = [json.loads(text) for _, text in sorted(entries)]
        for process, (at, _) in enumerate(arrived):
            if at != arrived[0][0]:
                raise DistributedError(
                    f"the processes do different things: process 0 is at {arrived[0][0]}, process "
                    f"{process} at {at}. Start every process with the same command"
                )
        return [value for _, value in arrived]

    def fail(self, error: BaseException, code: int) -> None:
        """Tells the others of this process's failure, and exits."""
        if isinstance(error, Exception):
            # It may be a collective that a death broke, which JAX reports in several types, even
            # ValueError: a listener ends this process then.
            time.sleep(_NEWS)
        self.ending.acquire()
        if isinstance(error, DistributedError):  # which every process raises by itself
            self._leave(code, None)
        text = str(error) or type(error).__name__
        self._leave(code, f"process {self.process} of {self.count} failed: {text}")

    def close(self) -> None:
        """Ends JAX's part of the job, when the others end theirs, and with it the links."""
        self._tell(None)
        try:
            self.state.shutdown()
        finally:  # where it fails because of a death, the listener's sentence comes first
            for listener in self.listeners:
                listener.join()
        for link in self.links.values():
            link.close()

    def _accept(self) -> dict[int, socket.socket]:
        token = secrets.token_hex()
        links: dict[int, socket.socket] = {}
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        dual = family == socket.AF_INET6
        with socket.create_server(
            ("", 0), family=family, backlog=self.count, dualstack_ipv6=dual
        ) as server:
            server.settimeout(_LINKING)
            port = server.getsockname()[1]
            self.client.key_value_set("job/links", json.dumps([port, token]))
            while len(links) < self.count - 1:
                link, _ = server.accept()
                link.settimeout(_PATIENCE)
                # Whoever doesn't know the token is no process of this job.
                with contextlib.suppress(OSError, ValueError):
                    # Without a buffer, which would take in what the process says next.
                    greeting, process = link.makefile("rb", buffering=0).readline(100).split()
                    if secrets.compare_digest(greeting, token.encode()):
                        links[int(process)] = _kept_alive(link)
        return links

    def _connect(self) -> socket.socket:
        port, token = json.loads(self.client.blocking_key_value_get("job/links", _FOREVER))
        host = self.state.coordinator_address.rpartition(":")[0].strip("[]")
        link = socket.create_connection((host, port), _PATIENCE)
        link.sendall(f"{token} {self.process}\n".encode())
        return _kept_alive(link)

    def _listen(self, process: int, link: socket.socket) -> None:
        """Waits for what the process at the other end says last, and acts on it."""
        with contextlib.suppress(OSError, ValueError):  # a broken connection, a broken line
            for line in link.makefile():
                text = json.loads(line)
                if text is not None:
                    self._follow(text)
                return
        if process == 0:
            time.sleep(1)  # JAX's lines come first, so that the sentence stands last
        self._follow(
            f"process {process} of {self.count} stopped answering: it was killed, crashed, or lost "
            f"its network. The job ends; what was written is kept. That process's own log may say "
            f"why; then start the job again"
        )

    def _follow(self, text: str) -> None:
        if self.ending.acquire(blocking=False):
            say(text)
            self._leave(1, text)

    def _leave(self, code: int, text: str | None) -> None:
        self._tell(text)
        if self.process == 0:  # goes last, for its end makes JAX abort the others
            deadline = time.monotonic() + _PATIENCE
            for listener in self.listeners:
                if listener is not threading.current_thread():
                    listener.join(max(0, deadline - time.monotonic()))
        os._exit(code)

    def _tell(self, text: str | None) -> None:
        """Says this process's last word: why the others must end too, or None, that it ends."""
        for link in self.links.values():
            with contextlib.suppress(OSError):
                link.sendall((json.dumps(text) + "\n").encode())


def _kept_alive(link: socket.socket) -> socket.socket:
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return link
