"""The watch that each process of a job keeps over the others, and the messages between them.

What JAX 0.11.2 does by itself, measured on CPUs: when a process dies, the coordination service at
process 0 finds out by its missing heartbeats (at once, for process 0 itself), and every other one
aborts (exit code 134, forty lines of log), be it in a collective, at a barrier or idle. The
collective itself hangs or breaks. A Python callback for this case ends in std::bad_cast, and in
JAX's recoverable mode a collective may hang for good. So the abort stays, and threads that hear
of the death at the same moment say it in a sentence and exit first.

Three threads wait for three answers, because none of them always gets through while JAX aborts: the
client holds its lock then, which the end of a barrier needs and the others don't
(coordination_service_agent.cc), and the others are silent where the service is gone. What counts is
the first.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from typing import Any, NoReturn

_FAILURE = "job/failure"  # the key under which a process that fails says why
_FOREVER = 10 * 365 * 24 * 3600 * 1000  # milliseconds; the service takes no infinity
_LAST_WORDS = 10  # seconds that failing processes wait for each other before they exit
# Statuses of an error that is this process's own; with any other a broken connection is possible.
_OWN_ERRORS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")


class DistributedError(OSError):
    """The processes cannot start, or cannot go on, as one job.

    Where an agreement fails every process raises it. It is an OSError because the cause is in a
    process's surroundings (its arguments, files or hosts), so that programs report it as such.
    """


def say(text: str) -> None:
    """Writes an error to stderr, without Python's buffers: the main thread may hold their lock."""
    os.write(2, f"error: {text}\n".encode())


def delay_abort() -> None:
    """Makes an aborting process wait for six seconds before it is gone.

    JAX aborts from its own thread as soon as it hears of a dead peer, and ours need an instant to
    say so. The handler is C's sleep() itself, called with the signal's number, 6: no Python runs on
    a thread that may hold any lock.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


class Peers:
    """The other processes of this one's job."""

    def __init__(self, state: Any, heartbeat_timeout: int) -> None:
        """Starts the watch.

        Args:
            state: JAX's record of the job, with two or more processes.
            heartbeat_timeout: seconds after which JAX takes a silent process for dead.
        """
        self.state, self.client = state, state.client
        self.process, self.count = state.process_id, state.num_processes
        self.heartbeat_timeout = heartbeat_timeout
        self.steps = itertools.count()
        self.ending = threading.Lock()  # the thread that holds it ends the process
        self.closing, self.closed = threading.Event(), threading.Event()
        self.watches = [
            threading.Thread(target=watch, daemon=True)
            for watch in (self._watch_failures, self._watch_deaths, self._watch_barrier)
        ]
        for watch in self.watches:
            watch.start()
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
            time.sleep(_LAST_WORDS)  # a process has died: the watch ends this one with a sentence
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
        from jax.errors import JaxRuntimeError

        if isinstance(error, JaxRuntimeError) and not str(error).startswith(_OWN_ERRORS):
            patience = self.heartbeat_timeout + _LAST_WORDS
            print(f"waiting {patience} seconds for news of a dead process", file=sys.stderr)
            time.sleep(patience)  # the watch exits if there is one: the better explanation
        self._claim_end()
        if not isinstance(error, DistributedError):  # every process raises that one by itself
            text = str(error) or type(error).__name__
            with contextlib.suppress(RuntimeError):  # another process was first to fail
                self.client.key_value_set(
                    _FAILURE, f"process {self.process} of {self.count} failed: {text}"
                )
        self._leave(code)

    def close(self) -> None:
        """Ends JAX's part of the job, when the others end theirs, and with it the watch."""
        self.closing.set()
        self.state.shutdown()
        self.closed.set()
        for watch in self.watches:
            watch.join()

    def _watch_failures(self) -> None:
        try:
            text = self.client.blocking_key_value_get(_FAILURE, _FOREVER)
        except RuntimeError:
            self._lost_service()
            return
        self._claim_end()
        say(text)
        self._leave(1)

    def _watch_deaths(self) -> None:
        # The answer comes when every process that lives has asked. A busy one only delays it.
        everyone = list(range(self.count))
        while not self.closed.wait(1):
            try:
                alive = self.client.get_live_nodes(everyone)
            except RuntimeError:
                self._lost_service()
                return
            dead = set(everyone) - set(alive)
            if dead and not self._closes_in_order():
                self._end_after(min(dead))

    def _watch_barrier(self) -> None:
        # A barrier fails when one of its processes dies, and says which. Nobody may complete it:
        # process 0 waits at one to which the others never come, and they wait at another.
        watchers = "process 0" if self.process == 0 else "the others"
        try:
            self.client.wait_at_barrier(f"job/watch of {watchers}", _FOREVER)
        except RuntimeError as error:
            if not self._closes_in_order():
                # The service names the process that fell silent, if it isn't itself: process 0's.
                named = re.search(r"\bTask:? (\d+)", str(error))
                self._end_after(int(named[1]) if named else 0)

    def _lost_service(self) -> None:
        # The service is process 0's: to itself that can only happen in the course of an end.
        if self.process != 0 and not self._closes_in_order():
            self._end_after(0)

    def _closes_in_order(self) -> bool:
        return self.closing.is_set() and self.closed.wait(2)

    def _end_after(self, dead: int) -> NoReturn:
        self._claim_end()
        # JAX's lines come first, so that the sentence stands last. Process 0 ends last: the others
        # hear of the death from its service, and its end would look like another death to them.
        time.sleep(2 if self.process == 0 else 1)
        say(
            f"process {dead} of {self.count} stopped answering: it was killed, crashed, or lost "
            f"its network. The job ends; what was written is kept. That process's own log may say "
            f"why; then start the job again"
        )
        os._exit(1)

    def _claim_end(self) -> None:
        """Makes this thread the one that ends the process; any other waits here for the end."""
        self.ending.acquire()

    def _leave(self, code: int) -> None:
        # Process 0 goes last, when the others have heard of the failure and gone: its end aborts
        # them. The others only make themselves known, so that nothing can hold them up.
        arrival = threading.Thread(target=self._exchange_last_words, daemon=True)
        arrival.start()
        if self.process == 0:
            arrival.join()
            time.sleep(1)
        else:
            arrival.join(1)
        os._exit(code)

    def _exchange_last_words(self) -> None:
        with contextlib.suppress(RuntimeError):  # one of them is dead, or too slow
            self.client.wait_at_barrier("job/last words", _LAST_WORDS * 1000)
