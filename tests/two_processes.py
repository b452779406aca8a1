"""Runs a function of a test file in several processes that are one job of jax.distributed.

    def prints_its_devices(word):
        print(word, jax.process_index(), jax.local_device_count(), jax.device_count())

    def test_processes_see_each_others_devices():
        first, second = run_in_processes(prints_its_devices, "devices")
        assert second.stdout == "devices 1 4 8\n"

The function must stand at the top of its file, which each process imports anew; its arguments
travel as JSON. It runs after `initialize` and inside `ending_together`, as a program would.
"""

import importlib.util
import inspect
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, or minus the signal that killed it, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


def run_in_processes(
    function: Callable[..., None],
    *arguments: Any,
    processes: int = 2,
    devices: int = 4,
    options: dict[str, int] | None = None,
    environment: dict[str, str | None] | None = None,
    patience: float = 300,
) -> list[Ended]:
    """Runs `function(*arguments)` in each of the processes and waits for their ends.

    Args:
        function: a function at the top of a file.
        arguments: what it is called with; JSON's types.
        processes: how many to start.
        devices: CPU devices of each process.
        options: keyword arguments of `sharding.distributed.initialize`.
        environment: variables to set in each process, or with None to remove; "{process}" in a
            value becomes the process's number.
        patience: seconds after which processes that still run are killed and the test fails.

    Returns: the ends, by process.
    """
    common = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{_free_port()}",
        "JAX_NUM_PROCESSES": str(processes),
    }
    source = inspect.getsourcefile(function)
    command = [sys.executable, __file__, source, function.__name__]
    command += [json.dumps(options or {}), json.dumps(arguments)]
    running: list[subprocess.Popen] = []
    with tempfile.TemporaryDirectory() as folder:
        for process in range(processes):
            variables = os.environ | common | {"JAX_PROCESS_ID": "{process}"} | (environment or {})
            variables = {
                name: value.replace("{process}", str(process))
                for name, value in variables.items()
                if value is not None and not name.lower().endswith("_proxy")  # not for localhost
            }
            with (
                Path(folder, f"{process}.out").open("w") as out,
                Path(folder, f"{process}.err").open("w") as err,
            ):
                running.append(subprocess.Popen(command, env=variables, stdout=out, stderr=err))
        hung = _wait(running, patience)
        ends = [
            Ended(
                process.returncode,
                Path(folder, f"{number}.out").read_text(),
                Path(folder, f"{number}.err").read_text(),
            )
            for number, process in enumerate(running)
        ]
    assert not hung, f"processes {hung} had to be killed after {patience} seconds: {ends}"
    return ends


def _wait(running: list[subprocess.Popen], patience: float) -> list[int]:
    """Waits for the processes, and gives those that had to be killed."""
    hung = []
    for number, process in enumerate(running):
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            hung.append(number)
            process.kill()
            process.wait()
    return hung


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def main(source: str, name: str, options: str, arguments: str) -> None:
    """What each process runs."""
    from sharding import distributed

    spec = importlib.util.spec_from_file_location("program", source)
    assert spec
    assert spec.loader
    program = importlib.util.module_from_spec(spec)
    sys.modules["program"] = program
    spec.loader.exec_module(program)
    with distributed.ending_together():
        distributed.initialize(**json.loads(options))
        getattr(program, name)(*json.loads(arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
