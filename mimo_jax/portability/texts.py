"""What a report says to someone who has never seen the project."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence

from mimo_jax.portability import wording
from mimo_jax.portability.results import Results, StageName, Status

TITLE = "What of MiMo in JAX runs where"

INTRO = (
    "MiMo is a family of language models by Xiaomi, the largest of a trillion parameters. "
    "mimo-jax is a program that runs them in JAX. JAX compiles one program for many kinds of "
    "device, and whether a program compiles, fits, is right and is fast differs from one kind "
    "to the next.",
    "This study tried it: single operations (such as attention) in each of their forms, and "
    "whole steps of models (reading a prompt, producing a token), for CPUs, NVIDIA GPUs and "
    "Google TPUs. Compilers make programs for devices that aren't there, so a study needs no "
    "TPU to find out what a TPU's compiler says. What only a device can tell, numbers and speed, "
    "was found where the device was present, and says “not run” elsewhere.",
)

STAGES = (
    ("trace", "JAX writes the computation down."),
    ("lower", "It is put into the form that the compiler of that kind of device reads."),
    ("compile", "That compiler makes a program of it for the device."),
    ("agree", "It was run, and its numbers are those of a plain computation in float32, within "
     "a stated limit."),
    ("time", "It was timed on the device. The roofline is the time that reading the data or "
     "doing the arithmetic takes at the device's full speed; 100% is as fast as can be."),
)  # fmt: skip

STATUSES: tuple[tuple[Status, str, str], ...] = (
    ("ok", "agrees, compiles", "The furthest stage that was run; all before it are ok."),
    ("failed", "fails to compile", "It was tried at that stage and failed: a defect, or a limit "
     "of the compiler."),
    ("refused", "refused", "The project's own code says that this backend doesn't do this case, "
     "so that another is taken."),
    ("not run", "not run", "Nobody tried, and the reason says why. It may or may not work."),
)  # fmt: skip

MEMORY = (
    "A program that compiles can still need more memory than a device has: it then says “too "
    "large”, and would end with an error there."
)

BACKENDS = (
    ("reference", "plain JAX, compiled by XLA alone; every device has it"),
    ("triton", "own kernels for NVIDIA GPUs"),
    ("mosaic_gpu", "own kernels for NVIDIA's Hopper generation"),
    ("mosaic_tpu", "own kernels for TPUs"),
    ("interpreted", "a CPU plays the device: it can tell whether numbers are right, not the speed"),
    ("auto", "in steps of models: each operation takes the best form that the device has"),
)

TARGETS = (
    "A target such as hopper or v5e is a generation of devices that programs were compiled for. "
    "Numbers behind a colon are the arrangement of chips: v5p:4x4x4 is a TPU v5p slice of 64. "
    "A mesh says how a model is split over them: tensor=8 cuts every weight in eight."
)


def totals(results: Results) -> Sequence[tuple[Status, int, str]]:
    """How many rows got how far, and how many didn't."""
    found = collections.Counter(wording.worst(row)[0] for row in results)

    def ok(name: StageName) -> int:
        return sum(row.stages[name].status == "ok" for row in results)

    outgrown = sum(row.program is not None and row.program.fits is False for row in results)
    return [
        ("ok", ok("compile"), "compile"),
        ("ok", ok("agree"), "agree with the reference"),
        ("ok", ok("time"), "timed"),
        ("failed", found["failed"], "failed"),
        *([("failed", outgrown, "compile but don't fit")] if outgrown else []),
        ("refused", found["refused"], "refused"),
        ("not run", found["not run"], "not run at all"),
    ]


def summary(results: Results) -> str:
    """The study in a sentence."""
    if not results.rows:
        return "The study has no rows: nothing was tried."
    targets = wording.count(len({row.target for row in results}), "target")
    rest = ", ".join(f"{n:,} {words}" for _, n, words in totals(results))
    return f"{wording.count(len(results.rows), 'row')} on {targets}: {rest}."


def circumstances(results: Results) -> Iterator[str]:
    """Where and when, in a sentence for each run."""
    for n, run in enumerate(results.runs, 1):
        present = ", ".join(f"{k} x {wording.line(kind)}" for kind, k in run.devices.items())
        yield (
            f"Run {n}: {wording.line(run.at)}, on {wording.line(run.cpu)} with "
            f"{present or 'no other device'}, jax {wording.line(run.versions.get('jax', '?'))}, "
            f"commit {wording.line(run.commit)[:12] or 'not known'}."
        )
