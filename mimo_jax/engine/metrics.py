"""Where the time of a run goes."""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import Any

import jax

# Tracing, lowering and backend compilation, a cached executable's loading included.  JAX records
# them at the top level only, so that they don't overlap and may be added up.
_COMPILE_EVENTS = "/jax/core/compile/"


class CompileClock:
    """Measures the seconds that JAX spends compiling while the clock is entered."""

    def __init__(self) -> None:
        self._spent: list[tuple[float, float]] = []

    def __enter__(self) -> CompileClock:
        jax.monitoring.register_event_duration_secs_listener(self._record)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        jax.monitoring.unregister_event_duration_listener(self._record)

    def seconds(self, until: float = math.inf) -> float:
        """Seconds of the compilations that ended by `until`, a time of `time.perf_counter`."""
        return math.fsum(seconds for at, seconds in self._spent if at <= until)

    def _record(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith(_COMPILE_EVENTS):
            self._spent.append((time.perf_counter(), duration_secs))
