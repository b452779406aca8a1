"""A whole study: everything is tried, by processes of their own."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from mimo_jax import checkpoint
from mimo_jax.config import MiMoConfig
from mimo_jax.engine.machine import PACKAGES, cpu_model
from mimo_jax.portability.jobs import Job, plan_jobs
from mimo_jax.portability.places import HERE, PlaceError
from mimo_jax.portability.results import Results, Row, Run
from mimo_jax.portability.slices import slices
from mimo_jax.portability.steps import STEPS as STEP_SIZES
from mimo_jax.portability.workers import environment, run_jobs

STEPS = tuple(STEP_SIZES)
SUBJECTS = ("moe", "quantized_matmul", "attention", "decode_attention")
TARGETS = (
    *("cpu", "hopper", "hopper:8", "ampere:8", "blackwell:8", "v4:2x4x4"),
    *("v5e:4x8", "v5e:8x8", "v5p:4x4x4", "v6e:8x8", "tpu7x:2x2x4"),
)
MODELS = ("mimo-tiny", "MiMo-V2.6-Flash-RL", "MiMo-V2.5-Pro-FP4-DFlash")
_COMPILERS = ("libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm")
# What accelerators jax finds, asked in a process that ends again and so lets go of them.
_ASK = """
import collections, json, jax
from mimo_jax.portability.places import present_kind
kinds = collections.Counter(d.device_kind for d in jax.devices() if d.platform != "cpu")
print(json.dumps([dict(kinds), present_kind() if kinds else ""]))
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """What a study tries.

    Attributes:
      targets, operations, models, steps, kernels: their names; `kernels` are those of steps.
      layers: of models that are taken; 0 for all.
      slices: whether to look for the smallest slices.
      compilers: a folder that compilers are importable from, if they are apart.
      workers: processes at a time.
      timeout: seconds after which one thing is given up.
    """

    targets: Sequence[str] = TARGETS
    operations: Sequence[str] = SUBJECTS
    models: Sequence[str] = MODELS
    steps: Sequence[str] = ("decode",)
    kernels: Sequence[str] = ("auto",)
    layers: int = 0
    slices: bool = True
    compilers: Path | None = None
    workers: int = 1
    timeout: float = 600.0


def run_study(
    options: Options,
    command: str,
    done: Callable[[int, int, Job, Row], None],
    keep: Callable[[Results], None],
) -> Results:
    """Tries everything.

    Args:
      options: what.
      command: that asked for it, for the report.
      done: called after each thing with how many there were and are, the thing and its row.
      keep: called after each with all that there is so far, so that nothing is lost.

    Raises:
      PlaceError: there is no such target, or "here" is one and there is no accelerator.
      ConfigNotFoundError: there is no such model.
      ValueError: it has not so many layers.
    """
    started = time.monotonic()
    targets = tuple(dict.fromkeys(name.strip().lower() for name in options.targets))
    devices, present = _present() if HERE in targets else ({}, "")
    configs = {
        m: MiMoConfig.from_pretrained(checkpoint.bundled().get(m, m)) for m in options.models
    }
    for config in configs.values() if options.layers else ():
        config.truncated(options.layers)  # or it says how many there are
    jobs = plan_jobs(
        *(targets, options.operations, options.models, options.steps, options.kernels),
        layers=options.layers,
        present=present,
    )
    run = _run(options, command, devices)
    rows: dict[Job, Row] = {}

    def results() -> Results:
        after = dataclasses.replace(run, seconds=round(time.monotonic() - started, 1))
        return Results((after,), tuple(rows[job] for job in jobs if job in rows), tuple(found))

    def one_done(job: Job, row: Row) -> None:
        rows[job] = row
        keep(results())
        done(len(rows), len(jobs), job, row)

    found = [s for m, c in configs.items() for s in slices(m, c)] if options.slices else []
    for on_devices in (False, True):
        run_jobs(
            [job for job in jobs if (job.target == HERE) == on_devices],
            environment(options.compilers, devices=on_devices),
            workers=1 if on_devices else options.workers,
            timeout=options.timeout,
            done=one_done,
        )
    return results()


def _run(options: Options, command: str, devices: Mapping[str, int]) -> Run:
    now = datetime.datetime.now(datetime.UTC)
    versions = {name: metadata.version(name) for name in PACKAGES}
    return Run(
        at=now.isoformat(timespec="seconds"),
        seconds=0.0,
        command=command,
        cpu=cpu_model(),
        cores=os.cpu_count() or 1,
        python=platform.python_version(),
        devices=devices,
        versions=versions,
        compilers=_compilers(options.compilers),
        commit=_commit(),
    )


def _present() -> tuple[dict[str, int], str]:
    """How many accelerators of each kind there are, and what the kind is called here."""
    asked = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True)
    if asked.returncode:
        said = asked.stderr.strip().splitlines() or ["nothing"]
        raise PlaceError(f"target 'here': jax can't say what accelerators there are: {said[-1]}")
    devices, present = json.loads(asked.stdout.splitlines()[-1])
    if not devices:
        raise PlaceError("target 'here': jax finds no accelerator on this machine")
    return devices, present


def _compilers(folder: Path | None) -> dict[str, str]:
    """Versions of the compilers that are installed, in a folder of their own or with the rest."""
    path = [str(folder)] if folder else []
    found = {}
    for distribution in metadata.distributions(path=[*path, *sys.path]):
        name = distribution.metadata["Name"]
        if name in _COMPILERS:
            found.setdefault(name, distribution.version)
    return found


def _commit() -> str:
    """Of the repository that the package is in; "" if it isn't."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        asked = subprocess.run(command, cwd=root, capture_output=True, text=True)
    except OSError:
        return ""
    return asked.stdout.strip()
