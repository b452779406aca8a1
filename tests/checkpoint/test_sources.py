"""Any rectangle of any source is that of the array it stands for, and few other bytes are read."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimo_jax.checkpoint import sources
from mimo_jax.checkpoint.safetensors_file import Entry, StoredTensor, open_file, write_file
from mimo_jax.checkpoint.sources import (
    Cast,
    Dense,
    Held,
    Index,
    Joined,
    Source,
    Tensor,
    Window,
    cut,
    extent,
)
from mimo_jax.quant import FP8Array, MXFP4Array, numpy_dequantize

Folders = pytest.TempPathFactory


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every read of a file."""
    counts, real = [], os.preadv

    def count(file: int, to: Any, at: int) -> int:
        counts.append(real(file, to, at))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", count)
    return counts


def stored(folder: Path, *arrays: np.ndarray) -> list[StoredTensor]:
    names = [f"t{i}" for i in range(len(arrays))]
    entries = [
        Entry(n, a.dtype, a.shape, lambda a=a: a) for n, a in zip(names, arrays, strict=True)
    ]
    path = folder / "x.safetensors"
    write_file(path, entries, {})
    tensors = open_file(path, "x.safetensors")[0].tensors
    return [tensors[name] for name in names]


def tensor(folder: Path, array: np.ndarray, shape: Sequence[int] | None = None) -> Tensor:
    return Tensor(stored(folder, array)[0], array.shape if shape is None else shape, set())


@st.composite
def rectangles(draw: st.DrawFn, shape: Sequence[int]) -> Index:
    ends = [sorted(draw(st.tuples(*[st.integers(0, n)] * 2))) for n in shape]
    return tuple(slice(*e) for e in ends)


shapes = st.lists(st.integers(1, 7), min_size=1, max_size=3)
cubes = st.lists(st.integers(1, 4), min_size=3, max_size=3)
limits = st.sampled_from([1, 8, 64, 1 << 20])


@given(data=st.data(), shape=shapes, step=limits, run=limits)
def test_tensor(
    data: st.DataObject, shape: list[int], step: int, run: int, tmp_path_factory: Folders
) -> None:
    """Whatever shape it is seen in, and whether rows are read whole or not."""
    array = np.arange(np.prod(shape), dtype=np.float32)
    source = tensor(tmp_path_factory.mktemp("t"), array, shape)
    index = data.draw(rectangles(shape))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "STEP", 4 * step)
        patch.setattr(sources, "RUN", run)
        np.testing.assert_array_equal(source.read(index), array.reshape(shape)[index])
        into = np.zeros((*extent(index), 2), np.float32)
        source.read_into(index, into[..., 0])
    np.testing.assert_array_equal(into[..., 0], array.reshape(shape)[index])
    assert not into[..., 1].any()


def tree(data: st.DataObject, shape: list[int], depth: int) -> tuple[np.ndarray, Any]:
    """A random array, and what makes a source of it from a folder of its own."""
    kind = "tensor"
    if depth:
        kind = data.draw(st.sampled_from(["tensor", "held", "joined", "window", "cast"]))
    if kind == "joined":
        axis = data.draw(st.integers(0, len(shape) - 1))
        first = data.draw(st.integers(1, shape[axis]))
        sizes = [first, shape[axis] - first] if first < shape[axis] else [first]
        each = [tree(data, [*shape[:axis], n, *shape[axis + 1 :]], depth - 1) for n in sizes]
        whole = np.concatenate([array for array, _ in each], axis)
        return whole, lambda new: Joined([make(new) for _, make in each], axis)
    if kind == "window":
        array, make = tree(data, [n + 2 for n in shape], depth - 1)
        place = tuple(slice(b, b + n) for n in shape for b in [data.draw(st.integers(0, 2))])
        return array[place], lambda new: Window(make(new), place)
    if kind == "cast":
        array, make = tree(data, shape, depth - 1)
        cast = array.astype(ml_dtypes.bfloat16).astype(np.float32)
        return cast, lambda new: Cast(Cast(make(new), ml_dtypes.bfloat16), np.float32)
    array = np.random.default_rng(data.draw(st.integers(0, 9))).random(shape, np.float32)
    if kind == "held":
        return array, lambda new: Held(array)
    return array, lambda new: tensor(new(), array)


@given(data=st.data(), shape=cubes, step=limits, run=limits)
def test_sources_of_sources(
    data: st.DataObject, shape: list[int], step: int, run: int, tmp_path_factory: Folders
) -> None:
    array, make = tree(data, shape, 3)
    source: Source = make(lambda: tmp_path_factory.mktemp("t"))
    assert (source.shape, source.dtype) == (array.shape, array.dtype)
    np.testing.assert_array_equal(source.read(), array)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "STEP", 4 * step)
        patch.setattr(sources, "RUN", run)
        for _ in range(3):
            index = data.draw(rectangles(array.shape))
            np.testing.assert_array_equal(source.read(index), array[index])


@pytest.mark.parametrize("kind", [FP8Array, MXFP4Array])
@given(data=st.data(), lead=st.integers(0, 2), step=limits)
def test_dense(
    kind: type, data: st.DataObject, lead: int, step: int, tmp_path_factory: Folders
) -> None:
    """Rectangles that begin and end inside of blocks."""
    rng, stack = np.random.default_rng(0), (2,) * lead
    if kind is FP8Array:
        codes = rng.integers(0, 0x7F, (*stack, 300, 160), np.uint8).view(ml_dtypes.float8_e4m3fn)
        scales = rng.uniform(0.1, 9.0, (*stack, 3, 2)).astype(np.float32)
    else:
        codes = rng.integers(0, 256, (*stack, 300, 80), np.uint8)
        scales = rng.integers(100, 130, (*stack, 300, 5), np.uint8)
    files = stored(tmp_path_factory.mktemp("t"), codes, scales)
    parts = [Tensor(t, t.shape, set()) for t in files]
    dtype = data.draw(st.sampled_from([np.float32, ml_dtypes.bfloat16]))
    source = Dense(kind, parts[0], parts[1], dtype)
    assert source.file_bytes == codes.nbytes + scales.nbytes
    expected = numpy_dequantize(kind(codes, scales)).astype(dtype)
    np.testing.assert_array_equal(source.read(), expected)
    index = data.draw(rectangles(source.shape))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "STEP", 1000 * step)
        np.testing.assert_array_equal(source.read(index), expected[index])


@given(
    data=st.data(),
    shape=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    limit=st.integers(1, 300),
)
def test_cut(data: st.DataObject, shape: list[int], limit: int) -> None:
    """Pieces are within the limit, and every element is in one of them."""
    index = data.draw(rectangles(shape))
    count = np.zeros(shape, int)
    for piece in cut(index, 4, limit):
        count[piece] += 1
        assert np.prod(extent(piece)) <= max(1, limit // 4)
    expected = np.zeros(shape, int)
    expected[index] = 1
    np.testing.assert_array_equal(count, expected)


def test_rows_and_long_parts_of_rows_are_all_that_is_read(
    tmp_path: Path, bytes_read: list[int]
) -> None:
    rows, columns = 6, sources.RUN  # bytes
    source = tensor(tmp_path, np.zeros((rows, 2, columns), np.uint8))
    for index, expected in (
        ((slice(1, 3), slice(0, 2), slice(0, columns)), 4 * columns),
        ((slice(1, 3), slice(1, 2), slice(0, columns)), 2 * columns),
        ((slice(1, 2), slice(1, 2), slice(5, 9)), 4),
        ((slice(0, rows), slice(0, 1), slice(0, columns)), rows * columns),
    ):
        bytes_read.clear()
        source.read(index)
        assert sum(bytes_read) == expected


def test_short_parts_of_rows_are_read_with_their_rows(
    tmp_path: Path, bytes_read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call for many rows instead of one for each, and never more rows than wanted."""
    monkeypatch.setattr(sources, "STEP", 5 * 512)
    array = np.random.default_rng(0).integers(0, 255, (100, 512), np.uint8)
    source = tensor(tmp_path, array)
    index = (slice(20, 50), slice(100, 200))
    np.testing.assert_array_equal(source.read(index), array[index])
    assert bytes_read == [5 * 512] * 6


def test_of_joined_sources_only_those_touched_are_read(
    tmp_path: Path, bytes_read: list[int]
) -> None:
    parts = stored(tmp_path, *[np.full((1, 8), i, np.uint8) for i in range(9)])
    source = Joined([Tensor(t, t.shape, set()) for t in parts], 0)
    assert source.file_bytes == 72
    found = source.read((slice(3, 6), slice(0, 8)))
    np.testing.assert_array_equal(found[:, 0], [3, 4, 5])
    assert sum(bytes_read) == 24


def test_damage_is_noticed_where_it_is_read(tmp_path: Path) -> None:
    array = np.ones((4, 8), np.float32)
    array[2, 3] = np.nan
    damaged: set[StoredTensor] = set()
    good, bad = stored(tmp_path, np.ones((4, 8), np.float32), array)
    source = Joined([Tensor(t, (4, 8), damaged) for t in (good, bad)], 0)
    source.read((slice(0, 6), slice(0, 8)))
    assert not damaged
    for index in itertools.pairwise((4, 6, 8)):
        source.read((slice(*index), slice(0, 8)))
    assert damaged == {bad}
