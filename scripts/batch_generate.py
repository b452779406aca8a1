"""Completes the prompts of a JSONL file with a model, into another JSONL file.

    python scripts/batch_generate.py IN.jsonl OUT.jsonl --model mimo-tiny

An input line has one of "prompt" (text), "messages" (chat) and "token_ids"; "id", if its number
should not be its name; and any field of `SamplingParams`, in place of the command's options.  Or it
is a line of OpenAI's batch API.  IN may be compressed with gzip, and - is the standard input.  Each
makes a line of output: a completion, or an "error", which stops none of the others.  A batch's
lines are on the disk before the next batch begins.  The same command again continues an interrupted
run and writes what the uninterrupted one would have.

Exit codes: 0 all lines are completed, 1 some have errors or the run had to stop, 2 wrong usage,
130 interrupted.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.rule import Rule
from rich.table import Table

import mimo_jax as mj
from mimo_jax.cli import FAILED, INTERRUPTED, USAGE, options, printable
from mimo_jax.engine.metrics import CompileClock
from mimo_jax.engine.records import completion_record, first_choice, record_id
from mimo_jax.engine.requests import Failure, Request, read_requests
from mimo_jax.engine.results import Results, ResultsError


@dataclasses.dataclass
class Totals:
    """What a run did."""

    completed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    compiling: float = 0.0
    lengths: list[int] = dataclasses.field(default_factory=list)  # tokens of each round


def run_batches(
    lm: mj.LanguageModel,
    requests: Sequence[Request],
    results: Results,
    model: str,
    batch_size: int,
    how: dict[str, Any],
    totals: Totals,
    err: Console,
) -> None:
    """Completes the requests that have no result, whole batches at a time.

    Args:
      lm: the model.
      requests: all there are.
      results: those that are done, and where others go.
      model: its name in results of OpenAI's form.
      batch_size: completions decoded together.
      how: `speculative` and `draft_width` of `LanguageModel.generate`.
      totals: what the run did so far.
      err: where to say how far it is.
    """
    token_text = None if lm.tokenizer is None else lm.tokenizer.decode
    for begin in range(0, len(requests), batch_size):
        batch = requests[begin : begin + batch_size]
        prompts: dict[str, list[int]] = {}
        for request in batch:
            try:
                prompts[request.id] = _encode(lm, request)
            except (ValueError, TypeError) as error:
                results.add_failures([Failure.of(request, "invalid_prompt", str(error))])
        runnable = [request for request in batch if request.id in prompts]
        waiting = {request.id for request in results.pending(runnable)}
        if not waiting:
            continue
        # If one is missing all run again: a batch of other shape would round differently, and the
        # results could then depend on where a run was interrupted.
        started = time.perf_counter()
        with CompileClock() as clock:
            outputs = lm.generate(
                list(prompts.values()), [r.params for r in runnable], batch_size=batch_size, **how
            )
        totals.seconds += time.perf_counter() - started
        totals.compiling += clock.seconds()
        for request, output in zip(runnable, outputs, strict=True):
            totals.prompt_tokens += output.metrics.prompt_tokens
            totals.generated_tokens += output.metrics.generated_tokens
            totals.lengths += output.metrics.acceptance_lengths
            if request.id in waiting:
                results.append(completion_record(request, output, model, token_text))
                totals.completed += 1
        err.print(f"{begin + len(batch)} of {len(requests)} requests done")


def _encode(lm: mj.LanguageModel, request: Request) -> list[int]:
    ids = lm.encode(request.prompt)
    limit = lm.config.max_position_embeddings
    if len(ids) >= limit:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, which leaves no room to generate within the "
            f"model's {limit} positions; shorten it"
        )
    return ids


def print_summary(results: Results, totals: Totals, preview: int) -> None:
    """Prints what the run did, and the first completions of the file."""
    out = Console(highlight=False, markup=False)
    running = totals.seconds - totals.compiling
    table = Table("this run", "")
    table.columns[1].justify = "right"
    table.add_row("requests completed", str(totals.completed))
    table.add_row("lines with errors", str(results.failed))
    table.add_row("prompt tokens", str(totals.prompt_tokens))
    table.add_row("generated tokens", str(totals.generated_tokens))
    table.add_row("seconds compiling", f"{totals.compiling:.2f}")
    table.add_row("seconds running", f"{running:.2f}")
    if totals.generated_tokens:
        table.add_row("generated tokens/s, running", f"{totals.generated_tokens / running:.1f}")
    if totals.lengths:
        mean = sum(totals.lengths) / len(totals.lengths)
        table.add_row("tokens a round of speculation", f"{mean:.2f}")
    out.print(table)
    for record in itertools.islice(results.completions(), preview):
        text, reason = first_choice(record)
        prompt = record.get("prompt") or json.dumps(record.get("messages", record.get("token_ids")))
        shown = [(f"completion ({reason})", text)]
        # OpenAI's form has no place for the prompt.
        for title, text in [("prompt", prompt)] * ("params" in record) + shown:
            heading = printable(f"{record_id(record)}: {title}")
            out.print(Rule(heading, align="left", characters="-"))
            out.out(printable(text).rstrip("\n"), highlight=False)


def main(
    in_path: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="Prompts, one a line.")],
    out_path: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="Results; continued.")],
    model: Annotated[str, typer.Option(help="Bundled name, folder or hub id.")] = "mimo-tiny",
    batch_size: Annotated[int, typer.Option(min=1, help="Completions decoded together.")] = 16,
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
    speculative: options.Speculative = None,
    draft_width: options.DraftWidth = None,
) -> None:
    """Complete the prompts of a JSONL file with a model; the same command continues a run."""
    err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    defaults = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
    }
    results, totals = None, Totals()
    try:
        mj.SamplingParams.from_dict(defaults)
        how = {"speculative": speculative, "draft_width": options.draft_width(draft_width)}
        source = read_requests(in_path, defaults, seed)
        results = Results(out_path)
        results.match(source.requests, source.failures)
        if len(results):
            err.print(f"{out_path} has {len(results)} lines already: going on")
        results.add_failures(source.failures)
        if results.pending(source.requests):
            lm = mj.load(model, mesh=mesh, rules=rules, kernels=kernels)
            lm.decoder_for(**how)  # refuses what the checkpoint has not, before anything runs
            run_batches(lm, source.requests, results, model, batch_size, how, totals, err)
        print_summary(results, totals, preview)
        raise typer.Exit(FAILED if results.failed else 0)
    except KeyboardInterrupt:
        safe = 0 if results is None else len(results)
        err.print(f"interrupted: {safe} lines are safe in {out_path}; run it again to go on")
        raise typer.Exit(INTERRUPTED) from None
    except (ResultsError, ValueError, OSError) as error:
        err.print(f"error: {printable(str(error))}")
        raise typer.Exit(FAILED if isinstance(error, ResultsError) else USAGE) from None
    finally:
        if results is not None:
            results.close()


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    app()
