"""Rows that come and go produce what they produce alone, however they are put together."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
from decoding.speculating import ending_decoder, generated, prompt

from mimo_jax.decoding.sampling import SamplingParams
from mimo_jax.decoding.slots import Piece, Slots
from mimo_jax.decoding.state import Block

MAX_LEN = 96
LENGTHS = (1, 2, 9, 33, 40, 17, 26, 8)
PARAMS = [
    SamplingParams(temperature=float(i % 2), max_tokens=5 + 7 * (i % 4), top_p=0.9)
    for i in range(len(LENGTHS))
]


@functools.cache
def alone(name: str | None) -> list[list[int]]:
    """What each request produces in a batch of its own."""
    return [
        generated(ending_decoder(name), [prompt(n)], p, seeds=[i])[0][0]
        for i, (n, p) in enumerate(zip(LENGTHS, PARAMS, strict=True))
    ]


def read(use: Slots, lane: int, ids: Sequence[int], chunk: int, start: int = 0) -> None:
    """All but the last token, in chunks."""
    for begin in range(start, len(ids) - 1, chunk):
        end = min(begin + chunk, len(ids) - 1)
        use.read([Piece(lane, begin, ids[begin:end], ids[end])], chunk)


def batch(name: str | None) -> Slots:
    """Always of the same size: other sizes would be other programs to compile."""
    return Slots(ending_decoder(name), slots=3, lanes=2, max_len=MAX_LEN)


def insert(use: Slots, slot: int, lane: int | None, i: int) -> None:
    ids = prompt(LENGTHS[i])
    use.insert(slot, lane, (ids[-1], len(ids) - 1), PARAMS[i], i, PARAMS[i].max_tokens)


def of_two(use: Slots) -> list[list[int]]:
    """What the rows in the first two slots produce, to their ends."""
    tokens: list[list[int]] = [[], []]
    for _ in range(30):
        block = Block.of(jax.device_get(use.decode()))
        for slot in (0, 1):
            tokens[slot] += [t for t in block.tokens[slot].tolist() if t >= 0]
    return tokens


def run(use: Slots, chunk: int, order: Sequence[int]) -> dict[int, list[int]]:
    """The tokens of all requests, each begun as soon as a slot is free."""
    waiting, running = collections.deque(order), dict[int, int]()
    tokens: dict[int, list[int]] = {i: [] for i in order}
    while waiting or running:
        for slot in range(use.slots):
            if slot not in running and waiting:
                running[slot] = i = waiting.popleft()
                read(use, i % use.lanes, prompt(LENGTHS[i]), chunk)
                insert(use, slot, i % use.lanes, i)
        got = jax.device_get(use.decode())
        block = Block.of(got)
        for slot, i in list(running.items()):
            tokens[i] += [t for t in block.tokens[slot].tolist() if t >= 0]
            if not got.remaining[slot]:
                del running[slot]
    return tokens


@pytest.mark.parametrize("name", [None, "mtp", "dflash"])
@pytest.mark.parametrize(("chunk", "order"), [(8, range(8)), (32, (6, 2, 7, 0, 4, 1, 3, 5))])
def test_each_request_produces_what_it_does_alone(name, chunk, order):
    use = batch(name)
    tokens = run(use, chunk, order)
    assert [tokens[i] for i in range(8)] == alone(name)
    assert any(t and t[-1] == 3 for t in alone(name))  # some end early


@pytest.mark.parametrize("name", ["mtp", "dflash"])
def test_reading_in_parts_proposes_what_reading_at_once_does(name):
    """Longer than windows and rings, so that what is carried from chunk to chunk matters."""
    held = []
    for chunk in (4, 80):
        use = batch(name)
        read(use, 1, prompt(77), chunk)
        held.append(use.snapshot(1))
    (_, (in_parts, _)), (_, (at_once, _)) = held
    np.testing.assert_array_equal(in_parts, at_once)


def test_lanes_that_wait_keep_what_they_have_read():
    use = batch("mtp")
    first, second = prompt(33), prompt(40)
    read(use, 0, first[:18], 8)
    read(use, 1, second, 8)  # meanwhile the first lane waits, in the middle of its prompt
    use.read([Piece(0, 17, first[17:25], first[25])], 8)
    read(use, 0, first, 8, start=25)
    insert(use, 0, 0, 3)
    insert(use, 1, 1, 4)
    assert of_two(use) == [alone("mtp")[3], alone("mtp")[4]]


@pytest.mark.parametrize("name", [None, "mtp", "dflash"])
def test_requests_go_on_from_a_snapshot(name):
    use = batch(name)
    ids = prompt(40)
    read(use, 0, ids[:17], 8)
    snapshot = use.snapshot(0)
    read(use, 0, prompt(33), 8)  # the lane has something else meanwhile
    for lane in (0, 1):
        use.restore(lane, snapshot)
        read(use, lane, ids, 8, start=16)
        insert(use, lane, lane, 4)
    assert of_two(use) == [alone(name)[4]] * 2


def test_a_row_that_is_ended_leaves_the_others():
    use = batch(None)
    for slot, i in ((0, 3), (1, 7)):
        read(use, 0, prompt(LENGTHS[i]), 32)
        insert(use, slot, 0, i)
    use.end([0])
    got = jax.device_get(use.decode())
    assert (got.tokens[0] == -1).all()
    assert got.tokens[1][got.tokens[1] >= 0].tolist() == alone(None)[7][:16]


def test_steps_are_those_that_the_rows_that_go_on_ask_for(monkeypatch):
    use, asked, decode = batch(None), [], ending_decoder(None).decode

    def recorded(leaves: Any, state: Any, rows: Any, *rest: Any) -> Any:
        asked.append((rows.sampled, rows.narrowed))
        return decode(leaves, state, rows, *rest)

    monkeypatch.setattr(use.decoder, "decode", recorded)
    assert (PARAMS[2].temperature, PARAMS[3].temperature) == (0, 1)
    for slot, i in ((0, 2), (1, 3)):
        read(use, 0, prompt(LENGTHS[i]), 32)
        insert(use, slot, 0, i)
        use.decode()
    use.decode([0])
    assert asked == [(False, False), (True, True), (False, False)]


def test_nothing_is_compiled_once_every_shape_has_occurred():
    use = batch("dflash")
    run(use, 8, range(4))
    programs: list[Any] = [use.decoder._read, use.decoder._decode]
    compiled = [program._cache_size() for program in programs]
    run(use, 8, (7, 5, 6, 4, 3))
    assert [program._cache_size() for program in programs] == compiled


def test_logprobs_are_reported_as_asked_for():
    use = Slots(ending_decoder(None), slots=1, lanes=1, max_len=MAX_LEN, top_logprobs=2)
    greedy = dataclasses.replace(PARAMS[0], temperature=0.0, logprobs=2)
    use.insert(0, None, (5, 0), greedy, 0, 4)
    got = jax.device_get(use.decode())
    assert got.logprobs.top.shape == (1, 16, 2)
    assert (got.logprobs.top_ids[0, :, 0] == got.tokens[0])[:3].all()
