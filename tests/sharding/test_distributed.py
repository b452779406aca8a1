"""Jobs of several processes, on CPUs: they compute together, agree, and none outlives another."""

import os
import signal
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from two_processes import run_in_processes

from sharding import distributed


@jax.jit
def sum_over_devices(x):
    return jax.shard_map(
        lambda block: jax.lax.psum(block, "all"), in_specs=P("all"), out_specs=P()
    )(x)


def one_number_a_device():
    """Row i on device i, over all processes; enters the mesh."""
    mesh = jax.make_mesh((jax.device_count(),), ("all",))
    jax.set_mesh(mesh)
    rows = np.arange(jax.device_count(), dtype=np.float32)
    return jax.make_array_from_callback(rows.shape, NamedSharding(mesh, P("all")), rows.__getitem__)


def compute_and_agree():
    print(sum_over_devices(one_number_a_device()))
    distributed.require_agreement("the model", "mimo-tiny")
    distributed.agree_on_failure(None)
    print("seed", distributed.from_leader("the seed", str(jax.process_index())))
    distributed.barrier("the end")
    print("leads" if distributed.is_leader() else "follows")


def test_two_processes_of_four_devices_sum_over_all_eight_and_agree():
    first, second = run_in_processes(compute_and_agree)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout == "[28.]\nseed 0\nleads\n"
    assert second.stdout == "[28.]\nseed 0\nfollows\n"


def disagree():
    me = jax.process_index()
    for attempt in (
        lambda: distributed.require_agreement("the seed", str(me)),
        lambda: distributed.agree_on_failure("no such file: model.safetensors" if me else None),
        lambda: distributed.agree_on_failure("no such model"),
        lambda: distributed.barrier(f"barrier {me}"),
        lambda: distributed.initialize(),
    ):
        try:
            attempt()
        except distributed.DistributedError as error:
            print(error)
    distributed.agree_on_failure("disk full" if me == 0 else None)


def test_a_disagreement_and_a_failure_raise_the_same_error_in_all_processes():
    first, second = run_in_processes(disagree)
    assert first.stdout.splitlines() == [
        "the seed is not the same in all processes: process 0 has 0, process 1 has 1. "
        "Start every process with the same command, files and versions",
        "process 1 of 2 failed: no such file: model.safetensors",
        "no such model",
        "the processes do different things: process 0 is at 'barrier 0' in a job of 2 processes, "
        "process 1 at 'barrier 1' in a job of 2 processes. "
        "Start every process with the same command",
        "this process is part of a distributed job already; call initialize once, at the start",
    ]
    assert second.stdout == first.stdout
    for process in (first, second):
        assert process.returncode == 1
        assert process.stderr.endswith("DistributedError: process 0 of 2 failed: disk full\n")


def compute_for_ever():
    rows = one_number_a_device()
    while True:
        sum_over_devices(rows).block_until_ready()


def fail_while_others_compute(failing):
    sum_over_devices(one_number_a_device()).block_until_ready()
    if jax.process_index() != failing:
        compute_for_ever()
    try:
        raise ValueError("the prompt is empty")
    except ValueError as error:
        print(error)
        sys.exit(2)


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_process_ends_another_that_is_in_a_collective(failing):
    ends = run_in_processes(fail_while_others_compute, failing)
    other = ends[1 - failing]
    assert (ends[failing].returncode, other.returncode) == (2, 1)
    assert other.stderr.endswith(f"error: process {failing} of 2 failed: the prompt is empty\n")


def lose_a_process(victim, number, occupation):
    rows = one_number_a_device()
    sum_over_devices(rows).block_until_ready()
    if jax.process_index() == victim:
        time.sleep(1)  # until the other is in the middle of it
        os.kill(os.getpid(), number)
        time.sleep(600)  # a signal that is ignored would keep it alive
    if occupation == "collective":
        compute_for_ever()
    if occupation == "barrier":
        distributed.barrier("never complete")
    if occupation == "broken collective":  # as NCCL's report it
        raise jax.errors.JaxRuntimeError("INTERNAL: remote process exited")
    if occupation == "orderly end":
        return
    time.sleep(600)


@pytest.mark.parametrize(
    ("victim", "number", "occupation"),
    [
        (1, signal.SIGKILL, "collective"),
        (0, signal.SIGKILL, "collective"),
        (1, signal.SIGTERM, "barrier"),
        (0, signal.SIGKILL, "nothing"),
        (1, signal.SIGKILL, "broken collective"),
        (0, signal.SIGKILL, "orderly end"),
    ],
)
def test_the_death_of_a_process_ends_the_others_with_a_clear_error(victim, number, occupation):
    ends = run_in_processes(
        lose_a_process,
        victim,
        number,
        occupation,
        processes=3,
        devices=1,
        options={"heartbeat_timeout": 600},  # no part in this: the test would fail by its patience
    )
    assert ends.pop(victim).returncode == -number
    for survivor in ends:
        assert survivor.returncode == 1, survivor.stderr
        assert f"error: process {victim} of 3 stopped answering" in survivor.stderr


def test_a_process_ends_with_a_clear_error_when_the_others_never_arrive():
    (alone,) = run_in_processes(
        compute_and_agree,
        processes=1,
        options={"start_timeout": 1},
        environment={"JAX_NUM_PROCESSES": "2"},
    )
    assert alone.returncode == 1
    assert "error: process 0 waited 1 seconds for the 2 processes of the job" in alone.stderr


def without_launcher():
    """Changes to the environment that leave nothing from which JAX could learn of a job."""
    launchers = ("JAX_", "SLURM_", "OMPI_", "KUBERNETES_", "TPU_")
    found = [name for name in os.environ if name.startswith(launchers)]
    ours = ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"]
    return dict.fromkeys([*found, *ours]) | {"JAX_PLATFORMS": "cpu"}


def test_slurms_variables_are_enough():
    slurm = {
        "SLURM_JOB_ID": str(os.getpid()),  # JAX makes the port from it
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "{process}",
        "SLURM_LOCALID": "{process}",
    }
    ends = run_in_processes(compute_and_agree, environment=without_launcher() | slurm)
    assert [end.returncode for end in ends] == [0, 0], ends
    assert [end.stdout.splitlines()[-1] for end in ends] == ["leads", "follows"]


def test_without_a_cluster_the_error_says_how_to_start():
    (alone,) = run_in_processes(compute_and_agree, processes=1, environment=without_launcher())
    assert alone.returncode == 1
    assert "ValueError: no cluster was found (" in alone.stderr
    assert "Slurm (srun)" in alone.stderr


def test_a_process_that_is_alone_leads_and_agrees_with_itself():
    assert distributed.is_leader()
    distributed.barrier("here")
    distributed.require_agreement("the seed", "0")
    distributed.agree_on_failure(None)
    with pytest.raises(distributed.DistributedError, match=r"^disk full$"):
        distributed.agree_on_failure("disk full")
    with pytest.raises(KeyError), distributed.ending_together():
        raise KeyError


@pytest.mark.parametrize(
    ("variable", "value", "error"),
    [
        ("JAX_COORDINATOR_ADDRESS", "localhost", "give host:port"),
        ("JAX_NUM_PROCESSES", "two", "JAX_NUM_PROCESSES is 'two'; it must be a number"),
        ("JAX_PROCESS_ID", "-1", "JAX_PROCESS_ID is '-1'; it must be a number"),
    ],
)
def test_a_malformed_variable_is_refused(monkeypatch, variable, value, error):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=error):
        distributed.initialize()
