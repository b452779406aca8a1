import functools

import golden
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from goldens import recipe
from hypothesis import given
from hypothesis import strategies as st
from jaxprs import dot_flops, equations

from mimo_jax.config import MiMoConfig
from mimo_jax.model.layers import RMSNorm
from mimo_jax.model.moe import MoE
from mimo_jax.model.taps import Taps
from mimo_jax.quant import numpy_dequantize, quantize_fp8, quantize_mxfp4
from pallas_kernels.moe import reference as experts_module
from pallas_kernels.moe.reference import GATHER_PAIRS, moe, route, swiglu_experts

E, F, D = 6, 32, 64
FORMATS = {"plain": lambda w: w, "fp8": quantize_fp8, "mxfp4": quantize_mxfp4}


@functools.cache
def experts(fmt: str, dtype: str = "float32") -> tuple:
    """Gate, up [E, F, D] and down [E, D, F] in a storage format; outputs are of order 1."""
    rng = np.random.default_rng(0)
    shapes = ((E, F, D), (E, F, D), (E, D, F))
    stacks = (2 * rng.standard_normal(s) / np.sqrt(s[-1]) for s in shapes)
    return tuple(FORMATS[fmt](jnp.asarray(w, dtype)) for w in stacks)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def loop(x, weights, chosen, stacks) -> np.ndarray:
    """The mixture in float64, one token and expert at a time (MODEL_SPEC 2.12)."""
    gate, up, down = (numpy_dequantize(w).astype(np.float64) for w in stacks)
    x, weights = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    out = np.zeros_like(x)
    for token, token_experts in enumerate(np.asarray(chosen)):
        for slot, e in enumerate(token_experts):
            hidden = silu(gate[e] @ x[token]) * (up[e] @ x[token])
            out[token] += weights[token, slot] * (down[e] @ hidden)
    return out


def routing(rng, tokens: int, top_k: int, among: int = E) -> tuple[jax.Array, jax.Array]:
    """Random weights, and distinct experts of each token out of the last `among`."""
    chosen = np.stack([E - 1 - rng.permutation(among)[:top_k] for _ in range(tokens)])
    weights = rng.uniform(0.1, 1, chosen.shape)
    return jnp.asarray(weights, jnp.float32), jnp.asarray(chosen, jnp.int32)


jit_moe = jax.jit(moe)


# -- routing --------------------------------------------------------------------------------------


def route_loop(scores, bias, top_k, normalize, scale) -> tuple[np.ndarray, np.ndarray]:
    scores, bias = np.asarray(scores, np.float64), np.asarray(bias, np.float64)
    chosen = np.argsort(-(scores + bias), axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(scores, chosen, axis=-1)
    if normalize:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return weights * (1.0 if scale is None else scale), chosen


@given(
    seed=st.integers(0, 2**32 - 1),
    normalize=st.booleans(),
    scale=st.sampled_from([None, 1.0, 2.5]),
    spread=st.sampled_from([0.0, 0.05, 1.0]),
)
def test_route_against_numpy(seed, normalize, scale, spread):
    rng = np.random.default_rng(seed)
    scores = jnp.asarray(rng.uniform(0, 1, (9, 12)), jnp.float32)
    bias = jnp.asarray(spread * rng.standard_normal(12), jnp.float32)
    weights, chosen = route(scores, bias, 4, normalize=normalize, scale=scale)
    expected, expected_chosen = route_loop(scores, bias, 4, normalize, scale)
    np.testing.assert_array_equal(chosen, expected_chosen)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert weights.dtype == jnp.float32


def test_ties_go_to_the_lowest_index():
    _, chosen = route(jnp.full((1, 5), 0.5), jnp.zeros(5), 3, normalize=True, scale=None)
    np.testing.assert_array_equal(chosen, [[0, 1, 2]])


def test_trap_12_bias_is_for_selection_only():
    """Expert 2 is chosen for its bias and mixed by its own small score."""
    scores, bias = jnp.array([[0.8, 0.6, 0.1, 0.5]]), jnp.array([0.0, 0.0, 9.0, 0.0])
    weights, chosen = route(scores, bias, 2, normalize=True, scale=None)
    np.testing.assert_array_equal(chosen, [[2, 0]])
    np.testing.assert_allclose(weights, [[0.1 / 0.9, 0.8 / 0.9]], rtol=1e-6)
    weights, _ = route(scores, bias, 2, normalize=False, scale=2.5)
    np.testing.assert_allclose(weights, [[0.25, 2.0]], rtol=1e-6)


def test_vanishing_scores_do_not_divide_by_zero():
    weights, _ = route(jnp.zeros((1, 4)), jnp.zeros(4), 2, normalize=True, scale=None)
    np.testing.assert_array_equal(weights, [[0.0, 0.0]])


# -- the mixture ----------------------------------------------------------------------------------

# The last number of tokens that gathers weights and the first that tiles rows, for each top-k.
CASES = {
    "one token": (1, 4, E),
    "last to gather": (GATHER_PAIRS // 4, 4, E),
    "first to tile": (GATHER_PAIRS // 4 + 1, 4, E),
    "many": (150, 4, E),
    "one expert, gathered": (GATHER_PAIRS, 1, 1),
    "one expert, tiled": (GATHER_PAIRS + 1, 1, 1),
    "two experts, four empty": (70, 2, 2),
    "all experts": (20, E, E),
}


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("tokens", "top_k", "among"), CASES.values(), ids=CASES)
def test_moe_against_a_loop(fmt, tokens, top_k, among):
    rng = np.random.default_rng(tokens)
    x = jnp.asarray(rng.standard_normal((tokens, D)), jnp.float32)
    weights, chosen = routing(rng, tokens, top_k, among)
    expected = loop(x, weights, chosen, experts(fmt))
    got = jit_moe(x, weights, chosen, *experts(fmt))
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("fmt", FORMATS)
def test_gathered_and_tiled_tokens_agree(fmt):
    """The same tokens a few at a time and all together."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((48, D)), jnp.float32)
    weights, chosen = routing(rng, 48, 4)
    stacks = experts(fmt)
    together = jit_moe(x, weights, chosen, *stacks)
    parts = [
        jit_moe(x[i : i + 16], weights[i : i + 16], chosen[i : i + 16], *stacks)
        for i in range(0, 48, 16)
    ]
    atol = 2e-6 * float(np.abs(together).max())
    np.testing.assert_allclose(np.concatenate(parts), together, atol=atol)


@pytest.mark.parametrize("tiles_at_once", [1, 3])
def test_tiles_in_several_rounds(monkeypatch, tiles_at_once):
    """Where the dequantised weights of all tiles would be too much, tiles take turns."""
    monkeypatch.setattr(experts_module, "TILE_BYTES", tiles_at_once * 3 * 4 * F * D)
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((90, D)), jnp.float32)
    weights, chosen = routing(rng, 90, 4)
    expected = loop(x, weights, chosen, experts("mxfp4"))
    got = jax.jit(lambda *a: moe(*a))(x, weights, chosen, *experts("mxfp4"))
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def test_bfloat16_accumulates_the_mixture_in_float32():
    rng = np.random.default_rng(3)
    for tokens in (4, 40):
        x = jnp.asarray(rng.standard_normal((tokens, D)), jnp.bfloat16)
        weights, chosen = routing(rng, tokens, 4)
        got = jit_moe(x, weights, chosen, *experts("plain", "bfloat16"))
        expected = loop(x, weights, chosen, experts("plain", "bfloat16"))
        assert got.dtype == jnp.float32
        error = np.abs(np.asarray(got) - expected)
        assert error.max() < 0.02 * np.abs(expected).max()


jit_tiled = jax.jit(experts_module._tiled_experts)


@given(st.sampled_from([1, 3]), st.integers(1, E), st.integers(0, 2**32 - 1))
def test_every_pair_has_its_row_in_a_tile_of_its_expert(top_k, among, seed):
    """Experts that answer (token, expert) for a token's (index, 1): silu(30) is 30."""
    tokens, top_k = 50, min(top_k, among)
    _, chosen = routing(np.random.default_rng(seed), tokens, top_k, among)
    x = jnp.stack([jnp.arange(tokens, dtype=jnp.float32), jnp.ones(tokens)], axis=1)
    gate = jnp.tile(jnp.array([0.0, 30.0]), (E, 2, 1))
    up = jnp.stack([jnp.array([[1.0, 0.0], [0.0, e]]) for e in range(E)])
    down = jnp.tile(jnp.eye(2) / 30, (E, 1, 1))
    got = jit_tiled(x, chosen, gate, up, down)
    expected = [(t, e) for t, row in enumerate(np.asarray(chosen)) for e in row]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_gradients_of_tiled_tokens():
    """Of tokens, mixing weights and expert weights, against all experts computed for all tokens."""
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.standard_normal((20, D)), jnp.float32)
    weights, chosen = routing(rng, 20, 4)
    target = jnp.asarray(rng.standard_normal((20, D)), jnp.float32)

    def all_experts(x, weights, gate, up, down):
        share = jnp.zeros((20, E)).at[jnp.arange(20)[:, None], chosen].add(weights)
        hidden = jax.nn.silu(jnp.einsum("pd,efd->pef", x, gate)) * jnp.einsum("pd,efd->pef", x, up)
        return jnp.einsum("pe,pef,edf->pd", share, hidden, down)

    def gradients(f):
        return jax.jit(jax.grad(lambda *a: (f(*a) * target).sum(), argnums=range(5)))(
            x, weights, *experts("plain")
        )

    expected = gradients(all_experts)
    got = gradients(lambda x, weights, *stacks: moe(x, weights, chosen, *stacks))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


def test_trap_13_swiglu_is_not_clamped():
    """silu(20) * 30 = 600; a clamp at 7 would give 49."""
    x = jnp.ones((1, 1, 1))
    gate, up, down = jnp.full((1, 1, 1), 20.0), jnp.full((1, 1, 1), 30.0), jnp.ones((1, 1, 1))
    y = swiglu_experts(x, jnp.array([0]), gate, up, down)
    np.testing.assert_allclose(np.asarray(y).item(), 600.0, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, GATHER_PAIRS + 1])
def test_trap_14_activations_beyond_float16(dtype, tokens):
    """Layer 47 of V2.6-Flash has silu(g) * u of 8.4e4; float16 ends at 65504."""
    x = jnp.ones((tokens, 2), dtype)
    gate, up = jnp.full((1, 2, 2), 145.0, dtype), jnp.full((1, 2, 2), 145.0, dtype)
    down = jnp.full((1, 2, 2), 1e-3, dtype)
    chosen, one = jnp.zeros((tokens, 1), jnp.int32), jnp.ones((tokens, 1))
    y = np.asarray(jit_moe(x, one, chosen, gate, up, down), np.float32)
    assert 290 * 290 > 8.4e4 > float(np.finfo(np.float16).max)
    np.testing.assert_allclose(y, 2 * 1e-3 * 290 * 290, rtol=1e-5 if dtype == "float32" else 0.01)


# -- how much is computed -------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 8, 9, 64, 512])
def test_only_chosen_experts_are_computed(tokens):
    """In the release's shape, 384 experts of which 8 are chosen, no more than
    a few times the products that the (token, expert) pairs need, not those of all experts."""
    n, top_k, width, dim = 384, 8, 128, 384
    stack = jax.ShapeDtypeStruct((n, width, dim), jnp.bfloat16)
    down = jax.ShapeDtypeStruct((n, dim, width), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((tokens, dim), jnp.bfloat16)
    weights = jax.ShapeDtypeStruct((tokens, top_k), jnp.float32)
    chosen = jax.ShapeDtypeStruct((tokens, top_k), jnp.int32)
    one_row = 2 * 3 * width * dim
    pairs = tokens * top_k
    flops = dot_flops(moe, x, weights, chosen, stack, stack, down)
    combine = 2 * pairs * dim
    if pairs <= GATHER_PAIRS:
        assert pairs * one_row <= flops <= pairs * one_row + combine
    else:
        # A tile has 8 rows at least: an expert that got one row computes 8.
        padding = min(n, pairs) * max(8, 2 * pairs // n)
        assert flops <= (2 * pairs + padding) * one_row + combine
    assert flops < tokens * n * one_row / 4


def norm(dim: int) -> RMSNorm:
    """One whose results are of the order of its weight, a tenth."""
    return RMSNorm(dim, 1e-6, "norm", lambda s: jnp.full(s.shape, 0.1))


def test_no_expert_axis_in_any_product():
    """No matrix product runs over the whole expert stack, in any number of tokens."""
    n = 48
    case = golden.tiny(n_routed_experts=n, num_experts_per_tok=2)
    model = golden.build(case)
    layer = model.layers[1].mlp
    assert isinstance(layer, MoE)
    for tokens in (3, 100):
        x = jnp.zeros((1, tokens, 32))
        for equation in equations(lambda x: layer(x, norm(32), Taps()), x):
            if equation.primitive.name == "dot_general":
                shapes = [v.aval.shape for v in (*equation.invars, *equation.outvars)]
                is_router = equation.invars[1].aval.shape == (n, 32)
                assert is_router or all(n not in shape for shape in shapes), shapes


# -- the module -----------------------------------------------------------------------------------


def module(dtype: str, **changes) -> tuple[MoE, dict[str, np.ndarray]]:
    """The MoE layer of a small model and its tensors."""
    case = golden.tiny(**changes)
    weights = recipe.make_weights(case)
    config = MiMoConfig.from_dict({**case.config, "dtype": dtype})
    layer = MoE(config, 1, "model.layers.1.mlp", "plain", golden.make_from(weights, dtype))
    return layer, weights


@pytest.mark.parametrize(
    "changes", [{}, {"routed_scaling_factor": 2.5}, {"norm_topk_prob": False}], ids=str
)
@pytest.mark.parametrize("tokens", [2, 50])
def test_module_against_a_loop(tokens, changes):
    layer, w = module("float32", **changes)
    x = np.random.default_rng(tokens).standard_normal((tokens, 32)).astype(np.float32)
    normed = 0.1 * x / np.sqrt((x.astype(np.float64) ** 2).mean(axis=1, keepdims=True) + 1e-6)
    scores = 1 / (1 + np.exp(-(normed @ w["model.layers.1.mlp.gate.weight"].T)))
    bias = w["model.layers.1.mlp.gate.e_score_correction_bias"]
    weights, chosen = route_loop(
        scores, bias, 2, changes.get("norm_topk_prob", True), changes.get("routed_scaling_factor")
    )
    stacks = [
        np.stack([w[f"model.layers.1.mlp.experts.{e}.{p}_proj.weight"] for e in range(8)])
        for p in ("gate", "up", "down")
    ]
    got = jax.jit(lambda layer, x: layer(x, norm(32), Taps()))(layer, jnp.asarray(x)[None])
    np.testing.assert_allclose(got[0], x + loop(normed, weights, chosen, stacks), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trap_16_router_is_exact_float32(dtype):
    """Operands are float32 and multiplied exactly, whatever the model's dtype is."""
    layer, _ = module(dtype)
    x = jnp.zeros((1, 3, 32), dtype)
    routers = [
        equation
        for equation in equations(lambda x: layer(x, norm(32), Taps()), x)
        if equation.primitive.name == "dot_general" and equation.outvars[0].aval.shape[-1] == 8
    ]
    assert len(routers) == 1
    assert {v.aval.dtype for v in routers[0].invars} == {jnp.dtype("float32")}
    assert routers[0].params["precision"] == (jax.lax.Precision.HIGHEST,) * 2
    assert layer.gate[...].dtype == layer.e_score_correction_bias[...].dtype == jnp.float32


def test_trap_16_router_tells_apart_what_bfloat16_cannot():
    """Two experts whose scores differ by 2 ** -12 in a bfloat16 model."""
    layer, _ = module("bfloat16")
    gate = np.zeros((8, 32), np.float32)
    gate[3, 0], gate[5, 0] = 1.0, 1.0 + 2**-12
    layer.gate[...] = jnp.asarray(gate)
    layer.e_score_correction_bias[...] = jnp.zeros(8)
    layer.top_k = 1
    taps = Taps(["router.1"])
    layer(jnp.zeros((1, 1, 32), jnp.bfloat16).at[0, 0, 0].set(1.0), norm(32), taps)
    scores = np.asarray(taps.values["router.1"])[0, 0]
    assert scores.argmax() == 5
    assert scores[5] > scores[3] > scores[0]
    assert scores[5].astype(ml_dtypes.bfloat16) == scores[3].astype(ml_dtypes.bfloat16)


def test_router_is_stored_in_bfloat16_where_the_config_says_so():
    case = golden.tiny()
    config = MiMoConfig.from_dict({**case.config, "moe_router_dtype": "bfloat16"})
    make = golden.make_from(recipe.make_weights(case), "bfloat16")
    layer = MoE(config, 1, "model.layers.1.mlp", "plain", make)
    assert layer.gate[...].dtype == jnp.bfloat16
    assert layer.e_score_correction_bias[...].dtype == jnp.float32
