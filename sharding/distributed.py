"""Several processes as one job: starting together, agreeing, and ending together.

    with distributed.ending_together():
        distributed.initialize()
        distributed.require_agreement("the model", folder)
        ...
        if distributed.is_leader():
            write(output)

The processes find each other through `jax.distributed`. The messages of this module go through its
coordination service, which process 0 hosts, and never over the devices; of each other's ends the
processes learn over connections of their own (sharding.peers). Without `initialize` a process is
alone: it is the leader and agrees with itself.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

from sharding.peers import DistributedError, Peers, delay_abort, say

__all__ = [
    "DistributedError",
    "agree_on_failure",
    "barrier",
    "ending_together",
    "from_leader",
    "initialize",
    "is_leader",
    "leave",
    "require_agreement",
]

_NO_CLUSTER = """\
no cluster was found ({error}): jax.distributed knows Slurm (srun), Open MPI (mpirun), Kubernetes \
(an indexed Job; needs `pip install kubernetes`) and Cloud TPU. Start every process by one of \
them; or give each JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID; or run \
on one host, not distributed"""

_peers: Peers | None = None  # None where this process is alone


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout: int = 60,
    start_timeout: int = 300,
) -> None:
    """Makes this process one of a job; call it before anything else that uses JAX.

    What is not given comes from the environment (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES,
    JAX_PROCESS_ID), and otherwise from JAX's detection of the cluster. Where all three are given,
    nothing is detected and the process has all devices of its host. A process that Slurm or Open
    MPI started gets one GPU, that of its local rank, unless JAX_LOCAL_DEVICE_IDS lists others.

    From here on stdout takes only what Python writes; what libraries write there goes to stderr.

    Args:
        coordinator_address: host:port on which process 0 listens.
        num_processes: processes of the job.
        process_id: number of this process, from 0.
        heartbeat_timeout: seconds of silence after which JAX takes a process for dead and aborts
            the others. A process that ends is noticed at once, a host that is gone in 25 seconds.
        start_timeout: seconds within which all processes must arrive; this one ends otherwise.

    Raises:
        ValueError: no cluster was found, or the values contradict each other.
        DistributedError: it was called before, or JAX could not start: JAX was used before, or the
            cluster is not set up for it.
    """
    global _peers
    import jax

    state = _state()
    if state.client is not None:
        raise DistributedError(
            "this process is part of a distributed job already; call initialize once, at the start"
        )
    coordinator_address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if coordinator_address and not re.search(r":\d+$", coordinator_address):
        raise ValueError(f"the coordinator's address is {coordinator_address!r}; give host:port")
    if num_processes is None:
        num_processes = _environment_number("JAX_NUM_PROCESSES")
    if process_id is None:
        process_id = _environment_number("JAX_PROCESS_ID")
    complete = None not in (coordinator_address, num_processes, process_id)

    # With this service, which announces preemptions to programs that ask, SIGTERM ends nothing: a
    # job that its scheduler cancels would go on.
    jax.config.update("jax_enable_preemption_service", False)
    delay_abort()
    alarm = threading.Timer(start_timeout, _nobody_came, [start_timeout])
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            cluster_detection_method="deactivate" if complete else None,
            initialization_timeout=start_timeout + 60,  # JAX aborts then: the alarm comes first
            heartbeat_timeout_seconds=heartbeat_timeout,
        )
    except ValueError as error:
        if complete:
            raise
        raise ValueError(_NO_CLUSTER.format(error=str(error).rstrip("."))) from error
    except RuntimeError as error:
        raise DistributedError(f"jax.distributed could not start: {error}") from error
    finally:
        alarm.cancel()
    if state.num_processes > 1:
        _peers = Peers(state)
        _keep_stdout()


def is_leader() -> bool:
    """Whether this is process 0, the one that writes output."""
    return _state().process_id == 0


def barrier(name: str) -> None:
    """Waits until every process is here. `name` says where that is, in errors.

    Raises:
        DistributedError: another process is at a barrier or an agreement of another name.
    """
    _exchange(name, "")


def require_agreement(what: str, value: str) -> None:
    """Checks that all processes have the same value, and waits for them.

    Args:
        what: the value's name in the error, such as "the prompt file".
        value: the text to compare; of long data, a hash.

    Raises:
        DistributedError: the values differ; every process raises it.
    """
    values = _exchange(what, value)
    for process, other in enumerate(values):
        if other != values[0]:
            raise DistributedError(
                f"{what} is not the same in all processes: process 0 has {_short(values[0])}, "
                f"process {process} has {_short(other)}. Start every process with the same "
                f"command, files and versions"
            )


def from_leader(what: str, value: str) -> str:
    """Gives process 0's value in every process, such as a seed that was drawn at random.

    Args:
        what: the value's name, which all processes give.
        value: of this process; only process 0's counts.

    Raises:
        DistributedError: another process is at another step.
    """
    return _exchange(what, value)[0]


def agree_on_failure(error: str | None) -> None:
    """Waits for all processes, and raises in all of them if one has failed.

    Call it after work that each process does by itself, such as loading: the others would otherwise
    wait for ever for one that met a problem.

    Args:
        error: what went wrong in this process, or None.

    Raises:
        DistributedError: a process has failed; its number and its error.
    """
    errors = _exchange("the end of its own work", error or "")
    failed = [process for process, text in enumerate(errors) if text]
    if not failed:
        return
    if len(set(errors)) == 1:
        raise DistributedError(errors[0])
    others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    raise DistributedError(
        f"process {failed[0]} of {len(errors)}{others} failed: {errors[failed[0]]}"
    )


def leave(code: int) -> NoReturn:
    """Ends this process with an exit code, as every process of the job does by itself."""
    try:
        raise DistributedError("all processes end here")
    except DistributedError:
        raise SystemExit(code) from None


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Runs the body so that an exception in one process ends all processes of the job.

    Put it around the whole program, error reports included. An exception other than SystemExit is
    printed with its traceback. The other processes print what happened and end with exit code 1,
    even from within a collective; this one exits with SystemExit's code, 130 after Ctrl-C, or 1.
    Where the process is alone, or SystemExit says success, exceptions pass through.
    """
    try:
        yield
    except BaseException as error:
        code = _exit_code(error)
        if _peers is None or code == 0:
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        _peers.fail(_cause(error), code)


def _state() -> Any:
    """JAX's record of its job: there is no public way to the coordination service's client."""
    from jax._src import distributed

    return distributed.global_state


def _environment_number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise ValueError(f"{name} is {text!r}; it must be a number, 0 or more")
    return None if text is None else int(text)


def _nobody_came(timeout: int) -> None:
    state = _state()
    say(
        f"process {state.process_id} waited {timeout} seconds for the {state.num_processes} "
        f"processes of the job to meet at {state.coordinator_address}. See whether all were "
        f"started, each with that number of processes, and whether their hosts reach that address"
    )
    os._exit(1)


def _keep_stdout() -> None:
    """Leaves stdout to Python: libraries that write to descriptor 1 reach stderr from here on.

    Gloo does, which carries the collectives of CPUs: a line for each group of devices, as they
    first exchange. Where sys.stdout is no longer the one that Python opened, nothing is changed.
    """
    if sys.stdout is None or sys.stdout is not sys.__stdout__:
        return
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, closefd=False)
    os.dup2(2, 1)


def _exchange(step: str, value: str) -> list[str]:
    """Gives the value of every process, by process; all wait for all."""
    return [value] if _peers is None else _peers.exchange(step, value)


def _short(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]}... ({len(text)} characters)"


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _cause(error: BaseException) -> BaseException:
    """The error that a program reported before it chose an exit code by SystemExit or click's."""
    while error.__context__ and (isinstance(error, SystemExit) or hasattr(error, "exit_code")):
        error = error.__context__
    return error
