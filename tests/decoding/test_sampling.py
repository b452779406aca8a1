import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from mimo_jax.decoding.sampling import (
    SHORTLIST,
    SamplingParams,
    logprobs,
    mask_vocabulary,
    processed_logits,
    row_params,
    sample,
    sample_seed,
)

process = jax.jit(processed_logits)
draw = jax.jit(sample)


def kept_ids(probabilities: Any, **fields: Any) -> list[int]:
    """The ids that processing leaves to one row."""
    logits = jnp.log(jnp.asarray([probabilities], jnp.float32))
    out = process(logits, row_params([SamplingParams(**fields)], [0]))
    return np.flatnonzero(np.asarray(out[0]) > -np.inf).tolist()


# -- the distribution ------------------------------------------------------------------------------


def kept_by_reference(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """In float64: which ids must stay, and which may go either way within float32 rounding."""
    if params.greedy:
        return np.arange(logits.size) == np.argmax(logits), np.zeros(logits.size, bool)
    x = logits.astype(np.float64) / params.temperature
    probs = scipy.special.softmax(x)
    floor = params.min_p * probs.max()
    stays = probs >= floor
    unsure = np.isclose(probs, floor, rtol=1e-5, atol=0)
    order = np.argsort(-x, kind="stable")  # equal logits by ascending id
    order = order[stays[order]]
    if params.top_k > 0:
        stays[order[params.top_k :]] = False
        order = order[: params.top_k]
    if params.top_p < 1:
        left = probs[order] / probs[order].sum()
        before = np.cumsum(left) - left
        stays[order[before >= params.top_p]] = False
        unsure[order[np.isclose(before, params.top_p, rtol=0, atol=1e-5)]] = True
    return stays, unsure


# Not SamplingParams themselves: beartype uses `random`, which strategies must not.
fields = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_p": st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
        "top_k": st.sampled_from([0, -1, 1, 2, 5, 40, 300, 10_000]),
        "min_p": st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
    }
)


@pytest.mark.parametrize("vocabulary", [30, SHORTLIST + 150])
@given(requests=st.lists(fields, min_size=3, max_size=3), seed=st.integers(0, 2**32 - 1))
def test_processing_equals_numpy(vocabulary, requests, seed):
    params = [SamplingParams(**request) for request in requests]
    rng = np.random.default_rng(seed)
    # Multiples of 1/8, so that there are ties.
    logits = (rng.integers(-32, 32, (3, vocabulary)) / 8).astype(np.float32)
    out = np.asarray(process(logits, row_params(params, [0, 0, 0])))
    for row, request, result in zip(logits, params, out, strict=True):
        stays, unsure = kept_by_reference(row, request)
        kept = result > -np.inf
        np.testing.assert_array_equal(kept[~unsure], stays[~unsure])
        assert kept.any()
        expected = np.zeros_like(row) if request.greedy else row / np.float32(request.temperature)
        np.testing.assert_allclose(result[kept], expected[kept], rtol=1e-6)


def test_top_p_counts_the_mass_that_top_k_left():
    probabilities = [0.1, 0.4, 0.3, 0.2]
    assert kept_ids(probabilities, top_p=0.5) == [1, 2]
    assert kept_ids(probabilities, top_p=0.5, top_k=2) == [1]  # 0.4 / 0.7 > 0.5


def test_top_p_counts_the_mass_that_min_p_left():
    probabilities = [0.1, 0.4, 0.3, 0.2]
    assert kept_ids(probabilities, min_p=0.6) == [1, 2]
    assert kept_ids(probabilities, top_p=0.5, min_p=0.6) == [1]


def test_min_p_is_relative_to_the_most_probable_after_temperature():
    probabilities = [0.1, 0.6, 0.3]
    assert kept_ids(probabilities, min_p=0.4) == [1, 2]
    assert kept_ids(probabilities, min_p=0.4, temperature=0.5) == [1]  # 0.25 as probable
    assert kept_ids(probabilities, min_p=1.0) == [1]


@pytest.mark.parametrize("vocabulary", [8, 2 * SHORTLIST])
def test_lower_ids_stay_among_equals(vocabulary):
    equal = np.full(vocabulary, 1 / vocabulary)
    most = 3 * vocabulary // 4  # exact in float32, and beyond the shortlist
    assert kept_ids(equal, top_k=3) == [0, 1, 2]
    assert kept_ids(equal, top_k=most) == list(range(most))
    assert kept_ids(equal, top_p=0.75) == list(range(most))
    assert kept_ids(equal, min_p=1.0) == list(range(vocabulary))


def test_ties_at_the_edge_leave_the_larger_ones_alone():
    assert kept_ids([0.2, 0.2, 0.4, 0.2], top_k=2) == [0, 2]
    assert kept_ids([0.1, 0.1, 0.1, 0.7], top_p=0.85) == [0, 1, 3]


def test_top_p_keeps_at_least_one():
    assert kept_ids([0.3, 0.4, 0.3], top_p=1e-60) == [1]
    assert kept_ids([0.3, 0.4, 0.3], top_p=0.1) == [1]


def test_switched_off_settings_change_nothing():
    logits = np.random.default_rng(0).normal(size=(3, 400)).astype(np.float32)
    rows = [SamplingParams(), SamplingParams(top_k=-1), SamplingParams(top_k=400)]
    np.testing.assert_array_equal(process(logits, row_params(rows, [0, 1, 2])), logits)


def test_temperatures_next_to_greedy_stay_finite():
    logits = np.asarray([[3e4, -3e4, 2.9e4]], np.float32)
    rows = row_params([SamplingParams(temperature=1e-5, top_p=0.9, min_p=0.1)], [0])
    assert np.asarray(process(logits, rows)).argmax() == 0
    assert not np.isnan(process(logits, rows)).any()
    assert draw(logits, rows, jnp.zeros(1, jnp.int32)).tolist() == [0]


# -- drawing ---------------------------------------------------------------------------------------


def draws(logits: np.ndarray, params: SamplingParams, seeds: Any, positions: Any) -> np.ndarray:
    """One token a (seed, position)."""
    seeds, positions = np.broadcast_arrays(seeds, positions)
    rows = row_params([params] * len(seeds), seeds.tolist())
    tiled = np.broadcast_to(logits.astype(np.float32), (len(seeds), logits.size))
    return np.asarray(draw(tiled, rows, positions.astype(np.int32)))


DISTRIBUTIONS = {
    "plain": {},
    "hot": {"temperature": 2.0},
    "cold": {"temperature": 0.5},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "all": {"temperature": 1.3, "top_k": 8, "top_p": 0.9, "min_p": 0.05},
}
N_DRAWS = 20_000


@pytest.mark.parametrize("over", ["positions", "seeds"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_follow_the_distribution(name, over):
    params = SamplingParams(**DISTRIBUTIONS[name])
    logits = np.random.default_rng(7).normal(size=16).astype(np.float32) * 1.5
    many = np.arange(N_DRAWS)
    tokens = draws(logits, params, *((11, many) if over == "positions" else (many, 11)))
    stays, unsure = kept_by_reference(logits, params)
    assert not unsure.any()
    probs = scipy.special.softmax(
        np.where(stays, logits.astype(np.float64) / params.temperature, -np.inf)
    )
    counts = np.bincount(tokens, minlength=16)
    assert not counts[~stays].any()
    assert scipy.stats.chisquare(counts[stays], N_DRAWS * probs[stays]).pvalue > 1e-3


def test_successive_draws_are_independent():
    tokens = draws(np.zeros(6), SamplingParams(), 5, np.arange(N_DRAWS))
    pairs = np.zeros((6, 6), int)
    np.add.at(pairs, (tokens[:-1:2], tokens[1::2]), 1)
    assert scipy.stats.chisquare(pairs.ravel()).pvalue > 1e-3


def test_a_row_never_depends_on_its_neighbours():
    rng = np.random.default_rng(3)
    B, V = 6, SHORTLIST + 144
    logits = rng.normal(size=(B, V)).astype(np.float32) * 3
    logits[2] *= 0.01  # so flat that all logits are sorted when this row is there
    params = [
        SamplingParams(),
        SamplingParams(top_p=0.9),
        SamplingParams(top_p=0.95, temperature=1.5),
        SamplingParams(top_k=7),
        SamplingParams(temperature=0),
        SamplingParams(min_p=0.01),
    ]
    seeds = [4, 4, 2**63 + 5, 6, 7, 4]
    positions = np.asarray([10, 11, 500_000, 10, 3, 10], np.int32)
    alone = [
        draw(logits[i : i + 1], row_params([params[i]], [seeds[i]]), positions[i : i + 1]).item()
        for i in range(B)
    ]
    for _ in range(4):
        # With repetition: rows also come twice, beside their twin.
        pick = rng.integers(0, B, B)
        rows = row_params([params[i] for i in pick], [seeds[i] for i in pick])
        together = draw(logits[pick], rows, positions[pick])
        assert together.tolist() == [alone[i] for i in pick]
    for i in range(B):  # by programs that have no more than this row needs
        row = row_params([params[i]], [seeds[i]]).for_requests([params[i]])
        assert draw(logits[i : i + 1], row, positions[i : i + 1]).item() == alone[i]


def test_seed_and_position_both_matter():
    flat = np.zeros(1000)
    positions = np.arange(200)
    first = draws(flat, SamplingParams(), 1, positions)
    np.testing.assert_array_equal(first, draws(flat, SamplingParams(), 1, positions))
    # The seed's upper half counts as well; chance agreement is one in a thousand.
    for other in (2, 1 + 2**32, sample_seed(1, 1)):
        assert (first == draws(flat, SamplingParams(), other, positions)).mean() < 0.03
    assert (first[1:] == first[:-1]).mean() < 0.03


def test_keys_are_those_of_jax():
    rows = row_params([SamplingParams()] * 2, [0, 12345])
    for i, seed in enumerate([0, 12345]):
        key = jax.random.key(seed, impl="threefry2x32")
        np.testing.assert_array_equal(rows.key_data[i], jax.random.key_data(key))


def test_greedy_takes_the_lowest_id_of_the_best():
    logits = np.asarray([[0, 5, 1, 5], [7, 7, 7, 7]], np.float32)
    greedy = SamplingParams(temperature=0, top_k=3, top_p=0.5, min_p=0.9)
    for other in (greedy, SamplingParams(temperature=1)):  # alone, and beside a sampled row
        rows = row_params([greedy, greedy, other], [1, 2, 3])
        three = np.concatenate([logits, logits[:1]])
        assert draw(three, rows, jnp.arange(3, dtype=jnp.int32)).tolist()[:2] == [1, 0]
        np.testing.assert_array_equal(
            process(three, rows)[:2],
            [[-np.inf, 0, -np.inf, -np.inf], [0, -np.inf, -np.inf, -np.inf]],
        )


def test_top_k_one_is_greedy():
    logits = np.asarray([2, 3, 3, 1], np.float32)
    assert set(draws(logits, SamplingParams(top_k=1), np.arange(50), 0)) == {1}


def test_sample_seeds_are_distinct():
    assert sample_seed(9, 0) == 9
    seeds = {sample_seed(seed, index) for seed in (0, 1, 2, 2**64 - 1) for index in range(50)}
    assert len(seeds) == 200
    assert row_params([SamplingParams()] * 200, sorted(seeds)).key_data.shape == (200, 2)


def test_row_params_needs_a_seed_a_row():
    with pytest.raises(ValueError, match="2 rows of parameters but 1 seeds"):
        row_params([SamplingParams()] * 2, [1])
    with pytest.raises(ValueError, match="seed is -1"):
        row_params([SamplingParams()], [-1])


# -- vocabulary and log-probabilities --------------------------------------------------------------


def test_ids_beyond_the_tokenizer_are_never_drawn():
    logits = np.asarray([1, 0, 2, 50, 60], np.float32)
    masked = np.asarray(mask_vocabulary(jnp.asarray(logits), 3))
    np.testing.assert_array_equal(masked, [1, 0, 2, -np.inf, -np.inf])
    for params in (SamplingParams(), SamplingParams(top_k=4), SamplingParams(top_p=0.9999)):
        assert set(draws(masked, params, np.arange(500), 0)) == {0, 1, 2}
    assert set(draws(masked, SamplingParams(temperature=0), np.arange(2), 0)) == {2}
    found = logprobs(jnp.asarray(masked[None]), jnp.asarray([0], jnp.int32), 3)
    np.testing.assert_allclose(np.exp(found.top).sum(), 1, rtol=1e-6)


def test_vocabulary_mask_takes_any_leading_shape():
    logits = jnp.ones((2, 3, 4))
    assert jnp.isinf(mask_vocabulary(logits, 1)).sum() == 2 * 3 * 3
    np.testing.assert_array_equal(mask_vocabulary(logits, 9), logits)
    with pytest.raises(ValueError, match="at least one token"):
        mask_vocabulary(logits, 0)


@pytest.mark.parametrize("top", [0, 1, 5, 20])
def test_logprobs_are_those_of_the_raw_logits(top):
    logits = np.random.default_rng(1).normal(size=(4, 20)).astype(np.float32) * 4
    tokens = np.asarray([0, 19, 7, 7], np.int32)
    expected = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    found = logprobs(jnp.asarray(logits), jnp.asarray(tokens), top)
    np.testing.assert_allclose(found.chosen, expected[np.arange(4), tokens], rtol=1e-5, atol=1e-6)
    order = np.argsort(-logits, axis=-1)[:, :top]
    np.testing.assert_array_equal(found.top_ids, order)
    np.testing.assert_allclose(
        found.top, np.take_along_axis(expected, order, -1), rtol=1e-5, atol=1e-6
    )


def test_logprobs_order_equals_by_id():
    found = logprobs(jnp.asarray([[1.0, 2.0, 1.0, 2.0]]), jnp.asarray([3], jnp.int32), 4)
    assert found.top_ids.tolist() == [[1, 3, 0, 2]]


@pytest.mark.parametrize("top", [-1, 5])
def test_logprobs_refuses_an_impossible_number(top):
    with pytest.raises(ValueError, match="expected 0 to 4"):
        logprobs(jnp.zeros((1, 4)), jnp.zeros(1, jnp.int32), top)


# -- SamplingParams --------------------------------------------------------------------------------


def test_defaults():
    assert dataclasses.asdict(SamplingParams()) == {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "max_tokens": 256,
        "stop": (),
        "seed": None,
        "n": 1,
        "logprobs": None,
        "ignore_eos": False,
    }


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.1, float("nan"), float("inf"), "hot", None, True]),
        ("top_p", [0, -0.5, 1.01, float("nan"), "1", None]),
        ("min_p", [-0.1, 1.5, float("nan"), None]),
        ("top_k", [-2, 1.5, "3", True, None, 2**31]),
        ("max_tokens", [0, -1, 2.0, None]),
        ("n", [0, 1.0, None]),
        ("seed", [-1, 2**64, 0.5, "x"]),
        ("logprobs", [-1, 1.5, True]),
        ("stop", ["", ["a", ""], 3, [3], {"a": 1}]),
        ("ignore_eos", [0, 1, None, "yes"]),
    ],
)
def test_wrong_values_are_refused_by_name(field, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{field} is .*must be"):
            SamplingParams(**{field: value})


def test_values_are_normalised():
    params = SamplingParams(
        temperature=np.float32(0.5),  # pyright: ignore[reportArgumentType]
        top_k=np.int64(3),  # pyright: ignore[reportArgumentType]
        top_p=1,
        stop="END",
        seed=2**64 - 1,
    )
    assert [type(v) for v in (params.temperature, params.top_k, params.top_p)] == [
        float,
        int,
        float,
    ]
    assert params.stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert hash(SamplingParams(stop=["a"])) == hash(SamplingParams(stop=("a",)))


def test_greedy_property():
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=1e-6).greedy
    assert not SamplingParams(temperature=0.01).greedy


def test_from_dict():
    fields = {"temperature": 0.5, "stop": ["x"], "seed": None, "top_p": None, "logprobs": 0}
    assert SamplingParams.from_dict(fields) == SamplingParams(
        temperature=0.5, stop=("x",), logprobs=0
    )


def test_from_dict_names_unknown_fields_and_the_nearest_known():
    with pytest.raises(
        ValueError, match=r"'max_new_tokens'.*did you mean max_tokens.*'zzz'; known"
    ):
        SamplingParams.from_dict({"max_new_tokens": 3, "zzz": 1, "top_k": 1})
