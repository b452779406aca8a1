"""The work of a study, cut into jobs that can be run one by one in a process of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from mimo_jax.config import MiMoConfig
from mimo_jax.portability import measured_steps, measuring
from mimo_jax.portability.attempts import attempt, describe, not_tried
from mimo_jax.portability.operations import Operation, operations
from mimo_jax.portability.places import CPU, Place, find_place
from mimo_jax.portability.results import Row, Stage
from mimo_jax.portability.steps import STEPS, StepSize, abstract_step
from pallas_kernels.backends import NAMES, REFERENCE

AUTO = "auto"
NOT_HERE = "needs such a device, and this machine has none"


@dataclasses.dataclass(frozen=True)
class Job:
    """One row to be made.

    Attributes:
      subject: an operation or a kind of step.
      case: an operation's size; of a step "".
      target: as for `find_place`.
      backend: that does it; "auto" or a name for a step.
      model: of a step, else "".
      layers: of the model that are taken; 0 for all.
      present: kind of the accelerator of this machine.
    """

    subject: str
    case: str
    target: str
    backend: str
    model: str = ""
    layers: int = 0
    present: str = ""

    @property
    def place(self) -> Place:
        """The target."""
        return find_place(self.target, self.present)

    @property
    def text(self) -> str:
        """For progress."""
        return f"{self.subject} {self.model or self.case} on {self.place.name}, {self.backend}"


def plan_jobs(
    targets: Sequence[str],
    subjects: Sequence[str],
    models: Sequence[str],
    steps: Sequence[str],
    kernels: Sequence[str],
    layers: int = 0,
    present: str = "",
) -> list[Job]:
    """The jobs of a study, those of a target together.

    Operations are tried once for each kind of device; on a CPU the small ones.  Steps are tried
    everywhere.

    Args:
      targets, subjects, models, steps: their names.
      kernels: of steps, as for `mimo_jax.load`.
      layers: of models; 0 for all.
      present: kind of the accelerator of this machine.

    Raises:
      PlaceError: there is no such target.
    """
    jobs: list[Job] = []
    kinds = set()
    for name in targets:
        place = find_place(name, present)
        if place.kind not in kinds:
            kinds.add(place.kind)
            one = name if place.hardware is None else place.kind
            jobs += [
                Job(operation.subject, operation.case, one, backend, present=present)
                for operation in operations()
                if operation.small == (place.kind == CPU) and operation.subject in subjects
                for backend in (REFERENCE, *NAMES)
            ]
        jobs += [
            Job(step, "", name, one, model, layers, present)
            for model in models
            for step in steps
            for one in kernels
        ]
    return jobs


def run_job(job: Job) -> Row:
    """Does a job; what fails is in the row, the project's own errors too."""
    try:
        return _step(job) if job.model else _operation(job)
    except Exception as error:
        return unfinished(job, describe(error))


def unfinished(job: Job, reason: str) -> Row:
    """The row of a job that ended before it was done, for a reason of no stage."""
    place = job.place
    backend = job.backend
    if job.model:
        try:
            case = step_case(job)
        except (ValueError, OSError):  # the model's files have gone meanwhile
            case = job.model
    else:
        case = job.case
        backend += _suffix(place, backend)
    stages = not_tried(reason, "failed")
    return Row(job.subject, case, place.name, place.devices, place.mesh, backend, stages)


def step_case(job: Job) -> str:
    """The name of a step's case."""
    config, size, layers = _sized(job)
    return measured_steps.named(size, job.model, layers, config.num_hidden_layers)


def _sized(job: Job) -> tuple[MiMoConfig, StepSize, int | None]:
    """Of a step the whole model, the sizes, and how many layers are taken, None for all."""
    place = job.place
    config = MiMoConfig.from_pretrained(_preset(job.model))
    size = measured_steps.smaller(STEPS[job.subject], config)
    layers = job.layers or None
    if place.hardware is None and layers is None:
        layers = measured_steps.fitting_layers(config, size, place)
    return config, size, None if layers == config.num_hidden_layers else layers


def _suffix(place: Place, backend: str) -> str:
    return " interpreted" if place.kind == CPU and backend != REFERENCE else ""


def _operation(job: Job) -> Row:
    place = job.place
    found = [o for o in operations() if (o.subject, o.case) == (job.subject, job.case)]
    if not found:
        raise ValueError(f"there is no {job.subject} of case {job.case!r}")
    operation = found[0]
    interpreted = bool(_suffix(place, job.backend))

    def row(stages: Any, **more: Any) -> Row:
        name = job.backend + _suffix(place, job.backend)
        return Row(job.subject, job.case, place.name, 1, "", name, stages, **more)

    with measuring.interpreting(interpreted):
        reason = place.backends()[job.backend] or _refused(operation, place, job.backend)
        if reason is not None:
            return row(not_tried(reason, "refused"))
        call = measuring.called(operation, job.backend)
        shapes = _packed_shapes(operation, place, job.backend)
        stages, program = attempt(place, jax.jit(call), shapes)
        if place.hardware is not None:
            rest = dict.fromkeys(("agree", "time"), Stage("not run", NOT_HERE))
            return row({**stages, **rest}, program=program)
        if program is None:
            rest = dict.fromkeys(("agree", "time"), Stage("not run", "it didn't compile"))
            return row({**stages, **rest})
        stages["agree"], agreement = measuring.agree(operation, place, job.backend, call)
        if interpreted:
            stages["time"] = Stage("not run", "an interpreted kernel's time says nothing")
            return row(stages, program=program, agreement=agreement)
        stages["time"], speed = measuring.time_operation(operation, place, job.backend, call)
    return row(stages, program=program, agreement=agreement, speed=speed)


def _packed_shapes(operation: Operation, place: Place, backend: str) -> tuple:
    def pack(args: tuple) -> tuple:
        return operation.packed(args, backend, native_e2m1=place.native_e2m1)

    return jax.eval_shape(pack, operation.shapes)


def _refused(operation: Operation, place: Place, backend: str) -> str | None:
    try:
        shapes = _packed_shapes(operation, place, backend)
    except NotImplementedError as error:
        return describe(error)
    return operation.why_not(shapes, backend)


def _step(job: Job) -> Row:
    place = job.place
    config, size, layers = _sized(job)
    case = measured_steps.named(size, job.model, layers, config.num_hidden_layers)

    def row(stages: Any, **more: Any) -> Row:
        where = place.name, place.devices, place.mesh
        return Row(job.subject, case, *where, job.backend, stages, **more)

    cut = config if layers is None else config.truncated(layers)
    reason = place.hardware and place.hardware.why_not_compile()
    if reason and place.devices > 1:  # its topology is the compiler's to describe
        return row(not_tried(reason))
    try:
        step = abstract_step(cut, size, place, job.backend)
    except Exception as error:  # a mesh that doesn't divide the model, kernels that don't run
        return row(not_tried(describe(error), "refused"))
    stages, program = attempt(place, step.f, step.args, step.mesh)
    if place.hardware is not None:
        stages.update(dict.fromkeys(("agree", "time"), Stage("not run", NOT_HERE)))
        return row(stages, program=program)
    reason = measured_steps.too_large(cut, size, place)
    if reason is not None:
        stages.update(dict.fromkeys(("agree", "time"), Stage("not run", reason)))
        return row(stages, program=program)
    stages["agree"], agreement = measured_steps.agree(job.model, size, job.backend)
    stages["time"], speed = measured_steps.time_step(job.model, layers, size, place, job.backend)
    return row(stages, program=program, agreement=agreement, speed=speed)


def _preset(model: str) -> Any:
    from mimo_jax import checkpoint

    return checkpoint.bundled().get(model, model)
