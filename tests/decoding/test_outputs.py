"""Times of a request from the blocks in which its tokens come."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mimo_jax.decoding import outputs
from mimo_jax.decoding.outputs import Metrics, Row, output_of
from mimo_jax.decoding.sampling import SamplingParams
from mimo_jax.decoding.state import Block


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Blocks come a tenth of a second apart, the first at 1.0."""
    times = itertools.count(10)
    monkeypatch.setattr(outputs.time, "perf_counter", lambda: next(times) / 10)


def metrics(blocks: list[Block], tokens: int) -> Metrics:
    row = Row(SamplingParams(max_tokens=tokens, ignore_eos=True), None, ())
    for block in blocks:
        row.take(block, 0)
    row.finish()
    return output_of([1], [(row, 0.75)]).metrics


@pytest.mark.parametrize("tokens", [17, 24, 32])
def test_time_of_a_token_is_that_of_a_whole_dispatch(tokens):
    """Two dispatches of 16 steps: where the second one gives fewer, it took as long."""
    padded = np.where(np.arange(32) < tokens, 5, -1)[None]
    m = metrics([Block(padded[:, :16], None), Block(padded[:, 16:], None)], tokens)
    assert (m.generated_tokens, m.ttft_s) == (tokens, 0.25)
    assert m.tpot_s == pytest.approx(0.1 / 16)


def test_time_of_a_token_with_speculation():
    """Rounds give 2 or 3 tokens: three of them 7, then one of three the last 2."""
    first = Block(np.full((1, 12), 5), None, np.array([[2, 3, 2]]), None, 4)
    first.tokens[:, 7:] = -1
    second = Block(np.full((1, 12), -1), None, np.array([[2, 0, 0]]), None, 4)
    second.tokens[:, :2] = 5
    m = metrics([first, second], 9)
    assert m.acceptance_lengths == (2, 3, 2, 2)
    assert m.tpot_s == pytest.approx(0.1 / (3 * 9 / 4))


def test_without_a_second_dispatch_there_is_no_time_of_a_token():
    assert metrics([Block(np.full((1, 16), 5), None)], 16).tpot_s == 0
