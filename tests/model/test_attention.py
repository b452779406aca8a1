import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_loop import loop
from goldens import recipe
from hypothesis import given
from hypothesis import strategies as st
from jaxprs import equations

from mimo_jax.config import MiMoConfig
from mimo_jax.model.attention import Attention
from mimo_jax.model.cache import LayerCache
from mimo_jax.model.cached_attention import cached_attention
from mimo_jax.model.layers import RMSNorm
from mimo_jax.model.parameters import random_init
from mimo_jax.model.taps import Taps
from pallas_kernels.attention.reference import QUERY_BLOCK, attend
from pallas_kernels.rotate_and_store import Heads
from pallas_kernels.rotate_and_store.reference import split, store


def attend_by_head(q, k, v, q_positions, k_positions, window=None, sink=None):
    """`attend` by position, with query heads in a row: q [B, T, N, H] and sink [N], and results
    likewise."""
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    seen = (k_positions[:, None, :] >= 0) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    out, weights = attend(*_grouped(q, k), v, seen, _grouped_sink(sink, k))
    by_head = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    return out.reshape(*q.shape[:3], -1), weights.reshape(by_head)


def from_heads(q, k, v, positions, cache=None, window=None, sink=None, with_weights=False):
    """`cached_attention` of heads in a row that aren't rotated; a sink [N]."""
    heads = Heads(k.shape[2], q.shape[2] // k.shape[2], q.shape[-1], v.shape[-1], 0, 1.0, None)
    fused = jnp.concatenate([a.reshape(*a.shape[:2], 1, -1) for a in (q, k, v)], axis=-1)
    options = {"heads": heads, "window": window, "with_weights": with_weights}
    out, _, weights = cached_attention(fused, positions, cache, _grouped_sink(sink, k), **options)
    return out.reshape(*q.shape[:3], -1), weights


def _grouped(q, k):
    return q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1]), k


def _grouped_sink(sink, k):
    return None if sink is None else sink.reshape(k.shape[2], -1)


jit_attend = jax.jit(attend_by_head, static_argnames="window")
jit_from_heads = jax.jit(from_heads, static_argnames=("window", "with_weights"))


def random_qkv(rng, batch=2, t=5, s=7, heads=4, kv=2, dim=6, v_dim=3, spread=1.0):
    return tuple(
        jnp.asarray(spread * rng.standard_normal(shape), jnp.float32)
        for shape in ((batch, t, heads, dim), (batch, s, kv, dim), (batch, s, kv, v_dim))
    )


# -- attend ---------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32 - 1),
    window=st.sampled_from([None, 1, 3]),
    sinks=st.sampled_from([None, 0.0, 2.0, 30.0]),
    spread=st.sampled_from([1.0, 30.0]),
)
def test_attend_against_a_loop(seed, window, sinks, spread):
    """Keys in any order, empty slots, queries that see nothing, sinks up to +-30."""
    rng = np.random.default_rng(seed)
    q, k, v = random_qkv(rng, spread=spread)
    q_at, k_at = (
        rng.integers(-1, 8, (2, 5)),
        rng.permuted(np.tile(np.arange(-2, 5), (2, 1)), axis=1),
    )
    k_at = np.maximum(k_at, -1)
    sink = None if sinks is None else jnp.asarray(rng.choice([-sinks, sinks], 4), jnp.float32)
    got = jit_attend(q, k, v, jnp.asarray(q_at), jnp.asarray(k_at), window=window, sink=sink)
    expected = loop(q, k, v, q_at, k_at, window, sink)
    # Scores of spread 30 reach thousands, of which float32 keeps seven digits.
    out, weights = (1e-6, 1e-6) if spread == 1 else (2e-2, 1e-3)
    np.testing.assert_allclose(got[0], expected[0], atol=out)
    np.testing.assert_allclose(got[1], expected[1], atol=weights)


def test_query_that_sees_nothing_gets_zeros():
    q, k, v = random_qkv(np.random.default_rng(0), batch=1, t=2, s=3)
    for sink in (None, jnp.full(4, -30.0)):
        out, weights = attend_by_head(
            q, k, v, jnp.array([[-1, 4]]), jnp.array([[-1, -1, 9]]), window=2, sink=sink
        )
        assert (np.asarray(out) == 0).all()
        assert (np.asarray(weights) == 0).all()


def test_huge_scores_do_not_overflow():
    q, k, v = random_qkv(np.random.default_rng(0), batch=1, t=3, s=3, spread=1e4)
    at = jnp.arange(3)[None]
    for sink in (None, jnp.asarray([30.0, -30.0, 0.0, 1e4])):
        out, weights = attend_by_head(q, k, v, at, at, sink=sink)
        assert np.isfinite(out).all()
        assert (np.asarray(weights).sum(-1) <= 1 + 1e-6).all()


def test_sink_takes_its_share_and_gives_no_value():
    """Equal scores of 0 and a sink s: each key gets 1 / (n + e^s), the sink is not scaled."""
    q, k = jnp.zeros((1, 1, 4, 6)), jnp.zeros((1, 3, 2, 6))
    v = jnp.ones((1, 3, 2, 3))
    sink = jnp.asarray([0.0, 1.0, -30.0, 30.0])
    out, weights = attend_by_head(q, k, v, jnp.array([[2]]), jnp.arange(3)[None], sink=sink)
    expected = 3 / (3 + np.exp(np.asarray(sink, np.float64)))
    np.testing.assert_allclose(np.asarray(weights)[0, :, 0].sum(-1), expected, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(out)[0, 0, :, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("window", [1, 128, 129])
def test_trap_8_window_includes_the_query(window):
    """Visible distances are 0 to window - 1 (MODEL_SPEC 2.8)."""
    q, k = jnp.zeros((1, 1, 1, 2)), jnp.zeros((1, 140, 1, 2))
    at = jnp.arange(140)[None]
    _, weights = attend_by_head(q, k, jnp.zeros((1, 140, 1, 1)), at[:, 135:136], at, window=window)
    seen = np.flatnonzero(np.asarray(weights)[0, 0, 0])
    np.testing.assert_array_equal(seen, np.arange(136 - window, 136))
    np.testing.assert_allclose(np.asarray(weights)[0, 0, 0, seen], 1 / window, rtol=1e-6)


def test_trap_11_scale_is_the_query_width():
    """1 / sqrt(192) whatever the rotary and value widths are (MODEL_SPEC 2.7)."""
    q = jnp.full((1, 1, 1, 192), 0.5)
    k = jnp.stack([jnp.zeros(192), jnp.full(192, 0.25)])[None, :, None]
    v = jnp.zeros((1, 2, 1, 128))
    out, weights = attend_by_head(q, k, v, jnp.array([[1]]), jnp.arange(2)[None])
    odds = np.asarray(weights)[0, 0, 0, 1] / np.asarray(weights)[0, 0, 0, 0]
    np.testing.assert_allclose(odds, np.exp(192 * 0.125 / np.sqrt(192)), rtol=1e-5)
    assert out.shape == (1, 1, 1, 128)


@pytest.mark.parametrize(("heads", "kv"), [(8, 8), (8, 4), (8, 1), (16, 2)])
def test_query_head_h_uses_kv_head_h_over_group(heads, kv):
    q, k = jnp.zeros((1, 1, heads, 2)), jnp.zeros((1, 1, kv, 2))
    v = jnp.arange(kv, dtype=jnp.float32).reshape(1, 1, kv, 1)
    out, _ = attend_by_head(q, k, v, jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32))
    np.testing.assert_array_equal(np.asarray(out)[0, 0, :, 0], np.arange(heads) // (heads // kv))


def test_bfloat16_softmax_is_computed_in_float32():
    rng = np.random.default_rng(5)
    q, k, v = (a.astype(jnp.bfloat16) for a in random_qkv(rng, t=7))
    at = np.tile(np.arange(7), (2, 1))
    out, weights = jit_attend(q, k, v, jnp.asarray(at), jnp.asarray(at))
    expected, exact_weights = loop(q, k, v, at, at)
    assert (out.dtype, weights.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(weights, exact_weights, atol=1e-5)
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=0.02)


# -- with and without a cache ---------------------------------------------------------------------

B = QUERY_BLOCK
LENGTHS = [1, B - 1, B, B + 1, 2 * B + 1]


def positions(length: int, kind: str) -> np.ndarray:
    """[2, length]: a full row from position 3 on, and one with padding."""
    row = np.arange(length)
    padded = {
        "right": np.where(row < length - length // 3, row, -1),
        "left": np.where(row >= length // 3, row + 7, -1),
        "empty": np.full(length, -1),
    }[kind]
    return np.stack([row + 3, padded])


@pytest.mark.parametrize(
    ("length", "window"),
    [(length, window) for length in LENGTHS for window in (None, 100)]
    + [(B + 1, 1), (B + 1, B), (2 * B + 1, B + 200)],
)
def test_tokens_without_a_cache(length, window):
    rng = np.random.default_rng(length)
    q, k, v = random_qkv(rng, t=length, s=length, heads=2, kv=1, dim=4)
    sink = jnp.asarray([1.0, -1.0]) if window else None
    for kind in ("right", "left", "empty"):
        at = jnp.asarray(positions(length, kind))
        got = jit_from_heads(q, k, v, at, window=window, sink=sink)[0]
        expected = jit_attend(q, k, v, at, at, window=window, sink=sink)[0]
        there = np.asarray(at) >= 0
        np.testing.assert_allclose(got[there], expected[there], atol=1e-6)
        assert np.isfinite(got).all()


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("length", [5, 21, B + 30])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_tokens_after_a_cache(length, window, padding):
    """The tokens' own keys and the earlier ones, wherever the cache has them, and padding."""
    rng = np.random.default_rng(length)
    first, heads = (33, 2), {"heads": 2, "kv": 1, "dim": 4}
    total = max(first) + length
    _, k, v = random_qkv(rng, t=1, s=total, **heads)
    q, _, _ = random_qkv(rng, t=length, s=1, **heads)
    slots = total if window is None else window + 8
    at = np.array(first)[:, None] + np.arange(length)
    if padding == "left":
        at[:, : length // 3] = -1
    elif padding == "right":
        at[:, length - length // 3 :] = -1
    earlier = at.max(axis=1, initial=0, where=at >= 0) + 1 - (at >= 0).sum(axis=1)
    cache = LayerCache(jnp.zeros((2, slots, 1, 4)), jnp.zeros((2, slots, 1, 3)))
    ring = window is not None
    for i in range(max(earlier)):  # one after the other, as if they were decoded
        here = jnp.where(i < earlier, i, -1)[:, None]
        both = ((cache.k, k), (cache.v, v))
        cache = LayerCache(*(store(old, a[:, i : i + 1], here, ring=ring) for old, a in both))
    own = np.maximum(at, 0)[..., None, None]
    new_k, new_v = (jnp.take_along_axis(a, own, axis=1) for a in (k, v))
    at = jnp.asarray(at)
    sink = None if window is None else jnp.asarray([0.5, 3.0])
    args = (q, new_k, new_v, at, cache)
    got, _ = jit_from_heads(*args, window=window, sink=sink)
    keys = jnp.broadcast_to(jnp.arange(total), (2, total))
    expected, weights = jit_attend(q, k, v, at, keys, window=window, sink=sink)
    there = np.asarray(at) >= 0
    np.testing.assert_allclose(got[there], expected[there], atol=1e-6)
    same, seen = jit_from_heads(*args, window=window, sink=sink, with_weights=True)
    np.testing.assert_allclose(same[there], expected[there], atol=1e-6)
    # In whichever order and wherever the keys lie.
    seen, weights = (np.sort(np.moveaxis(a, 2, 1)[there]) for a in (seen[:, 0], weights))
    np.testing.assert_allclose(seen[..., -20:], weights[..., -20:], atol=1e-6)


def test_long_prompts_never_hold_all_scores():
    """No array of a windowed prefill has T x S elements."""
    length = 8 * B
    keys = jax.ShapeDtypeStruct((1, length, 1, 4), jnp.float32)
    shapes = (keys, keys, keys)
    at = jax.ShapeDtypeStruct((1, length), jnp.int32)
    for window in (None, 128):

        def f(q, k, v, at, window=window):
            return from_heads(q, k, v, at, window=window)[0]

        sizes = [v.aval.size for e in equations(f, *shapes, at) for v in e.outvars]
        keys = length if window is None else window - 1 + B
        assert max(sizes) <= max(B * keys, length * 8)


# -- the module -----------------------------------------------------------------------------------


EPS = 1e-6
NORM = RMSNorm(32, EPS, "norm", lambda s: jnp.ones(s.shape))


def attention(chunks: int, layer: int = 1, **changes) -> Attention:
    """The attention of a layer of a small model, its weights those of any other chunk count."""
    case = golden.tiny(num_key_value_heads=2, swa_num_key_value_heads=4, **changes)
    config = MiMoConfig.from_dict({**case.config, "dtype": "float32"})
    make = golden.make_from(recipe.make_weights(case), "float32")
    spec = config.layers[layer]
    name = f"model.layers.{layer}.self_attn"
    return Attention(config.hidden_size, spec, 0.707, chunks, name, "plain", make)


@pytest.mark.parametrize("layer", [0, 1])
def test_trap_1_chunked_rows_give_the_heads_in_their_order(layer):
    """The rows' interleaving changes nothing but memory (MODEL_SPEC 5.2, quirk B)."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 6, 32)), jnp.float32)
    at = jnp.arange(6)[None]
    heads = [split(a.projected(x), at, a.heads) for a in (attention(2, layer), attention(1, layer))]
    for got, expected in zip(*heads, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_module_against_a_plain_computation():
    """Norm, projection, rotary, value scale, window, sink and output, in float64 from split
    weights."""
    case = golden.tiny(num_key_value_heads=2, swa_num_key_value_heads=4, sliding_window=3)
    w = {
        name.removeprefix("model.layers.1.self_attn."): value.astype(np.float64)
        for name, value in recipe.make_weights(case).items()
        if name.startswith("model.layers.1.self_attn.")
    }
    stream = np.random.default_rng(1).standard_normal((1, 6, 32))
    x = stream / np.sqrt((stream**2).mean(axis=-1, keepdims=True) + EPS)
    at = np.arange(6)[None]

    def heads(which: str, width: int) -> np.ndarray:
        return (x @ w[f"{which}_proj.weight"].T).reshape(1, 6, -1, width)

    def rotate(y: np.ndarray) -> np.ndarray:
        half = int(24 * 0.334) // 2
        angle = at[..., None] * 1e4 ** (-np.arange(half) / half)
        cos, sin = np.cos(angle)[:, :, None], np.sin(angle)[:, :, None]
        a, b, rest = y[..., :half], y[..., half : 2 * half], y[..., 2 * half :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)

    q, k, v = rotate(heads("q", 24)), rotate(heads("k", 24)), 0.707 * heads("v", 16)
    out, _ = loop(q, k, v, at, at, window=3, sink=w["attention_sink_bias"])
    expected = out.reshape(1, 6, -1) @ w["o_proj.weight"].T
    module = attention(2, sliding_window=3)
    got, cache = module(jnp.asarray(stream, jnp.float32), NORM, jnp.asarray(at), None, Taps())
    assert cache is None
    np.testing.assert_allclose(got, stream + expected, atol=1e-5)


def test_trap_7_value_scale_multiplies_the_output():
    """0.707 itself, not sqrt(1/2); None is no scaling at all."""
    make = random_init(jax.random.key(0), "float32")
    spec = MiMoConfig.from_dict(golden.tiny().config).layers[0]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 6, 32)), jnp.float32)
    at = jnp.arange(6)[None]
    outs = [
        Attention(32, spec, scale, 1, "a", "plain", make)(x, NORM, at, None, Taps())[0] - x
        for scale in (None, 1.0, 0.707)
    ]
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_allclose(outs[2], np.float32(0.707) * outs[0], rtol=1e-5, atol=1e-6)


def test_only_layers_with_sinks_declare_one():
    assert attention(1, layer=0).sink is None
    assert attention(1, layer=1).sink is not None
