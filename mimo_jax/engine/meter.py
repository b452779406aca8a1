"""How far a batch is, and how fast it goes, as numbers."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from mimo_jax.engine.loop import Engine

# Seconds over which rates are taken.
WINDOW = 10.0


class Meter:
    """Looks at an engine from time to time.

    Args:
      engine: what works.
      done: requests that were done before it began.
      total: requests in all.
    """

    def __init__(self, engine: Engine, done: int, total: int):
        self._engine, self._before, self.total = engine, done, total
        self.started = time.perf_counter()
        self._past: deque[tuple[float, int, int, int]] = deque([(self.started, 0, 0, 0)])

    @property
    def done(self) -> int:
        """Requests that are done."""
        return self._before + self._engine.totals.requests

    def read(self) -> dict[str, Any]:
        """The present state, of what JSON can hold.

        Returns:
          `time` (Unix seconds), `elapsed_s`, `done` and `total` (requests), `prompt_tokens` (of
          requests that have ended) and `generated_tokens` in all, both a second over the last
          WINDOW, `running`, `prefilling` and `waiting` requests and completions, `cache_used` (a
          share of 1), `prefix_tokens` that were shared, `tokens_per_round` and `eta_s`; the last
          two are None where they have no meaning.
        """
        now, totals, stats = time.perf_counter(), self._engine.totals, self._engine.stats
        self._past.append((now, totals.requests, totals.prompt_tokens, totals.generated_tokens))
        while len(self._past) > 2 and now - self._past[1][0] >= WINDOW:
            self._past.popleft()
        began, *counts = self._past[0]
        span = max(now - began, 1e-9)
        requests, prompts, generated = (
            (new - old) / span for new, old in zip(self._past[-1][1:], counts, strict=True)
        )
        left = self.total - self.done
        return {
            "time": round(time.time(), 3),
            "elapsed_s": round(now - self.started, 3),
            "done": self.done,
            "total": self.total,
            "prompt_tokens": totals.prompt_tokens,
            "generated_tokens": totals.generated_tokens,
            "prompt_tokens_s": round(prompts, 1),
            "generated_tokens_s": round(generated, 1),
            "running": stats.running,
            "prefilling": stats.prefilling,
            "waiting": stats.waiting,
            "cache_used": round(stats.cache_used / stats.cache_capacity, 4),
            "prefix_tokens": stats.prefix_tokens,
            "tokens_per_round": (
                round(totals.generated_tokens / totals.rounds, 3) if totals.rounds else None
            ),
            "eta_s": round(left / requests, 1) if requests else None,
        }
