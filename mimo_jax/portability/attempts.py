"""Trying a program on a target: tracing, lowering, compiling, and what the compiler says of it."""

from __future__ import annotations

import collections
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from mimo_jax.portability.places import Place
from mimo_jax.portability.results import STAGES, Exchange, Program, Stage, StageName, Status
from pallas_kernels import targets
from pallas_kernels.targets import Compiled, Hardware, RegisterSpillError, SerializedError
from sharding.hlo import collectives, summarize

# Targets of custom calls that are kernels of ours, by how their names begin.
_KERNELS = {
    "__gpu$xla.gpu.triton": "triton",
    "mosaic_gpu": "mosaic_gpu",
    "tpu_custom_call": "mosaic_tpu",
}
_LIBRARIES = ("__cublas", "__cudnn", "cublas", "cudnn")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")


def attempt(
    place: Place, f: Callable, args: tuple, mesh: Mesh | None = None
) -> tuple[dict[str, Stage], Program | None]:
    """Traces, lowers and compiles, as far as it goes.

    Args:
      place: the target.
      f: jitted.
      args: arrays or shapes, placed on the mesh if there is one.
      mesh: of the place's devices; None for one.

    Returns:
      The stages "trace", "lower" and "compile", and what was compiled.
    """
    stages: dict[str, Stage] = {}
    hardware = place.hardware
    reason = None if hardware is None else hardware.why_not_compile()
    if hardware is not None and mesh is None and reason is None:
        args = targets.on_first_device(hardware, args)
    value, spills = None, ()
    for name, run in _steps(hardware, f, args, mesh):
        if name == "compile" and reason is not None:
            stages[name] = Stage("not run", reason)
            return stages, None
        started = time.perf_counter()
        try:
            try:
                value = run(value)
            except (RegisterSpillError, SerializedError) as error:
                assert hardware is not None
                spills = (str(error).splitlines()[0],)
                value = targets.compile_lowered(hardware, value, spills=True)
        except Exception as error:  # whatever a compiler says is a result
            stages[name] = Stage("failed", describe(error), time.perf_counter() - started)
            rest = Stage("not run", f"{name} failed")
            return {"lower": rest, "compile": rest, **stages}, None
        stages[name] = Stage("ok", seconds=time.perf_counter() - started)
    assert isinstance(value, Compiled)
    return stages, read_program(value, place, spills)


def _steps(
    hardware: Hardware | None, f: Any, args: tuple, mesh: Mesh | None
) -> Iterator[tuple[StageName, Callable[[Any], Any]]]:
    """What each stage makes of what the one before has made."""
    if hardware is None:
        yield "trace", lambda _: f.trace(*args)
        yield "lower", lambda traced: traced.lower()
        yield "compile", lambda lowered: Compiled(lowered.compile(), {})
    else:
        yield "trace", lambda _: targets.trace(hardware, f, *args, mesh=mesh)
        yield "lower", lambda traced: targets.lower_traced(hardware, traced, mesh)
        yield "compile", lambda lowered: targets.compile_lowered(hardware, lowered)


def describe(error: Exception) -> str:
    """An error as a reason: its kind where the text alone would not say it."""
    text = str(error).strip() or type(error).__name__
    known = isinstance(error, NotImplementedError | ValueError | jax.errors.JaxRuntimeError)
    return text if known else f"{type(error).__name__}: {text}"


def read_program(compiled: Compiled, place: Place, spills: tuple[str, ...]) -> Program:
    """What a compiled program says of itself."""
    memory = compiled.program.memory_analysis()
    text = compiled.program.as_text() or ""
    kernels: collections.Counter[str] = collections.Counter()
    fusions = libraries = 0
    for line in _launched(text):
        if " fusion(" in line:
            fusions += 1
            continue
        call = re.search(r'custom_call_target="([^"]*)"', line)
        if call is None:
            continue
        ours = [name for start, name in _KERNELS.items() if call[1].startswith(start)]
        kernels.update(ours)
        libraries += call[1].startswith(_LIBRARIES)
    exchanged = summarize(collectives(text))
    device = place.device
    return Program(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes or None,
        usable_bytes=None if device is None else int(device.usable.value),
        collectives={kind: Exchange(t.count, t.bytes) for kind, t in exchanged.items()},
        kernels=dict(kernels),
        fusions=fusions,
        library_calls=libraries,
        registers=compiled.registers,
        spills=spills,
    )


def _launched(text: str) -> Iterator[str]:
    """Lines of a program's text outside of the bodies of its fusions."""
    inside = ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            inside = header[1]
        elif "fused" not in inside and "fusion" not in inside:
            yield line


def not_tried(reason: str, status: Status = "not run") -> dict[str, Stage]:
    """The stages of what ends before it begins."""
    stages: dict[str, Stage] = {name: Stage("not run", reason) for name in STAGES}
    stages["trace"] = Stage(status, reason)
    return stages
