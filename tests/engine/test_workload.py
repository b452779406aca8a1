"""Made-up requests: as long as was asked for, the same every time, coming at once or by chance."""

import numpy as np
import pytest

from mimo_jax.engine.workload import Lengths, Workload

MANY = 20_000


def drawn(text: str, count: int = MANY) -> np.ndarray:
    return Lengths.parse(text).draw(np.random.default_rng(0), count)


def workload(requests: int = 50, rate: float | None = None, seed: int = 0) -> Workload:
    prompt, output = Lengths.parse("lognormal:20,0.8,64"), Lengths.parse("4-9")
    return Workload(prompt, output, requests, rate, seed)


def test_a_number_is_every_length():
    assert set(drawn("17").tolist()) == {17}


def test_a_range_has_all_its_numbers_equally():
    lengths, counts = np.unique(drawn("3-7"), return_counts=True)
    assert lengths.tolist() == [3, 4, 5, 6, 7]
    assert counts.min() > 0.95 * MANY / 5


def test_lognormal_has_its_median_spread_and_bounds():
    free, bounded = drawn("lognormal:100,0.5"), drawn("lognormal:100,0.5,150")
    assert np.median(free) == pytest.approx(100, rel=0.02)
    assert np.log(free).std() == pytest.approx(0.5, rel=0.02)
    assert (bounded == np.minimum(free, 150)).all()
    assert drawn("lognormal:1,3").min() == 1
    assert set(drawn("lognormal:9,0").tolist()) == {9}


def test_lengths_too_large_for_integers_are_bounded():
    assert drawn("lognormal:1,500").max() == 2**31 - 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected tokens as 128"),
        ("many", "expected tokens as 128"),
        ("-5", "expected tokens as 128"),
        ("1-2-3", "expected tokens as 128"),
        ("normal:5,1", "expected tokens as 128"),
        ("lognormal:5", "expected tokens as 128"),
        ("lognormal:5,x", "expected tokens as 128"),
        ("lognormal:5,1,9,9", "expected tokens as 128"),
        ("0", "at least 1 token"),
        ("0-4", "at least 1 token"),
        ("9-4", "the smaller one first"),
        ("lognormal:0,1", "MEDIAN must be at least 1"),
        ("lognormal:nan,1", "MEDIAN must be at least 1"),
        ("lognormal:5,-1", "SIGMA at least 0"),
        ("lognormal:5,inf", "both finite"),
        ("lognormal:5,1,4", "at least MEDIAN"),
        ("lognormal:5,1,6.5", "a whole number"),
    ],
)
def test_malformed_lengths_are_refused(text, message):
    with pytest.raises(ValueError, match=message) as error:
        Lengths.parse(text)
    assert repr(text) in str(error.value)


def test_works_are_as_was_drawn():
    prompts, outputs = workload().lengths()
    works = [work for _, work in workload().works(vocabulary=10)]
    assert [len(w.tokens) for w in works] == prompts.tolist()
    assert [w.params.max_tokens for w in works] == outputs.tolist()
    assert all(w.params.ignore_eos and w.params.temperature == 0 for w in works)
    assert {token for w in works for token in w.tokens} == set(range(10))
    assert workload().longest == max(prompts + outputs)


def test_the_same_workload_has_the_same_requests_and_more_begin_with_fewer():
    more = workload(80, 5.0).works(1000)
    assert more == workload(80, 5.0).works(1000)
    assert more[:50] == workload(50, 5.0).works(1000)
    assert more[:50] != workload(50, 5.0, seed=1).works(1000)
    assert [w for _, w in more[:50]] == [w for _, w in workload().works(1000)]


def test_all_come_at_once_or_as_a_poisson_process():
    assert not workload().arrivals().any()
    arrivals = workload(MANY, rate=4.0).arrivals()
    gaps = np.diff(arrivals)
    assert arrivals[0] == 0
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / 4, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 4, rel=0.03)


def test_requests_that_the_model_has_no_positions_for_are_refused():
    longest = workload().longest
    workload().check(longest)
    with pytest.raises(ValueError, match=rf"the model has {longest - 1} positions; shorten"):
        workload().check(longest - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"requests": 0}, "0 requests"),
        ({"rate": 0.0}, r"rate is 0.0 requests/s"),
        ({"rate": float("inf")}, "rate is inf"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_impossible_workloads_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        workload(**options)
