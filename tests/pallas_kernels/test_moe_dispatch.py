"""Rows sorted by expert, and the map of tiles."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.moe.dispatch import BLOCK, group, sizes

# Tokens, experts of each, and experts: few, since each shape is compiled for each of the widths.
SHAPES = (
    (1, 1, 1),
    (1, 4, 12),
    (9, 2, 3),
    (BLOCK // 4, 4, 12),
    (BLOCK // 3 + 1, 3, 5),
    (150, 4, 7),
)
WIDTHS = ((8,), (8, 16, 24), (16, 32, 64), (8, 128))
grouped = jax.jit(group, static_argnums=(1, 2))


@st.composite
def routings(draw):
    tokens, top_k, n_experts = draw(st.sampled_from(SHAPES))
    # Few numbers, so that groups are large and experts idle; some experts are elsewhere.
    low, high = sorted((draw(st.integers(-2, n_experts)), draw(st.integers(-2, n_experts))))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    return rng.integers(low, high + 1, (tokens, top_k)).astype(np.int32), n_experts


@settings(max_examples=100)
@given(routings(), st.sampled_from(WIDTHS))
def test_rows_and_tiles(routing, widths):
    chosen, n_experts = routing
    groups = grouped(jnp.asarray(chosen), n_experts, widths)
    here = (chosen >= 0) & (chosen < n_experts)
    row, token = np.asarray(groups.row), np.asarray(groups.token)
    assert (row[~here] == -1).all()
    assert len(set(row[here])) == here.sum()  # A row of its own for each pair,
    np.testing.assert_array_equal(token[row[here]], np.nonzero(here)[0])  # with its token.
    assert ((token >= 0) & (token < len(chosen))).all()

    expert_of_row = np.full(len(token), -1)
    end = 0
    for t in range(int(groups.tiles[0])):
        start, width = int(groups.tile_row[t]), widths[int(groups.tile_kind[t])]
        assert start == end  # Tiles cover the rows in order.
        assert start % 8 == 0
        expert_of_row[start : start + width] = int(groups.tile_expert[t])
        end = start + width
    assert end == int(groups.rows[0]) <= len(token)
    assert int(groups.tiles[0]) <= len(groups.tile_expert)
    np.testing.assert_array_equal(expert_of_row[row[here]], chosen[here])


@settings(max_examples=100)
@given(routings(), st.sampled_from(WIDTHS))
def test_few_rows_are_padding(routing, widths):
    chosen, n_experts = routing
    groups = grouped(jnp.asarray(chosen), n_experts, widths)
    gap = max(b - a for a, b in zip((0, *widths), widths))
    pairs = int(((chosen >= 0) & (chosen < n_experts)).sum())
    assert int(groups.rows[0]) <= pairs + gap * int(groups.tiles[0])


def test_an_expert_s_group_is_cut_evenly():
    chosen = jnp.zeros((100, 1), jnp.int32)
    groups = group(chosen, 3, (16, 32, 48, 64))
    assert int(groups.tiles[0]) == 2  # of 50 rows each: 64, and not 64 + 48
    assert groups.tile_kind[:2].tolist() == [3, 3]


def test_sizes_of_the_full_model():
    rows, tiles = sizes(4096 * 8, 384, (16, 32, 64, 72, 80, 88, 96, 104, 112))
    assert rows % 16 == 0
    assert (rows, tiles) == (53728, 676)
