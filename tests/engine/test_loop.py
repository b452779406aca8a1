"""Continuous batching on a model gives every request what it gets alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from decoding.speculating import ending_decoder, generated, prompt

from mimo_jax.decoding.outputs import GenerationOutput, Row
from mimo_jax.decoding.sampling import SamplingParams, sample_seed
from mimo_jax.engine import loop
from mimo_jax.engine.loop import Engine, Work

MAX_LEN = 96
EOS = (3,)
SHARED = prompt(50)
PROMPTS = [
    prompt(1),
    prompt(2),
    prompt(33),
    *(SHARED[:32] + prompt(n) for n in (5, 9, 14)),
    SHARED[:33],
    prompt(17),
    prompt(60),
]


def works() -> list[Work]:
    return [
        Work(
            f"request {i}",
            ids,
            SamplingParams(
                temperature=float(i % 2), max_tokens=4 + 9 * (i % 4), n=1 + (i % 3 == 1)
            ),
            seed=i,
        )
        for i, ids in enumerate(PROMPTS)
    ]


@functools.cache
def alone(name: str | None) -> dict[Any, list[list[int]]]:
    """What each request gets in batches of its own, from the static decoder."""
    return {
        w.key: [
            generated(ending_decoder(name), [w.tokens], w.params, seeds=[sample_seed(w.seed, k)])[
                0
            ][0]
            for k in range(w.params.n)
        ]
        for w in works()
    }


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(loop, "CHUNK_SIZES", (4, 16))


def engine(name: str | None, **sizes: int) -> Engine:
    sizes = {"slots": 3, "lanes": 2, "max_len": MAX_LEN, "snapshots": 2, **sizes}
    return Engine(ending_decoder(name), lambda params: Row(params, None, EOS), **sizes)


def completed(use: Engine, requests: Sequence[Work]) -> dict[Any, list[list[int]]]:
    found: dict[Any, GenerationOutput] = {}
    for ended in use.run(iter(requests)):
        for key, output in ended:
            assert key not in found
            found[key] = output
    return {key: [c.token_ids for c in output.completions] for key, output in found.items()}


@pytest.mark.parametrize("name", [None, "mtp", "dflash"])
def test_each_request_gets_what_it_gets_alone(name):
    use = engine(name)
    assert completed(use, works()) == alone(name)
    assert use.stats.prefix_hits >= 2
    assert (use.stats.running, use.stats.free_slots, use.stats.free_lanes) == (0, 3, 2)


def test_whatever_the_order_and_the_number_of_slots():
    rng = np.random.default_rng(0)
    for slots, lanes, snapshots in ((1, 1, 0), (5, 3, 1)):
        shuffled = [works()[i] for i in rng.permutation(len(PROMPTS))]
        use = engine(None, slots=slots, lanes=lanes, snapshots=snapshots)
        assert completed(use, shuffled) == alone(None)


def test_one_engine_runs_one_batch_after_another():
    use = engine("dflash")
    for part in (works()[:4], works()[4:]):
        assert completed(use, part) == {w.key: alone("dflash")[w.key] for w in part}


def test_requests_are_taken_as_they_are_needed():
    taken = []

    def coming():
        for i in range(500):
            taken.append(i)
            yield Work(i, prompt(3), SamplingParams(temperature=0.0, max_tokens=2), 0)

    next(engine(None).run(coming()))
    assert len(taken) < 100


@pytest.mark.parametrize("ids", [[], [5] * MAX_LEN])
def test_a_prompt_that_does_not_fit_is_refused(ids):
    with pytest.raises(ValueError, match=f"request.*{len(ids)} tokens.*{MAX_LEN} positions"):
        completed(engine(None), [Work("request", ids, SamplingParams(), 0)])


def test_a_completion_ends_with_the_cache():
    greedy = SamplingParams(temperature=0.0, max_tokens=1000, ignore_eos=True)
    for length in (1, 90, MAX_LEN - 1):
        found = completed(engine(None), [Work("x", prompt(length), greedy, 0)])
        assert len(found["x"][0]) == MAX_LEN - length
