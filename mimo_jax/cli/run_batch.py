"""Running the requests of a file through a model, and what is said of it at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.rule import Rule
from rich.table import Table

from mimo_jax.cli.console import printable
from mimo_jax.cli.progress import Display
from mimo_jax.decoding.outputs import GenerationOutput
from mimo_jax.engine.batch import complete, survey
from mimo_jax.engine.loop import Totals
from mimo_jax.engine.meter import Meter
from mimo_jax.engine.metrics import CompileClock
from mimo_jax.engine.records import completion_record, first_choice, record_id
from mimo_jax.engine.requests import Request
from mimo_jax.engine.results import Results
from sharding import distributed

if TYPE_CHECKING:
    from mimo_jax.language_model import LanguageModel

# Rounds after which it is said if proposals are hardly ever right.
ROUNDS_TO_JUDGE = 256


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a file is run.

    Attributes:
      model: its name in results of OpenAI's form.
      batch_size: completions decoded together.
      max_len: positions of the cache of each; None for what the longest request needs.
      decoding: `speculative` and `draft_width` of `LanguageModel.engine`.
      metrics, profile: a file and a folder, as of `Display`.
    """

    model: str
    batch_size: int
    max_len: int | None
    decoding: dict[str, Any]
    metrics: Path | None = None
    profile: Path | None = None


@dataclasses.dataclass
class Run:
    """What a run did.

    Attributes:
      totals: of its engine.
      seconds: that it took, of which `compiling`.
      interrupted: whether it was ended before all was done.
    """

    totals: Totals = dataclasses.field(default_factory=Totals)
    seconds: float = 0.0
    compiling: float = 0.0
    interrupted: bool = False


def run_batch(
    lm: LanguageModel,
    requests: Sequence[Request],
    results: Results | None,
    settings: Settings,
    err: Console,
) -> Run:
    """Completes the requests that have no result.

    Args:
      lm: the model.
      requests: all there are: their lengths decide the shapes of the programs, so that results
        don't depend on where an earlier run was interrupted.
      results: those that are done, and where others go; None in a process that writes none.
      settings: how.
      err: where to say how far it is.
    """

    def encode(request: Request) -> list[int]:
        return lm.encode(request.prompt)

    limit = lm.config.max_position_embeddings
    limit = limit if settings.max_len is None else min(limit, settings.max_len)
    longest, failures = survey(requests, encode, limit)
    if results is not None:
        results.add_failures(failures.values())
    left = pending(requests, results)
    run = Run()
    if not left:
        return run
    engine = lm.engine(
        batch_size=settings.batch_size,
        max_len=settings.max_len or lm.cache_length(longest),
        top_logprobs=max(
            (r.params.logprobs for r in requests if r.params.logprobs is not None), default=None
        ),
        **settings.decoding,
    )
    token_text = None if lm.tokenizer is None else lm.tokenizer.decode
    started = time.perf_counter()
    meter = Meter(engine, len(requests) - len(left), len(requests))
    judge = _Judge(settings.decoding.get("speculative"))
    run.totals = engine.totals
    with (
        CompileClock() as clock,
        _draining(engine.drain, err),
        Display(meter, err, settings.metrics, settings.profile) as display,
    ):
        try:
            for ended in complete(engine, left, encode):
                if results is not None:
                    results.append(
                        *(completion_record(*pair, settings.model, token_text) for pair in ended)
                    )
                judge.look_at([output for _, output in ended])
                display.update()
        finally:
            run.seconds = time.perf_counter() - started
            run.compiling = clock.seconds()
    run.interrupted = engine.totals.requests < len(left)
    return run


def pending(requests: Sequence[Request], results: Results | None) -> list[Request]:
    """The requests without a result, as process 0 knows them."""
    mine = "" if results is None else json.dumps(sorted(results.entries))
    done = set(json.loads(distributed.from_leader("what is done", mine)))
    return [request for request in requests if request.line not in done]


class _Judge:
    """Warns once if a drafter's proposals are hardly ever right."""

    def __init__(self, speculative: Any):
        self._speculative = speculative
        self._outputs: list[GenerationOutput] = []

    def look_at(self, outputs: list[GenerationOutput]) -> None:
        if self._speculative is None:
            return
        self._outputs += outputs
        if sum(len(o.metrics.acceptance_lengths) for o in self._outputs) >= ROUNDS_TO_JUDGE:
            from mimo_jax.language_model import warn_at_chance

            warn_at_chance(self._speculative, self._outputs)
            self._speculative = None
            self._outputs.clear()


@contextlib.contextmanager
def _draining(drain: Callable[[], None], err: Console) -> Iterator[None]:
    """Ctrl-C and SIGTERM end a run when what is under way is done; a second one at once."""
    asked = False

    def stop(*_: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        drain()
        err.print("finishing the requests under way; once more to stop at once")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_summary(results: Results, run: Run, preview: int) -> None:
    """Prints what the run did, and the first completions of the file."""
    out = Console(highlight=False, markup=False)
    running, totals = run.seconds - run.compiling, run.totals
    table = Table("this run", "")
    table.columns[1].justify = "right"
    table.add_row("requests completed", str(totals.requests))
    table.add_row("lines with errors", str(results.failed))
    table.add_row("prompt tokens", str(totals.prompt_tokens))
    table.add_row("generated tokens", str(totals.generated_tokens))
    table.add_row("seconds compiling", f"{run.compiling:.2f}")
    table.add_row("seconds running", f"{running:.2f}")
    if totals.generated_tokens:
        table.add_row("generated tokens/s, running", f"{totals.generated_tokens / running:.1f}")
    if totals.rounds:
        mean = totals.generated_tokens / totals.rounds
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
