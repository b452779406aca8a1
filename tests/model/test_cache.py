"""Cached decoding equals the parallel forward, whatever was drafted and rejected on the way."""

import dataclasses
import functools
from collections.abc import Sequence

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimo_jax.config import MiMoConfig
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.cache import KVCache, LayerCache, init_cache
from pallas_kernels.attention.reference import QUERY_BLOCK
from pallas_kernels.decode_attention.reference import slot_positions
from pallas_kernels.rotate_and_store.reference import store

SLACK = 8
LENGTH = 48
VOCAB = 64


@functools.cache
def model(window: int = 5) -> MiMo:
    return golden.build(golden.tiny(sliding_window=window, max_position_embeddings=1024))


@functools.cache
def tokens(length: int = LENGTH, rows: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(length).integers(0, VOCAB, (rows, length)), jnp.int32)


@functools.cache
def parallel(window: int = 5, length: int = LENGTH, rows: int = 1) -> np.ndarray:
    """Logits [rows, length, vocab] without a cache."""
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    return np.asarray(golden.step(model(window), tokens(length, rows), positions, None)[0])


def run(model: MiMo, cache: KVCache, ids: jax.Array, start: int) -> tuple[np.ndarray, KVCache]:
    """One cached step of [rows, T] tokens from position `start` on."""
    positions = jnp.broadcast_to(start + jnp.arange(ids.shape[1]), ids.shape)
    logits, cache = golden.step(model, ids, positions, cache)
    return np.asarray(logits), cache


def run_all(window: int, widths: Sequence[int], slack: int = SLACK) -> np.ndarray:
    """Logits of `tokens(sum(widths))` in consecutive steps of the given widths."""
    length = sum(widths)
    cache = init_cache(model(window).config, 1, max(length, LENGTH), slack=slack)
    ids, start, parts = tokens(length), 0, []
    for width in widths:
        logits, cache = run(model(window), cache, ids[:, start : start + width], start)
        parts.append(logits)
        start += width
    return np.concatenate(parts, axis=1)


def assert_same(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max(initial=1), rtol=0)


# -- cached equals parallel -----------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 5, 16])
@pytest.mark.parametrize("width", [1, 3, 8])
def test_steps_equal_the_parallel_forward(window, width):
    assert_same(run_all(window, [12, 12] + [width] * (24 // width)), parallel(window))


def test_first_step_may_be_a_single_token():
    assert_same(run_all(5, [1] * 12 + [3] * 12), parallel(5))


@pytest.mark.parametrize("width", [SLACK + 1, SLACK + 2])
def test_chunks_around_the_slack(width):
    """From slack + 2 tokens on, a ring cannot hold what the first and the last of them need."""
    widths = [width] * ((LENGTH - 12) // width)
    assert_same(run_all(5, [*widths, 12, *[1] * (36 - sum(widths))]), parallel(5))


def test_no_slack_is_enough_without_rejections():
    assert_same(run_all(5, [12, 12, 1, 1, 1, 3, 3, 3, 12], slack=0), parallel(5))


@pytest.mark.parametrize("window", [5, 128])
def test_prompts_longer_than_a_query_block(window):
    """They go through it in blocks, with an empty and with a filled ring before them."""
    widths = (QUERY_BLOCK + 44, 20, QUERY_BLOCK + 44)
    assert_same(run_all(window, widths), parallel(window, sum(widths)))


# -- rejected drafts ------------------------------------------------------------------------------

WIDTHS = (1, 3, 8, 12)


@st.composite
def drafts(draw) -> tuple[int, int, int]:
    """(width of a step, tokens of it that are kept, seed of the wrong ones).

    At most SLACK tokens of a step are rejected, which may be all of them.
    """
    width = draw(st.sampled_from(WIDTHS))
    return width, draw(st.integers(max(0, width - SLACK), width)), draw(st.integers(0, 999))


@given(st.lists(drafts(), min_size=3, max_size=12))
def test_rejected_tokens_leave_no_trace(steps):
    ids, m = tokens(), model()
    _, cache = run(m, init_cache(m.config, 1, LENGTH, slack=SLACK), ids[:, :12], 0)
    start = 12
    for width, kept, seed in steps:
        if start + width > LENGTH:
            break
        wrong = np.random.default_rng(seed).integers(0, VOCAB, (1, width - kept))
        step = jnp.concatenate([ids[:, start : start + kept], wrong], axis=1, dtype=jnp.int32)
        logits, cache = run(m, cache, step, start)
        assert_same(logits[:, :kept], parallel()[:, start : start + kept])
        start += kept
    logits, _ = run(m, cache, ids[:, start : start + 1], start)
    assert_same(logits, parallel()[:, start : start + 1] if start < LENGTH else logits)


def test_rejecting_more_than_the_slack_loses_keys():
    """The bound of the property above is the real one, so it is tested and not just met."""
    m, ids = model(), tokens()
    cache = init_cache(m.config, 1, LENGTH, slack=0)
    _, cache = run(m, cache, ids[:, :12], 0)
    wrong = (ids[:, 13:24] + 1) % VOCAB
    _, cache = run(m, cache, jnp.concatenate([ids[:, 12:13], wrong], axis=1), 12)
    logits, _ = run(m, cache, ids[:, 13:14], 13)
    assert np.abs(logits - parallel()[:, 13:14]).max() > 0.01


# -- rows of a batch ------------------------------------------------------------------------------


def test_rows_at_different_positions():
    """Each row equals itself alone, at its own position, in every step."""
    m, rows, full = model(), tokens(LENGTH, 3), parallel(rows=3)
    prompt = np.array([12, 9, 1])
    columns = np.arange(12)[None]
    at = jnp.asarray(np.where(columns < prompt[:, None], columns, -1))
    logits, cache = golden.step(m, rows[:, :12], at, init_cache(m.config, 3, LENGTH, slack=SLACK))
    for row, length in enumerate(prompt):
        assert_same(np.asarray(logits)[row, :length], full[row, :length])
    position = prompt.copy()
    for width in (3, 3, 12, 1):
        at = position[:, None] + np.arange(width)
        ids = jnp.take_along_axis(rows, jnp.asarray(at), axis=1)
        logits, cache = golden.step(m, ids, jnp.asarray(at), cache)
        for row in range(3):
            assert_same(np.asarray(logits)[row], full[row, at[row]])
        # Rows keep different numbers of tokens.
        position += np.array([width, width - width // 3, max(1, width - SLACK)])


@pytest.mark.parametrize("width", [1, 12])
def test_inactive_rows_keep_their_cache(width):
    m, rows = model(), tokens(LENGTH, 3)
    _, before = run(m, init_cache(m.config, 3, LENGTH, slack=SLACK), rows[:, :12], 0)
    at = jnp.broadcast_to(12 + jnp.arange(width), (3, width)).at[1].set(-1)
    logits, after = golden.step(m, rows[:, 12 : 12 + width], at, before)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(new[1], old[1])
        assert (np.asarray(new[0]) != np.asarray(old[0])).any()
    assert np.isfinite(logits).all()
    for row in (0, 2):
        assert_same(np.asarray(logits)[row], parallel(rows=3)[row, 12 : 12 + width])
    logits, _ = golden.step(m, rows[:, 12 : 12 + width], 12 + 0 * at + jnp.arange(width), after)
    assert_same(np.asarray(logits)[1], parallel(rows=3)[1, 12 : 12 + width])


# -- slots ----------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.lists(st.integers(-1, 60), min_size=1, max_size=5))
def test_ring_slots_hold_the_last_position_written(slots, newest):
    """Against a ring that is written position by position."""
    got = np.asarray(slot_positions(jnp.asarray(newest), slots, ring=True))
    for row, last in enumerate(newest):
        ring = np.full(slots, -1)
        for position in range(last + 1):
            ring[position % slots] = position
        np.testing.assert_array_equal(np.where(got[row] >= 0, got[row], -1), ring)


def test_full_slots_hold_their_own_position():
    got = slot_positions(jnp.asarray([-1, 3]), 4, ring=False)
    np.testing.assert_array_equal(got, [[0, 1, 2, 3]] * 2)


def layer_cache(slots: int, rows: int = 1) -> LayerCache:
    return LayerCache(jnp.full((rows, slots, 1, 2), -1.0), jnp.full((rows, slots, 1, 1), -1.0))


def write_positions(cache: LayerCache, positions: Sequence[Sequence[int]], ring: bool) -> list:
    """Writes each token's position as its key and value; returns what each slot's value is."""
    at = jnp.asarray(positions, jnp.int32)
    numbers = at.astype(jnp.float32)[..., None, None]
    new = ((cache.k, jnp.tile(numbers, 2)), (cache.v, numbers))
    written = LayerCache(*(store(old, a, at, ring=ring) for old, a in new))
    np.testing.assert_array_equal(written.k[..., 0], written.v[..., 0])
    return np.asarray(written.v[..., 0, 0]).astype(int).tolist()


def test_write_touches_only_the_slots_of_its_tokens():
    full = write_positions(layer_cache(5, 2), [[2, 3, -1], [-1, -1, 0]], ring=False)
    assert full == [[-1, -1, 2, 3, -1], [0, -1, -1, -1, -1]]
    ring = write_positions(layer_cache(4, 2), [[6, 7, 8], [-1, -1, 3]], ring=True)
    assert ring == [[8, -1, 6, 7], [-1, -1, -1, 3]]


def test_positions_past_the_capacity_are_dropped():
    assert write_positions(layer_cache(3), [[1, 2, 3]], ring=False) == [[-1, 1, 2]]
    assert write_positions(layer_cache(3), [[3, 4, 5]], ring=False) == [[-1, -1, -1]]


@pytest.mark.parametrize("length", [4, 5, 9, 13])
def test_long_writes_keep_the_newest(length):
    """In whichever order a backend scatters them, which the order of the tokens stands for."""
    for order in (range(length), reversed(range(length))):
        ring = write_positions(layer_cache(4), [list(order)], ring=True)[0]
        assert sorted(ring) == list(range(length - 4, length))
        assert all(position % 4 == slot for slot, position in enumerate(ring))


# -- the cache itself -----------------------------------------------------------------------------


@pytest.mark.parametrize("max_len", [0, -1, 1025])
def test_impossible_length_is_refused(max_len):
    with pytest.raises(ValueError, match=rf"{max_len} is outside 1\.\.1024.*max_position"):
        init_cache(model().config, 1, max_len)


def test_negative_slack_is_refused():
    with pytest.raises(ValueError, match="slack=-1"):
        init_cache(model().config, 1, 10, slack=-1)


def test_step_changes_neither_model_nor_cache():
    m = model()
    cache = init_cache(m.config, 1, LENGTH, slack=SLACK)
    structure = jax.tree.structure((m, cache))
    leaves = jax.tree.leaves((m, cache))
    copies = [np.array(leaf) for leaf in leaves]
    # Traced without jit, so that a module or cache that is written to would keep what is written.
    _, updated = jax.eval_shape(lambda ids: m(ids, jnp.arange(4)[None], cache), tokens()[:, :4])
    assert jax.tree.structure((m, cache)) == structure
    assert all(a is b for a, b in zip(jax.tree.leaves((m, cache)), leaves, strict=True))
    for leaf, copy in zip(leaves, copies, strict=True):
        np.testing.assert_array_equal(leaf, copy)
    assert jax.tree.structure(updated) == jax.tree.structure(cache)
    assert jax.tree.map(jnp.shape, updated) == jax.tree.map(jnp.shape, cache)


def cache_bytes(config: MiMoConfig, max_len: int) -> dict[str, int]:
    """Bytes of the layers of either kind, for one sequence."""
    cache = jax.eval_shape(lambda: init_cache(config, 1, max_len))
    sizes = {"full": 0, "sliding": 0}
    for spec, layer in zip(config.layers, cache.layers, strict=True):
        sizes[spec.kind] += sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(layer))
    return sizes


@pytest.mark.parametrize(
    ("name", "full", "sliding"),
    [("MiMo-V2-Flash", 23_040, 199_680), ("MiMo-V2.5-Pro", 51_200, 307_200)],
)
def test_bytes_of_the_release_caches(name, full, sliding):
    """Bytes a token as in MODEL_SPEC 2.14; sliding layers stay at 128 + 128 slots."""
    config = MiMoConfig.from_pretrained(name)
    for max_len in (1, 1000, 262_144):
        assert cache_bytes(config, max_len) == {"full": full * max_len, "sliding": sliding * 256}


def test_dtype_of_the_cache():
    config = dataclasses.replace(model().config, dtype="bfloat16")
    assert {a.dtype for a in jax.tree.leaves(init_cache(config, 1, 4))} == {jnp.dtype("bfloat16")}
    cache = init_cache(config, 1, 4, dtype="float32")
    assert {a.dtype for a in jax.tree.leaves(cache)} == {jnp.dtype("float32")}


def test_trap_7_cached_values_are_scaled():
    """V enters the cache multiplied by `attention_value_scale` (MODEL_SPEC 2.5)."""
    case = golden.tiny(sliding_window=5)
    caches = []
    for scale in (None, 0.612):
        m = golden.build(case, attention_value_scale=scale)
        caches.append(run(m, init_cache(m.config, 1, 8), tokens()[:, :8], 0)[1].layers[0])
    np.testing.assert_allclose(caches[1].v, 0.612 * caches[0].v, rtol=1e-6)
    np.testing.assert_array_equal(caches[1].k, caches[0].k)
