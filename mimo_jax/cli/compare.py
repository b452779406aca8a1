"""Plain and speculative decoding side by side, as `generate --compare-speculative` prints them."""

from __future__ import annotations

import dataclasses
import secrets
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from mimo_jax.decoding.outputs import GenerationOutput, Metrics
    from mimo_jax.decoding.sampling import SamplingParams
    from mimo_jax.language_model import LanguageModel


def describe(metrics: Metrics) -> str:
    """Rounds, tokens a round and acceptance by position, in a line."""
    kept = ", ".join(f"{share:.0%}" for share in metrics.acceptance_by_position)
    times = ""
    if metrics.verify_s is not None and metrics.draft_s is not None:
        times = f"; {metrics.draft_s:.3f} s drafting, {metrics.verify_s:.3f} s verifying"
    return (
        f"{len(metrics.acceptance_lengths)} rounds of {metrics.tokens_per_round:.2f} tokens; "
        f"proposals kept, by position: {kept}{times}"
    )


def compare(
    lm: LanguageModel,
    prompt: list[int],
    params: SamplingParams,
    width: Any,
    err: Console,
    quiet: bool,
) -> None:
    """Completes a prompt in each way there is and prints a table; the second run of each counts.

    Args:
      lm: the model.
      prompt: token ids.
      params: sampling parameters; without a seed all ways get the same one.
      width: draft width.
      err: where to say what is under way.
      quiet: print nothing.
    """
    if params.seed is None:
        params = dataclasses.replace(params, seed=secrets.randbits(63))
    names = (None, *lm.drafters)
    table = Table(
        *("", "tokens/s", "tokens a round", "kept, by position", "draft ms", "verify ms", "same")
    )
    for column in table.columns[1:]:
        column.justify = "right"
    first: GenerationOutput | None = None
    plain = 0.0
    for name in names:
        how: Any = {"speculative": name, "draft_width": width if name else None}
        with err.status(f"{name or 'plain'}"):
            output, seconds = _timed(lm, prompt, params, how)
            m, phases = output.metrics, ("", "")
            if name is not None:
                verify, draft = _phases(lm, output, params, how)
                phases = (f"{draft * 1e3:.2f}", f"{verify * 1e3:.2f}")
        steps = len(output.token_ids) - 1
        rate = steps / seconds if steps else 0.0
        first, plain = first or output, plain or rate
        kept = " ".join(f"{share:.0%}" for share in m.acceptance_by_position)
        same = "" if name is None else "yes" if output.token_ids == first.token_ids else "no"
        speed = f"{rate:.0f}" if name is None else f"{rate:.0f} ({rate / (plain or 1):.2f}x)"
        table.add_row(name or "plain", speed, f"{m.tokens_per_round:.2f}", kept, *phases, same)
    if not quiet:
        Console(highlight=False, markup=False).print(table)
    if not lm.drafters:
        err.print("the checkpoint has neither MTP blocks nor a DFlash drafter to compare with")


def _phases(
    lm: LanguageModel, output: GenerationOutput, params: SamplingParams, how: Any
) -> tuple[float, float]:
    """Seconds of a round's verification and of its drafting."""
    from mimo_jax.decoding.speculative import SpeculativeDecoder

    m, decoder = output.metrics, lm.decoder_for(**how)
    assert isinstance(decoder, SpeculativeDecoder)
    if m.verify_s is not None and m.draft_s is not None:
        rounds = max(1, len(m.acceptance_lengths))
        return m.verify_s / rounds, m.draft_s / rounds
    tokens = [*output.prompt_token_ids, *output.token_ids]
    # A round may be wider than there is text.
    tokens = [tokens[0]] * (decoder.drafter.tokens + 2 - len(tokens)) + tokens
    max_len, width = 256 + len(tokens) // 256 * 256, decoder.width
    return decoder.phase_seconds([tokens], params, max_len, [width])[width]


def _timed(
    lm: LanguageModel, prompt: list[int], params: SamplingParams, how: Any
) -> tuple[GenerationOutput, float]:
    """A completion, and the seconds after its first token, when all is compiled."""
    for _ in range(2):
        started = time.perf_counter()
        stream = lm.stream(prompt, params, **how)
        for _ in stream:
            pass
    from mimo_jax.language_model import warn_at_chance

    output = stream.output
    warn_at_chance(how["speculative"], [output])
    return output, time.perf_counter() - started - output.metrics.ttft_s
