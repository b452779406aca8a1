import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mimo_jax.model.layers import MLP, RMSNorm, contract, linear
from mimo_jax.model.parameters import ParamSpec, abstract, declare, parameters, random_init
from mimo_jax.quant import FP8Array, numpy_dequantize, quantize_fp8, quantize_mxfp4
from pallas_kernels.rotate_and_store.reference import apply_rotary, rotary_angles

BF16 = ml_dtypes.bfloat16


# -- RMSNorm --------------------------------------------------------------------------------------


def norm(weight: np.ndarray, eps: float, dtype: str = "float32") -> RMSNorm:
    return RMSNorm(len(weight), eps, "norm", lambda spec: jnp.asarray(weight, dtype))


def test_norm_against_numpy():
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, 3, 16)), rng.uniform(0.5, 2, 16)
    expected = weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    got = norm(weight, 1e-5)(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_norm_epsilon_is_added_to_the_mean_square():
    y = norm(np.ones(4), 1e-2)(jnp.full((1, 4), 1e-3))
    np.testing.assert_allclose(y, 1e-3 / np.sqrt(1e-6 + 1e-2), rtol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_norm_weight_multiplies_after_the_cast(compiled):
    """bfloat16(bfloat16(x / rms) * weight), which rounds twice (MODEL_SPEC 2.3)."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((64, 128)).astype(BF16)
    weight = rng.uniform(0.5, 2, 128).astype(BF16)
    x32, w32 = x.astype(np.float32), weight.astype(np.float32)
    rms = np.sqrt((x32.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6)
    normal = (x32 / rms).astype(np.float32)
    cast_first = (normal.astype(BF16).astype(np.float32) * w32).astype(BF16)
    cast_last = (normal * w32).astype(BF16)
    f = norm(weight, 1e-6, "bfloat16")
    got = np.asarray((jax.jit(f) if compiled else f)(jnp.asarray(x)))
    assert got.dtype == BF16
    assert (cast_first != cast_last).mean() > 0.1
    assert (got != cast_first).mean() < 0.005  # rsqrt may differ in the last bit


def test_norm_of_large_bfloat16_values_does_not_overflow():
    y = norm(np.ones(4), 1e-6, "bfloat16")(jnp.full((1, 4), 1e18, jnp.bfloat16))
    np.testing.assert_allclose(np.asarray(y, np.float32), 1.0, rtol=0.01)


# -- rotary ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rotary_dim", "theta"), [(64, 1e4), (64, 1e7), (16, 5e6)])
def test_trap_15_denominator_is_the_rotary_width(rotary_dim, theta):
    at = np.array([[0, 1, 7, 1000]])
    cos, sin = rotary_angles(jnp.asarray(at), rotary_dim, theta)
    angle = at[..., None] * theta ** (-2 * np.arange(rotary_dim // 2) / rotary_dim)
    assert cos.dtype == sin.dtype == jnp.float32
    np.testing.assert_allclose(cos, np.cos(angle), atol=2e-4)
    np.testing.assert_allclose(sin, np.sin(angle), atol=2e-4)
    by_head = at[..., None] * theta ** (-2 * np.arange(rotary_dim // 2) / 192)
    assert np.abs(np.cos(angle) - np.cos(by_head)).max() > 0.5


@pytest.mark.parametrize("theta", [1e4, 1e7])
def test_frequencies_are_right_to_the_last_bit_or_so(theta):
    """At position 1,000,000 an error of one in the last place of 24 bits is 0.06 radians."""
    _, sin = rotary_angles(jnp.array([[1]]), 64, theta)
    exact = theta ** (-2 * np.arange(32) / 64)
    got = np.arcsin(np.asarray(sin, np.float64)[0, 0])
    np.testing.assert_allclose(got[8:], exact[8:], rtol=3e-7)


def test_trap_15_pairs_are_halves_apart():
    """Dimension i turns with i + half (NeoX), not with i + 1; the rest of a head passes."""
    half, dim = 4, 12
    angle = np.array([0.1, 0.2, 0.3, 0.4])
    cos, sin = (jnp.asarray(f(angle), jnp.float32).reshape(1, 1, half) for f in (np.cos, np.sin))
    for i in range(dim):
        x = np.zeros((1, 1, 1, dim), np.float32)
        x[..., i] = 1.0
        expected = np.zeros(dim)
        if i < half:
            expected[i], expected[i + half] = np.cos(angle[i]), np.sin(angle[i])
        elif i < 2 * half:
            j = i - half
            expected[j], expected[i] = -np.sin(angle[j]), np.cos(angle[j])
        else:
            expected[i] = 1.0
        got = np.asarray(apply_rotary(jnp.asarray(x), cos, sin)).reshape(dim)
        np.testing.assert_allclose(got, expected, atol=1e-7)


def test_scores_of_rotated_heads_depend_on_the_distance_alone():
    rng = np.random.default_rng(2)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 24)), jnp.float32) for _ in range(2))

    def score(query_at: int, key_at: int) -> float:
        turned = [
            apply_rotary(x, *rotary_angles(jnp.array([[at]]), 16, 1e4))
            for x, at in ((q, query_at), (k, key_at))
        ]
        return float(jnp.vdot(*turned))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-2)


def test_rotary_of_bfloat16_stays_bfloat16():
    cos, sin = rotary_angles(jnp.arange(3)[None], 4, 1e4)
    y = apply_rotary(jnp.ones((1, 3, 2, 8), jnp.bfloat16), cos, sin)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y[..., 4:], 1)


def test_no_rotary_dimensions_pass_everything():
    cos, sin = rotary_angles(jnp.arange(3)[None], 0, 1e4)
    x = jnp.ones((1, 3, 2, 8))
    np.testing.assert_array_equal(apply_rotary(x, cos, sin), x)


# -- linear maps ----------------------------------------------------------------------------------


def test_linear_of_chunked_fp8_weights():
    """Every chunk has scale rows of its own: 200 rows are two blocks, the second a partial one."""
    rng = np.random.default_rng(3)
    chunks, rows, dim = 3, 200, 160
    size = 10.0 ** rng.integers(-2, 3, (chunks, rows, 1))
    w = quantize_fp8(jnp.asarray(size * rng.standard_normal((chunks, rows, dim)), jnp.float32))
    assert isinstance(w, FP8Array)
    assert w.scales.shape == (chunks, 2, 2)
    x = rng.standard_normal((2, 5, dim)).astype(np.float32)
    expected = np.einsum("btd,crd->btcr", x.astype(np.float64), numpy_dequantize(w))
    got = linear(jnp.asarray(x), w)
    assert got.shape == (2, 5, chunks, rows)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("quantize", [quantize_fp8, quantize_mxfp4, lambda w: w])
def test_linear_of_a_matrix(quantize):
    rng = np.random.default_rng(4)
    w = quantize(jnp.asarray(rng.standard_normal((12, 64)), jnp.float32))
    x = rng.standard_normal((2, 64)).astype(np.float32)
    np.testing.assert_allclose(
        linear(jnp.asarray(x), w), x @ numpy_dequantize(w).T, rtol=1e-4, atol=1e-4
    )


def test_bfloat16_products_accumulate_in_float32():
    """4096 ones sum to 4096 exactly; a bfloat16 accumulator stops at 256."""
    ones = jnp.ones((1, 4096), jnp.bfloat16)
    y = contract("bd,fd->bf", ones, ones)
    assert y.dtype == jnp.float32
    assert y.item() == 4096
    assert linear(ones, ones).dtype == jnp.bfloat16


def test_float32_products_are_exact_on_every_backend():
    def precision(*dtypes: str):
        operands = [jax.ShapeDtypeStruct((2, 2), d) for d in dtypes]
        jaxpr = jax.make_jaxpr(functools.partial(contract, "bd,fd->bf"))(*operands)
        return next(e for e in jaxpr.eqns if e.primitive.name == "dot_general").params["precision"]

    assert precision("float32", "float32") == (jax.lax.Precision.HIGHEST,) * 2
    assert precision("bfloat16", "bfloat16") is None


# -- the dense feed-forward -----------------------------------------------------------------------


def test_mlp_against_numpy():
    rng = np.random.default_rng(5)
    shapes = {"gate": (6, 4), "up": (6, 4), "down": (4, 6)}
    w = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    mlp = MLP(4, 6, "mlp", "plain", lambda s: jnp.asarray(w[s.name[4:-12]], "float32"))
    x = rng.standard_normal((3, 4))
    gate = x @ w["gate"].T
    expected = (gate / (1 + np.exp(-gate)) * (x @ w["up"].T)) @ w["down"].T
    np.testing.assert_allclose(mlp(jnp.asarray(x, jnp.float32)), expected, rtol=1e-4, atol=1e-5)


def scalar_mlp(gate: float, up: float, dtype: str) -> MLP:
    """An MLP of width one: silu(gate x) * up x."""
    values = {"gate_proj": gate, "up_proj": up, "down_proj": 1.0}

    def make(spec: ParamSpec) -> jax.Array:
        return jnp.full(spec.shape, values[spec.name.split(".")[1]], dtype)

    return MLP(1, 1, "mlp", "plain", make)


@pytest.mark.parametrize(("gate", "up", "expected"), [(20, 30, 600), (-20, 30, 0), (20, -30, -600)])
def test_trap_13_mlp_is_not_clamped(gate, up, expected):
    y = scalar_mlp(gate, up, "float32")(jnp.ones((1, 1)))
    np.testing.assert_allclose(y, [[expected]], atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trap_14_activations_beyond_float16(dtype):
    """silu(g) * u of 8.4e4 occurs in layer 47 of V2.6-Flash; float16 ends at 65504."""
    y = scalar_mlp(290.0, 290.0, dtype)(jnp.ones((1, 1), dtype))
    np.testing.assert_allclose(np.asarray(y, np.float32), 290.0**2, rtol=0.01)


# -- declarations ---------------------------------------------------------------------------------


def build(make) -> MLP:
    return MLP(64, 160, "mlp", "fp8", make)


def test_random_weights_depend_on_key_and_name_alone():
    make = random_init(jax.random.key(1), "float32")
    a, b = (dict(parameters(build(make))) for _ in range(2))
    assert list(a) == ["down_proj", "gate_proj", "up_proj"]
    for path in a:
        np.testing.assert_array_equal(a[path].get_value(), b[path].get_value())
    assert not np.array_equal(a["gate_proj"].get_value(), a["up_proj"].get_value())
    other = dict(parameters(build(random_init(jax.random.key(2), "float32"))))
    assert not np.array_equal(a["up_proj"].get_value(), other["up_proj"].get_value())
    assert np.std(a["up_proj"].get_value()) == pytest.approx(0.02, rel=0.05)


def test_quantised_random_weights_are_those_rounded():
    plain = random_init(jax.random.key(1), "float32")
    quantized = random_init(jax.random.key(1), "float32", quantized=True)
    for (_, p), (_, q) in zip(parameters(build(plain)), parameters(build(quantized)), strict=True):
        np.testing.assert_allclose(
            numpy_dequantize(q.get_value()), p.get_value(), atol=0.07 * np.abs(p.get_value()).max()
        )
        assert isinstance(q.get_value(), FP8Array)


def test_abstract_modules_have_no_arrays():
    module = abstract(build, "bfloat16", quantized=True)
    leaves = jax.tree.leaves(module)
    assert len(leaves) == 6
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_spec_needs_an_axis_a_dimension():
    with pytest.raises(ValueError, match="1 axes for shape"):
        declare(jnp.zeros, ParamSpec("w", (2, 3), ("embed",)))
