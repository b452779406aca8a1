"""`mimo-jax portability`: what lowers, compiles, agrees and how fast, on every backend."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from mimo_jax.cli.console import FAILED, INTERRUPTED, fail, printable, readable_errors

if TYPE_CHECKING:
    from mimo_jax.portability.jobs import Job
    from mimo_jax.portability.results import Row

COMPILERS = Path(".compilers")  # where `make compile` puts them


def portability(
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("portability"),
    targets: Annotated[
        str | None,
        typer.Option(
            help="cpu, here (the accelerator of this machine), hopper:8, v5p:4x4x4, ..., with "
            "commas; default: the CPU and ten kinds that need not be there."
        ),
    ] = None,
    operations: Annotated[
        str | None, typer.Option(help="moe, quantized_matmul, attention, decode_attention or none.")
    ] = None,
    models: Annotated[
        str | None, typer.Option(help="Presets whose steps are tried, or none.")
    ] = None,
    steps: Annotated[str, typer.Option(help="decode, verify and prefill.")] = "decode",
    kernels: Annotated[str, typer.Option(help="Of the steps: auto, reference, ...")] = "auto",
    layers: Annotated[
        int, typer.Option(min=0, help="Only so many first layers of models; 0 for all.")
    ] = 0,
    slices: Annotated[
        bool, typer.Option(help="Look for the smallest slice of each kind that holds a model.")
    ] = True,
    workers: Annotated[int, typer.Option(min=1, help="Processes that compile at a time.")] = 1,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds after which one is given up.")
    ] = 600.0,
    compilers: Annotated[
        Path | None,
        typer.Option(help="Folder that compilers are importable from; default: .compilers."),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A B", help="Say what changed between two reports; run nothing."),
    ] = None,
    same: Annotated[
        str | None, typer.Option(help="With --compare: h100=h200 takes these targets as one.")
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="An earlier report: exit with 1 if something worked there only."),
    ] = None,
    join: Annotated[
        list[Path] | None,
        typer.Option(help="A report whose rows are taken in as well; may be repeated."),
    ] = None,
) -> None:
    """Try the kernels and whole steps of models on devices that need not be there.

    Makes a folder with results.json, report.md and report.html; the first grows row by row.
    """
    with readable_errors():
        import jax

        from mimo_jax.engine.durable import check_writable
        from mimo_jax.portability import report, study
        from mimo_jax.portability.compare import compare as compared
        from mimo_jax.portability.compare_text import verdict
        from mimo_jax.portability.jobs import AUTO
        from mimo_jax.portability.results import FILE, Results
        from pallas_kernels.backends import NAMES, REFERENCE

        if same is not None and compare is None:
            raise ValueError(f"--same {same} is of --compare; give that too")
        if compare is not None:
            a, b = (Results.read(path) for path in compare)
            print(printable(compared(a, b, _pairs(same)).markdown()))
            return
        jax.config.update("jax_platforms", "cpu")  # the accelerator is the workers'
        earlier = Results.read(baseline) if baseline is not None else None
        taken = [Results.read(path) for path in join or ()]
        apart = compilers or (COMPILERS if COMPILERS.is_dir() else None)
        if compilers is not None and not compilers.is_dir():
            raise FileNotFoundError(f"there is no folder {compilers} with compilers")
        options = study.Options(
            targets=_names(targets, study.TARGETS),
            operations=_among(_names(operations, study.SUBJECTS), study.SUBJECTS, "operation"),
            models=_names(models, study.MODELS),
            steps=_among(_names(steps, ()), study.STEPS, "step"),
            kernels=_among(_names(kernels, ()), (AUTO, REFERENCE, *NAMES), "backend"),
            layers=layers,
            slices=slices,
            compilers=apart and apart.resolve(),
            workers=workers,
            timeout=timeout,
        )
        check_writable(out, folder=True)
        err = Console(stderr=True)
        try:
            with err.status("working: what has been tried gets a line"):
                results = study.run_study(
                    options, " ".join(sys.argv[1:]), _say, lambda r: r.write(out)
                )
        except KeyboardInterrupt:
            there = (out / FILE).is_file()
            kept = f"; the rows so far are in {out / FILE}" if there else ""
            fail(f"interrupted{kept}", INTERRUPTED)
        for other in taken:
            results = other.joined(results)
        report.write_report(results, out)
        print(f"{len(results.rows)} rows: {out / 'report.html'}, report.md and results.json")
        if earlier is not None:
            found = compared(earlier, results)
            print(printable(verdict(found)))
            if found.regressions:
                fail(f"worse than {baseline}:\n{found.markdown()}", FAILED)


def _say(n: int, total: int, job: Job, row: Row) -> None:
    """A line of progress."""
    stage, how = row.reached
    reason = f": {how.reason.splitlines()[0][:100]}" if how.reason else ""
    print(printable(f"{n}/{total} {job.text}: {stage} {how.status}{reason}"), file=sys.stderr)


def _names(text: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    if text is None:
        return default
    return () if text == "none" else tuple(filter(None, (n.strip() for n in text.split(","))))


def _among(names: tuple[str, ...], known: tuple[str, ...], what: str) -> tuple[str, ...]:
    for name in names:
        if name not in known:
            raise ValueError(f"there is no {what} {name!r}; there are {', '.join(known)}")
    return names


def _pairs(text: str | None) -> dict[str, str]:
    """Targets that are compared with each other, from h100=h200."""
    pairs = {}
    for part in _names(text, ()):
        a, equals, b = part.partition("=")
        if not (a and equals and b):
            raise ValueError(f"--same {text!r}: write it as h100=h200")
        pairs[a] = b
    return pairs
