"""The kernels of few tokens and of routing, interpreted on a CPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import backends, moe, words
from pallas_kernels.moe import cases, reference, triton, triton_one, triton_route, triton_scores
from pallas_kernels.moe.triton import Config, Tiling
from pallas_kernels.rms_norm import reference as norm_reference

BF16_ERROR = 5e-3
KERNELS = (("triton",), ("reference",))
pack = jax.jit(words.pack)
definition = jax.jit(reference.moe)
interpreted = jax.jit(functools.partial(triton.moe, interpret=True), static_argnames="config")
of_one = jax.jit(functools.partial(triton_one.moe, interpret=True), static_argnames="config")


def relative_error(got, expected) -> float:
    return float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))


def check(form, case):
    stacks, (x, weights, chosen) = cases.experts(case, 1), cases.tokens(case, 2)
    expected = definition(x.astype(jnp.float32), weights, chosen, *stacks)
    got = form(x, weights, chosen, *map(pack, stacks))
    assert got.dtype == jnp.float32
    assert relative_error(got, expected) < BF16_ERROR


@pytest.mark.parametrize("case", cases.SMALL.values(), ids=cases.SMALL.keys())
def test_against_the_reference(case):
    check(interpreted, case)


@pytest.mark.parametrize(
    "tiling", [Tiling(rows=16), Tiling(rows=32, unroll=2), Tiling(unroll=2)], ids=str
)
def test_tilings_agree(tiling):
    split = dataclasses.replace(tiling, splits=2)
    case = cases.Case(3, 256, 256, 4, 2)
    stacks, given = tuple(map(pack, cases.experts(case, 3))), cases.tokens(case, 4)
    expected = interpreted(*given, *stacks)
    got = interpreted(*given, *stacks, config=Config(tiling, tiling))
    np.testing.assert_allclose(got, expected, rtol=2e-2, atol=1e-2 * float(jnp.abs(got).max()))
    np.testing.assert_allclose(
        interpreted(*given, *stacks, config=Config(split, split)),
        expected,
        atol=1e-2 * float(jnp.abs(expected).max()),
    )
    if tiling.rows == 64:
        wide = Config(tiling, Tiling(rows=128))
        np.testing.assert_array_equal(interpreted(*given, *stacks, config=wide), got)


@pytest.mark.parametrize("name", ["one token", "a few", "all to one expert", "experts elsewhere"])
def test_both_products_in_one_kernel(name):
    case = cases.SMALL[name]
    stacks, given = tuple(map(pack, cases.experts(case, 3))), cases.tokens(case, 4)
    config = Config(Tiling(), Tiling(rows=32), together=True)
    got = interpreted(*given, *stacks, config=config)
    np.testing.assert_array_equal(got, interpreted(*given, *stacks))


@pytest.mark.parametrize(
    "case",
    [
        *[case for case in cases.SMALL.values() if case.tokens == 1],
        cases.Case(1, 96, 160, 12, 10),  # more experts than columns, sizes off the grid
        cases.Case(1, 384, 160, 3, 1),  # three column tiles, which no splits divide
    ],
    ids=str,
)
def test_one_token_against_the_reference(case):
    check(of_one, case)


def test_one_token_by_ranges_of_columns():
    case = cases.Case(1, 1024, 128, 4, 3)
    stacks, given = tuple(map(pack, cases.experts(case, 3))), cases.tokens(case, 4)
    whole, *parts = [
        of_one(*given, *stacks, config=triton_one.Config(up, triton_one.Tiling(16), splits))
        for up, splits in [
            (triton_one.Tiling(16), 1),
            (triton_one.Tiling(64), 2),
            (triton_one.Tiling(32), 8),
        ]
    ]
    for part in parts:  # Only the order of float32 additions is another.
        assert relative_error(part, whole) < 1e-3


def test_one_token_whose_experts_are_all_elsewhere():
    case = cases.SMALL["one token"]
    x, weights, chosen = cases.tokens(case, 2)
    stacks = list(map(pack, cases.experts(case, 1)))
    for away in (chosen + case.experts, -1 - chosen):
        assert not of_one(x, weights, away, *stacks).any()


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("first", [None, 0, 5])
@pytest.mark.parametrize(
    ("experts", "top_k", "options"),
    [
        (12, 4, {"normalize": True, "scale": None}),
        (10, 10, {"normalize": False, "scale": 2.5}),
    ],
    ids=str,
)
def test_one_token_from_its_scores_on(experts, top_k, options, first, residual):
    """Against the composition of the operations' references, with some experts elsewhere."""
    case = cases.Case(1, 96, 160, experts if first is None else experts - 5, top_k)
    x, _, _ = cases.tokens(dataclasses.replace(case, top_k=1), 2)
    stacks = cases.experts(case, 1)
    rng = np.random.default_rng(experts)
    scores = jnp.asarray(rng.random((1, experts)).round(1), jnp.float32)  # with ties
    bias = jnp.asarray(rng.standard_normal(experts).round(1), jnp.float32)
    first = None if first is None else jnp.int32(first)
    added_to = 1000 * x if residual else None
    options |= {"top_k": top_k}
    expected, weights_expected, chosen_expected = jax.jit(
        functools.partial(moe.routed_moe, first=first, residual=None, **options)
    )(x.astype(jnp.float32), scores, bias, *stacks)
    routed = jax.jit(functools.partial(triton_one.routed_moe, interpret=True, **options))
    got, weights, chosen = routed(x, scores, bias, first, added_to, *map(pack, stacks))
    np.testing.assert_array_equal(chosen, chosen_expected)
    np.testing.assert_array_equal(weights, weights_expected)
    if added_to is None:
        assert got.dtype == jnp.float32
        assert relative_error(got, expected) < BF16_ERROR
    else:
        assert got.dtype == jnp.bfloat16
        assert relative_error(got, added_to + expected) < BF16_ERROR


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("elsewhere", [True, False])
def test_routed_experts_of_a_model(tokens, elsewhere):
    """The operation as a model calls it: kernels where there are some, and the same without."""
    case = cases.Case(tokens, 128, 128, 6, 2)
    x, _, _ = cases.tokens(case, 2)
    stacks = cases.experts(case, 1)
    rng = np.random.default_rng(tokens)
    scores = jnp.asarray(rng.random((tokens, 9)), jnp.float32)
    options = {"top_k": 2, "normalize": True, "scale": None}
    first = jnp.int32(3) if elsewhere else None
    given = (x, scores, jnp.zeros(9))
    expected = moe.routed_moe(*given, *stacks, first=first, residual=x, **options)
    with backends.interpreted():
        got = moe.routed_moe(*given, *map(pack, stacks), first=first, residual=x, **options)
    assert got[0].dtype == x.dtype
    assert relative_error(got[0], expected[0]) < BF16_ERROR
    for a, b in zip(got[1:], expected[1:]):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, chosen, gate: (x.astype(jnp.float32), chosen, gate), "float32"),
        (lambda x, chosen, gate: (jnp.tile(x, (13, 1)), jnp.tile(chosen, (13, 1)), gate), "65"),
    ],
)
def test_what_they_cannot_do(change, message):
    case = cases.SMALL["a few"]
    gate, up, down = map(pack, cases.experts(case, 1))
    x, _, chosen = cases.tokens(case, 2)
    x, chosen, gate = change(x, chosen, gate)
    with pytest.raises(NotImplementedError, match=message):
        triton.moe(x, jnp.ones(chosen.shape), chosen, gate, up, down)


def test_more_tokens_than_one():
    case = cases.SMALL["a few"]
    gate, up, down = map(pack, cases.experts(case, 1))
    with pytest.raises(NotImplementedError, match="5 tokens are more than one"):
        triton_one.moe(*cases.tokens(case, 2), gate, up, down)


def test_weights_that_were_not_packed():
    gate, _, _ = cases.experts(cases.SMALL["a few"], 1)
    assert triton.unsupported(jnp.zeros((5, 256)), jnp.zeros((5, 4)), gate) == (
        "the weights are not packed as MXFP4Words but MXFP4Array"
    )


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(1, 6, 4), (5, 384, 8), (9, 12, 1), (3, 8, 8)]
)
@pytest.mark.parametrize(("normalize", "scale"), [(True, None), (False, 2.5), (True, 2.5)])
def test_routing_is_identical(tokens, experts, top_k, normalize, scale):
    rng = np.random.default_rng(tokens)
    # Rounded, so that there are ties.
    scores = jnp.asarray(rng.random((tokens, experts)).round(2), jnp.float32)
    bias = jnp.asarray(rng.standard_normal(experts).round(1), jnp.float32)
    options = {"normalize": normalize, "scale": scale}
    expected = jax.jit(lambda: reference.route(scores, bias, top_k, **options))()
    got = triton_route.route(scores, bias, top_k, interpret=True, **options)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_routing_refuses_what_does_not_fit_a_warp():
    with pytest.raises(NotImplementedError, match="2048 experts are more than 1024"):
        triton_route.route(jnp.zeros((1, 2048)), jnp.zeros(2048), 8, normalize=True, scale=None)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "dim"), [(1, 96), (8, 1536), (9, 96), (64, 1100), (65, 96), (130, 2100)]
)
def test_router_scores(tokens, dim, dtype):
    rng = np.random.default_rng(dim)
    x = jnp.asarray(rng.standard_normal((tokens, dim)), jnp.bfloat16)
    router = jnp.asarray(rng.standard_normal((20, dim)) / np.sqrt(dim), dtype)
    got = triton_scores.scores(x, router, interpret=True)
    assert relative_error(got, reference.scores(x, router)) < 1e-6


@pytest.mark.parametrize(("dim", "dtype"), [(96, jnp.float32), (1536, jnp.bfloat16)])
def test_norm_and_scores_in_one_kernel(dim, dtype):
    rng = np.random.default_rng(dim)
    x = jnp.asarray(30 * rng.standard_normal((1, dim)), jnp.bfloat16)
    weight = jnp.asarray(rng.uniform(0.5, 1.5, dim), jnp.bfloat16)
    router = jnp.asarray(rng.standard_normal((20, dim)) / np.sqrt(dim), dtype)
    # As kernels do, XLA is to round y before it is multiplied.
    call = jax.jit(
        functools.partial(triton_scores.normed_scores, eps=1e-5, interpret=True),
        compiler_options={"xla_allow_excess_precision": False},
    )
    y, got = call(x, weight, router)
    expected = norm_reference.rms_norm(x.astype(jnp.float32), weight.astype(jnp.float32), eps=1e-5)
    assert y.dtype == jnp.bfloat16
    assert relative_error(y, expected) < BF16_ERROR
    assert relative_error(got, reference.scores(y, router)) < 1e-6
    with backends.interpreted():
        calls = [moe.normed_scores(x, weight, router, eps=1e-5, kernels=k) for k in KERNELS]
    for pair in zip(*calls):
        np.testing.assert_allclose(*pair, rtol=2e-2)


def test_norm_and_scores_of_what_is_not_one_bfloat16_token():
    weight, router = jnp.ones(32), jnp.zeros((4, 32))
    with pytest.raises(NotImplementedError, match="3 tokens are more than one"):
        triton_scores.normed_scores(jnp.zeros((3, 32), jnp.bfloat16), weight, router, eps=1e-5)
    with pytest.raises(NotImplementedError, match="float32"):
        triton_scores.normed_scores(jnp.zeros((1, 32)), weight, router, eps=1e-5)


def test_router_scores_of_more_tokens():
    router = jnp.zeros((4, 32))
    x = jnp.zeros((4097, 32), jnp.bfloat16)
    assert triton_scores.unsupported(x[:1024], router) is None
    assert triton_scores.unsupported(x[:1025], router) == "1025 tokens are more than 1024"
    of_bfloat16 = router.astype(jnp.bfloat16)
    assert triton_scores.unsupported(x[:4096], of_bfloat16) is None
    assert triton_scores.unsupported(x, of_bfloat16) == "4097 tokens are more than 4096"
    assert triton_scores.unsupported(jnp.zeros((8, 32)), router) is None
    assert "float32" in (triton_scores.unsupported(jnp.zeros((9, 32)), router) or "")
