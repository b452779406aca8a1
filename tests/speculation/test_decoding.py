"""Speculative decoding: the tokens of plain decoding, however good or bad the proposals are."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding.speculating import VOCAB, Scripted, Table, drafter, generated, model, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import optimized

from mimo_jax.decoding import sampling, speculative
from mimo_jax.decoding.autoregressive import Decoder
from mimo_jax.decoding.sampling import SamplingParams
from mimo_jax.decoding.speculative import SpeculativeDecoder, accepted, kept
from pallas_kernels import clock

GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
SAMPLED = dataclasses.replace(GREEDY, temperature=1.0)
NARROWED = dataclasses.replace(GREEDY, temperature=0.7, top_k=20, top_p=0.9, min_p=0.01)
# Longer than the sliding layers' ring, about as long, and one token.
LENGTHS = (290, 130, 1)
PLAIN = Decoder(model(), valid_vocabulary=VOCAB, eos_ids=())


def decoder(use: Any, width: Any = None, eos_ids: tuple[int, ...] = ()) -> SpeculativeDecoder:
    return SpeculativeDecoder(model(), use, valid_vocabulary=VOCAB, eos_ids=eos_ids, width=width)


def plain(params: Any, lengths: tuple[int, ...] = LENGTHS, eos_ids: tuple[int, ...] = ()) -> Any:
    use = Decoder(model(), valid_vocabulary=VOCAB, eos_ids=eos_ids) if eos_ids else PLAIN
    return generated(use, [prompt(n) for n in lengths], params)[0]


def scripted(params: Any, wrong: Any, lengths: tuple[int, ...] = LENGTHS) -> Scripted:
    """Proposes what plain decoding gives, but for tokens at positions where `wrong` is true."""
    rows = [prompt(n) + tokens for n, tokens in zip(lengths, plain(params, lengths), strict=True)]
    padded = 1 << (len(rows) - 1).bit_length()
    table = np.zeros((padded, max(map(len, rows))), np.int64)
    for i, row in enumerate(rows):
        table[i, : len(row)] = [(t + wrong(i, p)) % VOCAB for p, t in enumerate(row)]
    return Scripted(Table(table))


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, NARROWED], ids=["greedy", "sampled", "top"])
@pytest.mark.parametrize("width", [None, 2, 5])
def test_right_and_wrong_proposals_give_the_tokens_of_plain_decoding(params, width):
    # Rows differ: one's proposals are always right, the others' now and then wrong.
    use = scripted(params, lambda row, position: row and (position * (row + 1)) % 7 == 0)
    tokens, rounds, _ = generated(decoder(use, width), [prompt(n) for n in LENGTHS], params)
    assert tokens == plain(params)
    width = width or 8
    assert rounds[0][:-1] == [width] * (len(rounds[0]) - 1)
    assert min(rounds[1][:-1]) < width


@pytest.mark.parametrize("name", ["mtp", "dflash"])
@pytest.mark.parametrize("width", [None, 2, "adaptive"])
def test_drafters_give_the_tokens_of_plain_decoding(name, width):
    mixed = [GREEDY, SAMPLED, dataclasses.replace(GREEDY, max_tokens=9)]
    tokens, rounds, _ = generated(
        decoder(drafter(name), width), [prompt(n) for n in LENGTHS], mixed
    )
    assert tokens == plain(mixed)
    assert sum(rounds[0]) == 39  # the first token is the prompt's


def test_two_hundred_prompts():
    """Greedy, 128 tokens each, 25 at a time, with both drafters at their widest."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(VOCAB, size=1 + i % 24).tolist() for i in range(200)]
    long = dataclasses.replace(GREEDY, max_tokens=128)

    def completed(use: Decoder) -> list[list[int]]:
        parts = (generated(use, prompts[i : i + 25], long)[0] for i in range(0, len(prompts), 25))
        return [tokens for part in parts for tokens in part]

    with optimized():
        alone = Decoder(model(), valid_vocabulary=VOCAB, eos_ids=())
        drafting = [decoder(drafter(name)) for name in ("mtp", "dflash")]
    expected = completed(alone)
    for use in drafting:
        assert completed(use) == expected


def test_a_row_ends_inside_a_round():
    expected = plain(GREEDY)
    use = scripted(GREEDY, lambda *_: 0)
    for at in (3, 8):
        ending = dataclasses.replace(GREEDY, ignore_eos=False)
        eos = (expected[0][at],)
        ended = plain(ending, eos_ids=eos)
        tokens, _, _ = generated(decoder(use, eos_ids=eos), [prompt(n) for n in LENGTHS], ending)
        assert tokens == ended
        assert tokens[0][-1] == eos[0]


@pytest.mark.parametrize("most", [1, 2, 8, 9, 10])
def test_max_tokens_ends_a_row_inside_a_round(most):
    few = dataclasses.replace(GREEDY, max_tokens=most)
    use = scripted(GREEDY, lambda *_: 0)
    tokens, rounds, _ = generated(decoder(use), [prompt(n) for n in LENGTHS], few)
    assert tokens == [row[:most] for row in plain(GREEDY)]
    assert [sum(r) for r in rounds] == [most - 1] * 3


def test_rows_that_the_caller_stops():
    use = scripted(GREEDY, lambda row, position: position % 2)
    long = [dataclasses.replace(GREEDY, max_tokens=40)] * 3
    tokens, _, blocks = generated(
        decoder(use), [prompt(n) for n in LENGTHS], long, stop_after={1: 2}
    )
    expected = plain(GREEDY)
    assert tokens[0] == expected[0]
    assert len(tokens[1]) < 40
    assert tokens[1] == expected[1][: len(tokens[1])]
    assert len(blocks) > 2


def test_logprobs_are_those_of_plain_decoding():
    asked = dataclasses.replace(SAMPLED, logprobs=3, max_tokens=20)
    prompts = [prompt(n) for n in LENGTHS]
    *_, one = generated(PLAIN, prompts, asked)
    use = scripted(SAMPLED, lambda row, position: row and position % 3 == 0)
    *_, other = generated(decoder(use), prompts, asked)

    def flat(blocks: Any, row: int) -> list[Any]:
        parts = [
            jax.tree.map(lambda a, b=block: np.asarray(a)[row][b.tokens[row] >= 0], block.logprobs)
            for block in blocks
        ]
        return jax.tree.map(lambda *a: np.concatenate(a), *parts)

    for row in range(3):
        for a, b in zip(jax.tree.leaves(flat(one, row)), jax.tree.leaves(flat(other, row))):
            np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_full_cache_ends_a_row_as_in_plain_decoding():
    prompts = [prompt(30), prompt(20)]
    params = [dataclasses.replace(GREEDY, max_tokens=100)] * 2
    use = drafter("dflash")

    def run(decoder: Decoder) -> list[list[int]]:
        tokens: list[list[int]] = [[], []]
        for block in decoder.blocks(prompts, params, [0, 1], max_len=40):
            for row, new in zip(tokens, block.tokens):
                row += new[new >= 0].tolist()
        return tokens

    assert run(decoder(use)) == run(PLAIN)


def test_widths_that_there_are():
    for name, most in (("mtp", 4), ("dflash", 8)):
        for width in (0, 1, most + 1):
            with pytest.raises(ValueError, match=f"expected 2 to {most}"):
                decoder(drafter(name), width)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_how_many_tokens_are_kept(data):
    width = data.draw(st.integers(2, 8))
    drawn = data.draw(st.lists(st.integers(0, 3), min_size=width, max_size=width))
    drafts = data.draw(st.lists(st.integers(0, 3), min_size=width - 1, max_size=width - 1))
    remaining = data.draw(st.integers(0, 10))
    eos = data.draw(st.integers(0, 4))
    expected: list[int] = []
    for i, token in enumerate(drawn):
        if len(expected) == remaining or (expected and expected[-1] == eos):
            break
        expected.append(token)
        if i == width - 1 or drafts[i] != token:
            break
    array = jnp.asarray([drawn], jnp.int32)
    right = accepted(jnp.asarray([drafts], jnp.int32), array)
    count, ended = kept(array, right, jnp.asarray([remaining], jnp.int32), array == eos)
    assert count.item() == len(expected)
    assert ended.item() == (bool(expected) and expected[-1] == eos)


# The distribution of whole sequences.

SEQUENCE = 3
DRAWS = 2048
SMALL = 5  # ids that may be produced


def sequences(use: Decoder, params: SamplingParams) -> collections.Counter[tuple[int, ...]]:
    """How often each continuation of one prompt comes, over seeds."""
    params = dataclasses.replace(params, max_tokens=SEQUENCE)
    tokens, _, _ = generated(use, [prompt(6)] * DRAWS, params, seeds=range(DRAWS))
    return collections.Counter(map(tuple, tokens))


def exact(params: SamplingParams) -> dict[tuple[int, ...], float]:
    """The probability of each continuation, from full forward passes."""
    every = list(itertools.product(range(SMALL), repeat=SEQUENCE))
    ids = jnp.asarray([prompt(6) + list(s[:-1]) for s in every], jnp.int32)
    logits = sampling.mask_vocabulary(model()(ids)[0], SMALL)[:, -SEQUENCE:]
    rows = jax.device_put(sampling.row_params([params] * len(every), [0] * len(every)))
    logps = [
        jax.nn.log_softmax(sampling.processed_logits(logits[:, i], rows), axis=-1)
        for i in range(SEQUENCE)
    ]
    index = np.arange(len(every))
    total = sum(np.asarray(p)[index, np.asarray(every)[:, i]] for i, p in enumerate(logps))
    return dict(zip(every, np.exp(np.asarray(total, np.float64)), strict=True))


def chi_square(counts: collections.Counter[tuple[int, ...]], params: SamplingParams) -> float:
    """Pearson's statistic in standard deviations from its mean, rare outcomes together."""
    expected = exact(params)
    assert abs(sum(expected.values()) - 1) < 1e-5
    common = {s: p * DRAWS for s, p in expected.items() if p * DRAWS >= 5}
    cells = [(counts[s], e) for s, e in common.items()]
    rest = DRAWS - sum(e for _, e in cells)
    if rest > 5:
        cells.append((DRAWS - sum(n for n, _ in cells), rest))
    freedom = len(cells) - 1
    return (sum((n - e) ** 2 / e for n, e in cells) - freedom) / np.sqrt(2 * freedom)


def of_small_vocabulary(use: Any) -> SpeculativeDecoder:
    return SpeculativeDecoder(model(), use, valid_vocabulary=SMALL, eos_ids=())


def likely() -> Scripted:
    """Always proposes the same few tokens, so that some are right."""
    row = np.random.default_rng(0).integers(SMALL, size=20)
    return Scripted(Table(np.tile(row, (DRAWS, 1))))


@pytest.mark.parametrize(
    "params",
    [SAMPLED, dataclasses.replace(SAMPLED, temperature=1.5, top_k=4, top_p=0.95)],
    ids=["plain", "narrowed"],
)
def test_sequences_have_the_models_distribution(params):
    assert abs(chi_square(sequences(of_small_vocabulary(likely()), params), params)) < 4


def test_a_wrong_distribution_after_a_rejection_is_caught(monkeypatch):
    """Accepting a proposal with the model's probability, and after a rejection drawing from the
    whole distribution instead of the rest, gives proposals too often."""

    def resampled(logits: Any, rows: Any, positions: Any) -> Any:
        first = honest(logits, rows, positions)
        if positions.ndim == 1:  # the token after the prompt
            return first
        again = honest(logits, rows, positions + 1000)  # other noise
        same = first[:, :-1] == proposed(positions)[:, :-1]
        return jnp.concatenate([jnp.where(same, first[:, :-1], again[:, :-1]), first[:, -1:]], 1)

    table = likely().module.tokens[...]

    def proposed(positions: Any) -> Any:
        return table[0][jnp.clip(positions, 0, table.shape[1] - 1)]

    honest = sampling.sample
    monkeypatch.setattr(speculative.sampling, "sample", resampled)
    assert chi_square(sequences(of_small_vocabulary(likely()), SAMPLED), SAMPLED) > 8


def test_a_round_is_timed_by_the_devices_clock_where_it_has_one(monkeypatch):
    times = iter(np.arange(100) * 3.0)  # of the host, read before and after each call
    monkeypatch.setattr(speculative.time, "perf_counter", lambda: next(times))
    # The first round waits for what was sent before.
    ticks = jnp.full((speculative.ROUNDS, 2), 50).at[0].set(9000)
    assert speculative._seconds(lambda: (None, ticks)) == 50 * clock.TICK
    assert speculative._seconds(lambda: (None, 0 * ticks)) == 3 / speculative.ROUNDS
