"""What generation returns, and how a row's tokens become text while they arrive."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from mimo_jax.decoding.draft_width import by_position
from mimo_jax.decoding.sampling import Logprobs, SamplingParams
from mimo_jax.decoding.state import Block
from mimo_jax.tokenizer import StopChecker, StreamDecoder

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of one generated token, and of the most probable ones in its place."""

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclasses.dataclass(frozen=True)
class Completion:
    """One generated continuation.

    Attributes:
      text: decoded text, without special tokens, cut before a stop string.
      token_ids: generated tokens, the one that ended generation included.
      finish_reason: "stop" (end-of-sequence token or stop string) or "length".
      logprobs: one entry a token, or None if not asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None = None


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Timing of a request, in seconds of wall clock; compilation counts where it happens.

    Attributes:
      ttft_s: from when it was taken up, before others that came earlier may have been done, to its
        first token.
      tpot_s: a token, of those that came later than the first; 0 if none did.  Tokens come several
        at a time, and what came last counts with all that there was time for.
      prompt_tokens: of the prompt.
      generated_tokens: of all completions.
      acceptance_lengths: tokens that each speculative round produced; empty without speculation.
      draft_widths: tokens that it verified at once.
      verify_s: what these rounds took to verify, by the device's clock, the other requests of the
        batch included; None without speculation, or where programs can't read a clock (CPUs, TPUs).
      draft_s: what they took to draft, likewise.
    """

    ttft_s: float
    tpot_s: float
    prompt_tokens: int
    generated_tokens: int
    acceptance_lengths: tuple[int, ...] = ()
    draft_widths: tuple[int, ...] = ()
    verify_s: float | None = None
    draft_s: float | None = None

    @property
    def tokens_per_round(self) -> float:
        """Mean of acceptance_lengths; 1 without speculation."""
        lengths = self.acceptance_lengths
        return sum(lengths) / len(lengths) if lengths else 1.0

    @property
    def acceptance_by_position(self) -> tuple[float, ...]:
        """Share of rounds that kept the first proposal, the first two, and so on, of the rounds
        that proposed so many.  A round that a request's end cut short counts as it ended."""
        return by_position(self.acceptance_lengths, self.draft_widths)


@dataclasses.dataclass(frozen=True)
class GenerationOutput:
    """Result of one prompt; with n > 1, `text` and the like are those of the first completion."""

    prompt_token_ids: list[int]
    completions: tuple[Completion, ...]
    metrics: Metrics

    @property
    def text(self) -> str:
        """Text of the first completion."""
        return self.completions[0].text

    @property
    def token_ids(self) -> list[int]:
        """Tokens of the first completion."""
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first completion ended."""
        return self.completions[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """Log-probabilities of the first completion."""
        return self.completions[0].logprobs


class Row:
    """One completion in the making.

    Args:
      params: of its request.
      tokenizer: turns tokens into text; None leaves the text empty.
      eos_ids: tokens that end it.
    """

    def __init__(self, params: SamplingParams, tokenizer: Any, eos_ids: tuple[int, ...]):
        self.params = params
        self.ended = False
        self.token_times: list[float] = []
        self.later = 0  # steps, or rounds, of dispatches after the first that gave tokens
        self.rounds: list[tuple[int, int]] = []  # tokens produced, and verified at once
        self.phases: np.ndarray | None = None  # seconds verifying and drafting
        self._eos_ids = () if params.ignore_eos else eos_ids
        self._ids: list[int] = []
        self._text: list[str] = []
        self._stopped = False
        self._logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer)
        self._checker = StopChecker(params.stop)

    def take(self, block: Block, row: int) -> str:
        """Takes what a block has for a row and returns the new text."""
        now, new, logprobs = time.perf_counter(), "", block.logprobs
        if self.token_times:
            self.later += (block.tokens if block.lengths is None else block.lengths).shape[1]
        if block.lengths is not None:
            self.rounds += [(n, block.width) for n in block.lengths[row].tolist() if n]
            if block.phases is not None:
                spent = block.phases[row][block.lengths[row] > 0].sum(axis=0)
                self.phases = spent if self.phases is None else self.phases + spent
        for i, token in enumerate(block.tokens[row].tolist()):
            if token < 0 or self.ended:
                break
            self._ids.append(token)
            self.token_times.append(now)
            if self._logprobs is not None and logprobs is not None:
                self._logprobs.append(self._logprob(token, row, i, logprobs))
            if self._decoder is not None:
                new += self._checker.push(self._decoder.push([token]))
            is_eos = token in self._eos_ids
            self._stopped = is_eos or self._checker.stopped
            self.ended = self._stopped or len(self._ids) >= self.params.max_tokens
        self._text.append(new)
        return new

    def finish(self) -> str:
        """Ends the row; returns the text that was held back until now."""
        self.ended = True
        rest = ""
        if self._decoder is not None and not self._checker.stopped:
            rest = self._checker.push(self._decoder.finish())
            rest += self._checker.finish()
            self._stopped = self._stopped or self._checker.stopped
        self._text.append(rest)
        return rest

    @property
    def tokens_later(self) -> float:
        """Tokens that dispatches after the first had time for; a round as many as all had."""
        return self.later * (len(self._ids) / len(self.rounds) if self.rounds else 1.0)

    def completion(self) -> Completion:
        """The finished completion."""
        reason: FinishReason = "stop" if self._stopped else "length"
        return Completion("".join(self._text), self._ids, reason, self._logprobs)

    def _logprob(self, token: int, row: int, i: int, logprobs: Logprobs) -> TokenLogprob:
        count = self.params.logprobs or 0
        top_ids = np.asarray(logprobs.top_ids)[row, i, :count].tolist()
        top = np.asarray(logprobs.top)[row, i, :count].tolist()
        chosen = float(np.asarray(logprobs.chosen)[row, i])
        return TokenLogprob(token, chosen, dict(zip(top_ids, top, strict=True)))


def output_of(prompt: list[int], rows: Sequence[tuple[Row, float]]) -> GenerationOutput:
    """What generation returns for a prompt.

    Args:
      prompt: its token ids.
      rows: its completions, and when each was begun, of `time.perf_counter`.
    """
    completions = tuple(row.completion() for row, _ in rows)
    times = [(row.token_times, started) for row, started in rows]
    later = sum(row.tokens_later for row, _ in rows)
    phases = [row.phases for row, _ in rows if row.phases is not None]
    verify_s, draft_s = np.sum(phases, axis=0).tolist() if phases else (None, None)
    metrics = Metrics(
        ttft_s=min((t[0] - started for t, started in times if t), default=0.0),
        tpot_s=sum(t[-1] - t[0] for t, _ in times if t) / later if later else 0.0,
        prompt_tokens=len(prompt),
        generated_tokens=sum(len(t) for t, _ in times),
        acceptance_lengths=tuple(n for row, _ in rows for n, _ in row.rounds),
        draft_widths=tuple(w for row, _ in rows for _, w in row.rounds),
        verify_s=verify_s,
        draft_s=draft_s,
    )
    return GenerationOutput(prompt, completions, metrics)
