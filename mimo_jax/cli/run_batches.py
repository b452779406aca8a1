"""Running the requests of a file through a model, and what is said of it at the end."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.rule import Rule
from rich.table import Table

from mimo_jax.cli.console import printable
from mimo_jax.engine.metrics import CompileClock
from mimo_jax.engine.records import completion_record, first_choice, record_id
from mimo_jax.engine.requests import Failure, Request
from mimo_jax.engine.results import Results

if TYPE_CHECKING:
    from mimo_jax.language_model import LanguageModel


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
    lm: LanguageModel,
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


def _encode(lm: LanguageModel, request: Request) -> list[int]:
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
