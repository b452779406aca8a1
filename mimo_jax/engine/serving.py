"""Throughput and latency of an engine under a workload."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mimo_jax.decoding.autoregressive import STEPS, Decoder
from mimo_jax.decoding.outputs import GenerationOutput
from mimo_jax.engine import loop
from mimo_jax.engine.loop import Engine, Work
from mimo_jax.engine.machine import peak_memory
from mimo_jax.engine.metrics import CompileClock
from mimo_jax.engine.workload import Workload, random_work

PERCENTILES = (50, 90, 99)
# Passes of the warm-up at most; two are enough where the width of drafts isn't adaptive.
PASSES = 16
# Tokens of an output of the warm-up where widths are tried: several dispatches in a row.
TRYING = 256


@dataclasses.dataclass(frozen=True)
class Served:
    """A request that has been completed.

    Attributes:
      e2e_s: seconds from its arrival until all of it was there.
      output: what came of it.
    """

    e2e_s: float
    output: GenerationOutput


def measure(
    engine: Engine, decoder: Decoder, workload: Workload, devices: Sequence[Any]
) -> dict[str, Any]:
    """Serves a workload, after a warm-up that compiles all programs, and says what it took.

    Times of a request count from its arrival, so they include its wait in the queue.  Tokens reach
    the host several at a time: the first token is there when those that come with it are.

    Args:
      engine: at rest, of `decoder`, with caches as long as the longest request.
      decoder: what the engine decodes with.
      workload: the requests.
      devices: those that the model is on.

    Returns:
      A dict for JSON: counts, `seconds` from the start to the last output, throughputs, latencies
      in seconds by percentile (None where nothing could be measured), memory in bytes, and what was
      compiled when.

    Raises:
      ValueError: a prompt is longer than the caches.
    """
    slots, lanes = engine.stats.free_slots, engine.stats.free_lanes
    with CompileClock() as clock:
        started = time.perf_counter()
        warm_up(engine, decoder, int(workload.lengths()[0].max()), clock)
        warmup_s, warmup_compiling_s = time.perf_counter() - started, clock.seconds()
        seconds, served = serve(engine, workload.works(decoder.valid_vocabulary))
        compiling_s = clock.seconds() - warmup_compiling_s
    peak_bytes, peak_of = peak_memory(devices)
    return {
        "requests": len(served),
        **summary(seconds, served),
        "slots": slots,
        "max_len": engine.max_len,
        "cache_bytes": _cache_bytes(decoder, slots + lanes, engine.max_len),
        "peak_bytes": peak_bytes,
        "peak_of": peak_of,
        "warmup_s": warmup_s,
        "warmup_compiling_s": warmup_compiling_s,
        "compiling_s": compiling_s,
    }


def warm_up(engine: Engine, decoder: Decoder, longest: int, clock: CompileClock) -> None:
    """Has every program compiled that prompts of up to `longest` tokens need.

    All rows decode: how wide rounds of speculation are best depends on how many do.
    """
    # All but the last token of a prompt is read: a chunk of each size, and what the longest has.
    lengths = [size + 1 for size in loop.CHUNK_SIZES if size < longest] + [longest]
    lengths += [min(lengths)] * (engine.stats.free_slots - len(lengths))
    rng, vocabulary = np.random.default_rng(0), decoder.valid_vocabulary
    for attempt in range(PASSES):
        before, tokens = clock.seconds(), 2 * STEPS if decoder.settled else TRYING
        works = (random_work(i, rng, vocabulary, n, tokens) for i, n in enumerate(lengths))
        for _ in engine.run(works):
            pass
        # A program is compiled again where it is given what another one made, not the first cache.
        if attempt and decoder.settled and clock.seconds() == before:
            return


def serve(engine: Engine, works: Sequence[tuple[float, Work]]) -> tuple[float, list[Served]]:
    """Runs requests, each from when it comes on.

    Args:
      engine: at rest.
      works: seconds from the start until each comes, ascending, and the requests.

    Returns:
      Seconds from the start until the last was done, and the requests in the order of their ends.
    """
    start, served = time.perf_counter(), []
    since = {work.key: start + after for after, work in works}
    for ended in engine.run(_arriving(works, start)):
        now = time.perf_counter()
        served += [Served(now - since[key], output) for key, output in ended]
    return time.perf_counter() - start, served


def _arriving(works: Iterable[tuple[float, Work]], start: float) -> Iterator[Work | None]:
    """Requests as they come; None while the next one is yet to."""
    for after, work in works:
        while time.perf_counter() < start + after:
            yield None
        yield dataclasses.replace(work, since=start + after)


def summary(seconds: float, served: Sequence[Served]) -> dict[str, Any]:
    """Counts, throughput and latency of requests that took so many seconds together.

    Args:
      seconds: from the start until the last was done.
      served: the requests.
    """
    metrics = [one.output.metrics for one in served]
    prompt = sum(m.prompt_tokens for m in metrics)
    output = sum(m.generated_tokens for m in metrics)
    between = [m.tpot_s for m in metrics if m.tpot_s]
    rounds = [n for m in metrics for n in m.acceptance_lengths]
    return {
        "prompt_tokens": prompt,
        "output_tokens": output,
        "seconds": seconds,
        "output_tokens_s": output / seconds,
        "total_tokens_s": (prompt + output) / seconds,
        "requests_s": len(served) / seconds,
        "ttft_s": percentiles([m.ttft_s for m in metrics]),
        "tpot_s": percentiles(between),
        "tpot_requests": len(between),
        "e2e_s": percentiles([one.e2e_s for one in served]),
        "tokens_per_round": sum(rounds) / len(rounds) if rounds else None,
    }


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p90 and p99, between two values by linear interpolation; None where there are none."""
    if not values:
        return {f"p{p}": None for p in PERCENTILES}
    found = np.percentile(values, PERCENTILES).tolist()
    return {f"p{p}": value for p, value in zip(PERCENTILES, found, strict=True)}


def _cache_bytes(decoder: Decoder, rows: int, max_len: int) -> int:
    """Bytes of what so many rows hold, on all devices together."""
    held = jax.tree.leaves(jax.eval_shape(lambda: decoder.empty(rows, max_len)))
    return sum(a.size * a.dtype.itemsize for a in held)
