"""`mimo-jax bench`: throughput and latency of a model under a workload, by concurrency."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import mimo_jax
from mimo_jax.cli import options
from mimo_jax.cli.console import INTERRUPTED, readable_errors

if TYPE_CHECKING:
    from mimo_jax.engine.workload import Workload
    from mimo_jax.language_model import LanguageModel

LENGTHS = "lognormal:128,0.8,1024"
CONCURRENCY = "1,2,4,8,16,32,64,128"


def bench(
    model: options.Model = "mimo-tiny",
    random_weights: options.RandomWeights = None,
    layers: options.Layers = None,
    mesh: options.Mesh = None,
    rules: options.Rules = "latency",
    kernels: options.Kernels = "auto",
    dtype: options.Dtype = None,
    speculative: options.Speculative = None,
    draft_width: options.DraftWidth = None,
    concurrency: Annotated[
        list[str] | None,
        typer.Option(help=f"Requests decoded together, several of it; default: {CONCURRENCY}."),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(min=1, help="Of each run; default: 2 x concurrency, 32 at least."),
    ] = None,
    prompt_len: Annotated[
        str, typer.Option(help="Tokens: 128, 32-512 or lognormal:MEDIAN,SIGMA[,MOST].")
    ] = LENGTHS,
    output_len: Annotated[str, typer.Option(help="Tokens, as of --prompt-len.")] = LENGTHS,
    rate: Annotated[
        float | None, typer.Option(help="Requests/s, a Poisson process; default: all come at once.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of lengths, tokens and arrivals.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Results as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="A plot of them, .png or .svg.")] = None,
) -> None:
    """Measure throughput, latency and memory under a workload, by concurrency.

    Requests have random tokens and greedy outputs of lengths that are drawn.  Each concurrency
    serves the same ones (more of them where it is higher), after a warm-up that compiles all there
    is to compile.  Times count from a request's arrival: TTFT to its first tokens (16 reach the
    host together, with speculation those of 6 rounds), e2e to its last; TPOT is what each token
    between took.  Where all come at once, TTFT and e2e have the wait in the queue, which is most of
    them where requests are many; --rate shows what users would see.

    --out is written anew after every concurrency.  Exit codes: 0 all is measured, 1 something
    failed, 2 wrong usage, 130 interrupted.
    """
    err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    with readable_errors():
        from mimo_jax.cli import bench_report
        from mimo_jax.engine.durable import check_writable
        from mimo_jax.engine.workload import Lengths, Workload

        how: dict[str, Any] = {
            "speculative": speculative,
            "draft_width": options.draft_width(draft_width, speculative is not None),
        }
        options.layers_of(layers, random_weights)
        if plot is not None:
            bench_report.check_plot(plot)
        files = [path for path in (out, plot) if path is not None]
        for path in files:
            check_writable(path)
        lengths = Lengths.parse(prompt_len), Lengths.parse(output_len)
        workloads = {
            n: Workload(*lengths, requests or max(32, 2 * n), rate, seed)
            for n in concurrencies(concurrency or [CONCURRENCY])
        }
        config = _config(model, random_weights is not None)
        for workload in workloads.values():
            workload.check(config.max_position_embeddings)
        placed = {"mesh": mesh, "rules": rules, "kernels": kernels, "dtype": dtype}
        made_up = {
            "random_weights": random_weights,
            "layers": layers,
            "drafters": random_weights is not None and speculative is not None,
        }
        lm = mimo_jax.load(model, progress=True, **placed, **made_up)
        lm.decoder_for(**how)  # refuses what the checkpoint has not, before anything runs
        for path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
        given = {**placed, **made_up, **how, "requests": requests}
        result = describe(lm, model, given, workloads)
        interrupted = False
        try:
            _measure_all(lm, workloads, how, result, out, err)
        except KeyboardInterrupt:
            interrupted = True
        if result["rows"]:
            bench_report.print_table(result)
            if plot is not None:
                bench_report.write_plot(result, plot)
    if interrupted:
        kept = f"; {len(result['rows'])} of {len(workloads)} are in {out}" if out else ""
        err.print(f"interrupted{kept}")
        raise typer.Exit(INTERRUPTED)


def concurrencies(texts: Sequence[str]) -> list[int]:
    """Ascending numbers from "1,2,4" and the like.

    Raises:
      ValueError: one is not a positive number.
    """
    found = set()
    for text in texts:
        for part in text.split(","):
            if not part.strip().isdigit() or int(part) < 1:
                raise ValueError(
                    f"--concurrency {text}: expected numbers from 1 on, such as {CONCURRENCY}"
                )
            found.add(int(part))
    return sorted(found)


def describe(
    lm: LanguageModel, model: str, how: dict[str, Any], workloads: dict[int, Workload]
) -> dict[str, Any]:
    """A result without rows: what is measured, and on what.

    Args:
      lm: the model.
      model: its name; of a folder the last part is kept.
      how: options of loading, of decoding and of the workload.
      workloads: by concurrency.
    """
    from mimo_jax.engine.machine import machine

    found = machine(_devices(lm))
    found["versions"]["mimo_jax"] = mimo_jax.__version__
    return {
        "benchmark": "serving",
        "model": Path(model).name if Path(model).is_dir() else model,
        "layers": lm.config.num_hidden_layers,
        "mesh": None if lm.mesh is None else dict(lm.mesh.shape),
        "arguments": {**how, "concurrency": [*workloads]},
        "workload": next(iter(workloads.values())).to_dict(),
        **found,
        "rows": [],
        "left_out": [],
    }


def _config(model: str, random_weights: bool) -> Any:
    """The model's configuration, before anything is loaded."""
    from mimo_jax import checkpoint
    from mimo_jax.config import MiMoConfig

    named = checkpoint.bundled().get(model, model)
    return MiMoConfig.from_pretrained(named if random_weights else checkpoint.resolve(model))


def _devices(lm: LanguageModel) -> list[Any]:
    import jax

    return jax.devices()[:1] if lm.mesh is None else list(lm.mesh.devices.flat)


def _measure_all(
    lm: LanguageModel,
    workloads: dict[int, Workload],
    how: dict[str, Any],
    result: dict[str, Any],
    out: Path | None,
    err: Console,
) -> None:
    """Adds a row to a result for each concurrency, and writes it each time.

    Args:
      lm: the model.
      workloads: by concurrency, ascending: what doesn't fit leaves out the rest.
      how: `speculative` and `draft_width` of `LanguageModel.engine`.
      result: of `describe`.
      out: the file, if it is to be written.
      err: where to say how far it is.

    Raises:
      NotEnoughMemoryError: not even the first one fits.
    """
    from mimo_jax.engine.serving import measure
    from sharding.memory import NotEnoughMemoryError

    decoder, devices = lm.decoder_for(**how), _devices(lm)
    # The same caches for all, so that nothing but the concurrency differs.
    max_len = lm.cache_length(max(workload.longest for workload in workloads.values()))
    for n, workload in workloads.items():
        with err.status(f"concurrency {n}: {workload.requests} requests"):
            try:
                engine = lm.engine(batch_size=n, max_len=max_len, **how)
            except NotEnoughMemoryError as error:
                if not result["rows"]:
                    raise
                result["left_out"] = [m for m in workloads if m >= n]
                err.print(f"concurrency {n} and above are left out: {error}")
                _write(result, out)
                return
            row = {"concurrency": n, **measure(engine, decoder, workload, devices)}
            del engine  # its caches, before the next one's
        result["rows"].append(row)
        _write(result, out)
        err.print(
            f"concurrency {n}: {row['output_tokens_s']:.1f} output tokens/s, {row['requests']} "
            f"requests in {row['seconds']:.1f} s after a warm-up of {row['warmup_s']:.1f} s"
        )
        if row["compiling_s"]:
            err.print(f"  {row['compiling_s']:.2f} s of them compiling: the row shows too little")


def _write(result: dict[str, Any], out: Path | None) -> None:
    from mimo_jax.engine.durable import replacing

    if out is not None:
        with replacing(out) as file:
            file.write((json.dumps(result, indent=2, allow_nan=False) + "\n").encode())
