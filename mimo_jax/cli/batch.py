"""`mimo-jax batch` and `mimo-jax merge`: files of prompts in, files of completions out."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import mimo_jax
from mimo_jax.cli import options
from mimo_jax.cli.console import FAILED, INTERRUPTED, fail, readable_errors
from sharding import distributed as jobs


def batch(
    in_path: Annotated[
        str, typer.Argument(metavar="IN", help="Requests, one a line; gzip or not; - is stdin.")
    ],
    out_path: Annotated[Path, typer.Argument(metavar="OUT", help="Results; continued.")],
    model: options.Model = "mimo-tiny",
    batch_size: Annotated[int, typer.Option(min=1, help="Completions decoded together.")] = 16,
    max_len: Annotated[
        int | None,
        typer.Option(
            min=2, help="Prompt and completion together; default: what the longest line needs."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Lines without a seed get one from this.")] = 0,
    max_tokens: Annotated[int | None, typer.Option(help="Default of the lines [256].")] = None,
    temperature: Annotated[float | None, typer.Option(help="Default of the lines [1].")] = None,
    top_p: Annotated[float | None, typer.Option(help="Default of the lines [1].")] = None,
    top_k: Annotated[int | None, typer.Option(help="Default of the lines [0: all].")] = None,
    min_p: Annotated[float | None, typer.Option(help="Default of the lines [0].")] = None,
    preview: Annotated[int, typer.Option(min=0, help="Completions to show at the end.")] = 3,
    mesh: options.Mesh = None,
    rules: options.Rules = "latency",
    kernels: options.Kernels = "auto",
    dtype: options.Dtype = None,
    speculative: options.Speculative = None,
    draft_width: options.DraftWidth = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Only every Nth line, from the Ith on.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Go on with results of a run with other options.")
    ] = False,
    metrics: Annotated[
        Path | None, typer.Option(help="File to which a line of JSON is added every second.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Folder for a jax.profiler trace of some dispatches.")
    ] = None,
    distributed: options.Distributed = False,
) -> None:
    """Complete a file of requests; the same command again goes on where it stopped.

    A line has one of "prompt" (text), "messages" (chat) and "token_ids"; "id", if its number should
    not be its name; and any field of SamplingParams, in place of the command's options.  Or it is a
    line of OpenAI's batch API.  Each makes a line of results, in the same form: a completion, or an
    error, which stops none of the others.  Lines come in the order in which they end; each is on
    the disk before the next.  What the results were made with is in a manifest beside them.

    Ctrl-C and SIGTERM end the run when the requests under way are done, a second one at once.

    Exit codes: 0 all lines are completed, 1 some have errors or the run had to stop, 2 wrong usage,
    130 interrupted.
    """
    defaults = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
    }
    with readable_errors(), _results_errors(), contextlib.ExitStack() as stack:
        if distributed:
            jobs.initialize()
        writes = jobs.is_leader()
        err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True, quiet=not writes)
        from mimo_jax import checkpoint
        from mimo_jax.cli.run_batch import Run, Settings, pending, print_summary, run_batch
        from mimo_jax.engine.durable import check_writable
        from mimo_jax.engine.manifest import ensure_manifest, hash_checkpoint, make_manifest
        from mimo_jax.engine.requests import Shard, read_requests
        from mimo_jax.engine.results import Results

        mimo_jax.SamplingParams.from_dict(defaults)
        decoding: dict[str, Any] = {
            "speculative": speculative,
            "draft_width": options.draft_width(draft_width, speculative is not None),
        }
        part = None if shard is None else Shard.parse(shard)
        if profile is not None and writes:
            check_writable(profile, folder=True)
        source = read_requests(in_path, defaults, seed, part)
        placed: dict[str, Any] = {"mesh": mesh, "rules": rules, "kernels": kernels, "dtype": dtype}
        manifest = make_manifest(
            source,
            model=model,
            checkpoint_sha256=hash_checkpoint(checkpoint.resolve(model)),
            code_version=mimo_jax.__version__,
            **placed,
            decoding={**decoding, "batch_size": batch_size, "max_len": max_len},
            sampling=defaults,
            seed=seed,
            shard=part,
        )
        jobs.require_agreement("the run", repr(manifest))
        results = None
        if writes:
            stack.enter_context(_nothing_left_of_an_error(out_path))
            results = stack.enter_context(Results(out_path))
            for override in ensure_manifest(out_path, manifest, len(results) > 0, force):
                err.print(f"--force: {override}")
            results.match(source.requests, source.failures, force)
            if len(results):
                err.print(f"{out_path} has {len(results)} lines already: going on")
            results.add_failures(source.failures)
        settings = Settings(
            model,
            batch_size,
            max_len,
            decoding,
            metrics if writes else None,
            profile if writes else None,
        )
        run = Run()
        with _interruptible(results, err):
            if pending(source.requests, results):
                lm = mimo_jax.load(model, progress=writes, **placed)
                run = run_batch(lm, source.requests, results, settings, err)
        if run.interrupted:
            _say_what_is_safe(results, err)
            jobs.leave(INTERRUPTED)
        failed = "" if results is None else str(results.failed)
        if results is not None:
            print_summary(results, run, preview)
        if jobs.from_leader("how many lines failed", failed) != "0":
            jobs.leave(FAILED)


def merge(
    parts: Annotated[list[Path], typer.Argument(metavar="PARTS", help="Results of all shards.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
) -> None:
    """Merge the results of `batch --shard` into one file, in the order of the input."""
    with readable_errors(), _results_errors():
        from mimo_jax.engine.merging import merge as merged

        print(f"{out} has {merged(parts, out)} lines")


def _say_what_is_safe(results: Any, err: Console) -> None:
    if results is not None:
        err.print(
            f"interrupted: {len(results)} lines are safe in {results.path}; run it again to go on"
        )


@contextlib.contextmanager
def _nothing_left_of_an_error(out_path: Path) -> Iterator[None]:
    """Removes the files of a run that ends with an error before its first line, if they are new."""
    from mimo_jax.engine.manifest import manifest_path

    files = [path for path in (out_path, manifest_path(out_path)) if not path.exists()]
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        empty = out_path.is_file() and not out_path.stat().st_size
        for path in files if empty and not isinstance(error, typer.Exit) else ():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _results_errors() -> Iterator[None]:
    """Turns what is wrong with a file of results into a message."""
    from mimo_jax.engine.results import ResultsError

    try:
        yield
    except ResultsError as error:
        fail(f"error: {error}", FAILED)


@contextlib.contextmanager
def _interruptible(results: Any, err: Console) -> Iterator[None]:
    """Ends the command on Ctrl-C and on SIGTERM, saying what is safe."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        _say_what_is_safe(results, err)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGTERM, before)
