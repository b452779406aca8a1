"""Studies for tests: a small one with everything that can occur, and one as large as real ones."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

from mimo_jax.portability.results import (
    STAGES,
    Agreement,
    Exchange,
    Program,
    Results,
    Room,
    Row,
    Run,
    Slice,
    Speed,
    Stage,
    StageName,
    Status,
)

GIB = 2**30
ODD = (
    'error: operand "<8x128xi32>" & `x|y` \x1b[31m*red*\x1b[0m\x07 </pre><script>alert(1)</script>'
)
LONG = "INTERNAL: Mosaic failed to compile TPU kernel\n" + "\n".join(
    f"  %{n} = vector.extract_strided_slice <8x128xi32> & `more` {n}" for n in range(400)
)
NO_DEVICE = "no such device is here"

RUN = Run(
    "2026-07-04T12:00:00Z",
    1234.5,
    "portability --out study --kernels",
    "AMD EPYC 9654",
    16,
    "3.12.11",
    {"NVIDIA H100 80GB HBM3": 1},
    {"jax": "0.11.2", "jaxlib": "0.11.2", "flax": "0.12.12", "numpy": "2.3.1", "mimo-jax": "0.1.0"},
    {"libtpu": "0.0.48", "ptxas": "13.0.88"},
    "0123456789abcdef0123456789abcdef01234567",
)


def stages(
    reached: StageName, status: Status = "ok", reason: str = "", rest: str = NO_DEVICE
) -> dict[str, Stage]:
    """Stages that are ok up to one, which ends as is said; those behind it weren't run."""
    found: dict[str, Stage] = {}
    for name in STAGES[: STAGES.index(reached)]:
        found[name] = Stage("ok", seconds=0.25)
    found[reached] = Stage(status, reason, None if status == "not run" else 1.5)
    for name in STAGES[STAGES.index(reached) + 1 :]:
        found[name] = Stage("not run", rest)
    return found


def program(
    arguments: float = 1.0, temporary: float = 0.5, usable: float | None = 95.73, **changes
):
    """A program of so many GiB."""
    made = Program(
        argument_bytes=int(arguments * GIB),
        output_bytes=int(arguments * GIB / 8),
        alias_bytes=int(arguments * GIB / 16),
        temp_bytes=int(temporary * GIB),
        code_bytes=40 * 2**20,
        usable_bytes=None if usable is None else int(usable * GIB),
        collectives={},
        kernels={"triton": 3},
        fusions=17,
        library_calls=2,
        registers={},
        spills=(),
    )
    return dataclasses.replace(made, **changes)


def row(subject: str = "moe", case: str = "pro 8", target: str = "h100", **changes: Any) -> Row:
    """A row that compiled, and was neither checked nor timed."""
    made = Row(subject, case, target, 1, "", "triton", stages("compile"), program())
    return dataclasses.replace(made, **changes)


def measured(
    seconds: float = 1e-4, error: float = 2e-3, roofline: float | None = 8e-5, **changes: Any
) -> Row:
    """A row that was checked and timed."""
    return row(
        agreement=Agreement(error, 1e-2, "outputs, at the case's own sizes"),
        speed=Speed(seconds, 3e8, 2e9, roofline),
        **{"stages": stages("time"), **changes},
    )


def every() -> Results:
    """Each status at each stage, and characters that Markdown, HTML and terminals would obey."""
    failed = [row("moe", f"failed {s}", stages=stages(s, "failed", f"{s}: {ODD}")) for s in STAGES]
    refused = [row("moe", f"refused {s}", stages=stages(s, "refused", f"no {s}")) for s in STAGES]
    unrun = [row("moe", f"{s} not run", stages=stages(s, "not run", f"no {s}")) for s in STAGES]
    others = [
        measured(case="everything ok"),
        measured(case="no roofline", roofline=None, program=program(usable=None, code_bytes=None)),
        measured(case="wrong", error=0.5, stages=stages("agree", "failed", "0.5 is over 0.01")),
        measured(case="not a number", error=float("nan"), seconds=0.0),
        row("at|tention_", "<b>*odd*</b> & `case`", "v5e", backend="mosaic_tpu interpreted"),
        row("moe", "long", "v6e", stages=stages("compile", "failed", LONG), program=None),
        row("moe", "lone \ud800 surrogate", "v6e", stages=stages("trace", "failed", "\ud800")),
        row("moe", "spills", "hopper", program=program(spills=("few_<k>",), registers={"k": 255})),
    ]
    return Results((RUN,), (*failed, *refused, *unrun, *others, *_steps()), _slices())


def _steps() -> Iterator[Row]:
    exchange = {"all-reduce": Exchange(140, 3 * GIB), "all-to-all <x>": Exchange(2, 5)}
    for mesh, gib in (("tensor=64", 60.0), ("tensor=8,expert=8", 120.0)):
        yield row(
            "decode",
            "MiMo-V2.5-Pro batch 8",
            "v5p:4x4x4",
            devices=64,
            mesh=mesh,
            backend="auto",
            program=program(gib, 4, collectives=exchange),
        )
    yield row("prefill", "MiMo-V2.6-Flash-RL", "cpu", backend="auto", program=program(usable=None))


def _slices() -> tuple[Slice, ...]:
    rooms = (Room(1, 8192, 60 * GIB, True), Room(64, 8192, 99 * GIB, False))
    held = Slice(
        *("MiMo-V2.5-Pro", "v5p", "4x4x4", 64, "tensor=64", 50 * GIB, 95 * GIB, rooms[:2], "")
    )
    other = dataclasses.replace(held, device="tpu7x", rooms=(Room(1, 131072, 70 * GIB, True),))
    none = Slice("MiMo-V2.5-Pro", "v4", "", 0, "", 0, 0, (), "no slice | of <v4> holds it")
    return held, other, none


_CASES = {
    "moe": ("pro 1", "pro 8", "pro 64", "pro 4096", "flash 1", "off the tile grid"),
    "quantized_matmul": ("pro qkv 1", "pro qkv 4096", "flash o 8"),
    "attention": ("pro full 4096", "pro window 4096", "one block"),
    "decode_attention": ("pro full 1x32768", "pro ring 8x128"),
}
_BACKENDS = {
    "cpu": ("reference", "triton interpreted", "mosaic_tpu interpreted"),
    "ampere": ("reference", "triton"),
    "hopper": ("reference", "triton", "mosaic_gpu"),
    "h100": ("reference", "triton", "mosaic_gpu"),
    **dict.fromkeys(("v4", "v5e", "v5p", "v6e", "tpu7x"), ("reference", "mosaic_tpu")),
}
_MODELS = {
    "MiMo-V2.6-Flash-RL": (
        ("hopper", "", 1, 150),
        ("v5e:4x4", "tensor=16", 16, 11.2),
        ("v6e:2x4", "tensor=8", 8, 22.5),
        ("tpu7x:2x2x1", "tensor=8", 8, 22.6),
    ),
    "MiMo-V2.5-Pro-FP4-DFlash": (
        ("v5p:4x4x4", "tensor=8,expert=8", 64, 9.4),
        ("tpu7x:2x2x2", "tensor=16", 16, 37.5),
        ("v5e:8x8", "tensor=64", 64, 14.9),
    ),
}
_USABLE = {"hopper": 77.0, "v5e": 15.75, "v6e": 31.24, "tpu7x": 94.75, "v5p": 95.73}


def large(seed: int = 0) -> Results:
    """About as many rows as a study has, alike in kind; the numbers are invented."""
    rng = random.Random(seed)
    rows = [*_operations(rng), *_models(rng)]
    return Results((RUN,), tuple(rows), _slices())


def _operations(rng: random.Random) -> Iterator[Row]:
    for subject, cases in _CASES.items():
        for case in cases:
            for target, backends in _BACKENDS.items():
                for backend in backends:
                    yield _operation(rng, subject, case, target, backend)


def _operation(rng: random.Random, subject: str, case: str, target: str, backend: str) -> Row:
    here = f"no {target} is here; this machine has NVIDIA H100 80GB HBM3 x 1"
    made = row(subject, case, target, backend=backend, stages=stages("compile", rest=here))
    made = dataclasses.replace(made, program=program(rng.random(), rng.random() / 9, 77.0))
    if backend == "mosaic_gpu" and subject == "decode_attention":
        no = "mosaic_gpu has no decode_attention: Triton's is as fast as the memory"
        return dataclasses.replace(made, program=None, stages=stages("trace", "refused", no))
    if target == "v4" and backend == "mosaic_tpu" and subject == "moe":
        late = "it didn't compile"
        bad = stages("compile", "failed", LONG, late)
        return dataclasses.replace(made, program=None, stages=bad)
    if target == "ampere":
        no = "no compiler for ampere: jax_plugins.xla_cuda13 isn't importable"
        return dataclasses.replace(made, program=None, stages=stages("compile", "not run", no))
    if target == "cpu":
        slow = "a CPU's speed is not what this is about"
        return dataclasses.replace(
            made,
            program=None if "interpreted" in backend else made.program,
            stages=stages("agree", rest=slow),
            agreement=Agreement(rng.uniform(1e-3, 4e-3), 1e-2, "outputs, at small sizes"),
        )
    if target == "h100":
        roofline = rng.uniform(5e-6, 5e-4)
        slowness = 1 / rng.uniform(0.02, 0.3) if backend == "reference" else rng.uniform(1.1, 2)
        return dataclasses.replace(
            made,
            stages=stages("time"),
            agreement=Agreement(rng.uniform(1e-3, 4e-3), 1e-2, "outputs, at the case's sizes"),
            speed=Speed(roofline * slowness, roofline * 3e12, roofline * 1e14, roofline),
        )
    return made


def _models(rng: random.Random) -> Iterator[Row]:
    for model, places in _MODELS.items():
        for subject, case in (("prefill", "prompt 2048"), ("decode", "batch 8"), ("verify", "8x8")):
            for target, mesh, devices, gib in places:
                usable = _USABLE[target.split(":")[0]]
                exchange = {"all-reduce": Exchange(rng.randrange(90, 150), rng.randrange(10**8))}
                temporary = 4.0 if subject == "prefill" else 0.6
                yield row(
                    subject,
                    f"{model} {case}",
                    target,
                    devices=devices,
                    mesh=mesh,
                    backend="auto",
                    program=program(
                        gib, temporary, usable, collectives=exchange if devices > 1 else {}
                    ),
                )
