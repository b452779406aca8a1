"""Our safetensors files against the library's."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mimo_jax.checkpoint.safetensors_file import DTYPES, Entry, open_file, write_file


def entry(name: str, array: np.ndarray) -> Entry:
    return Entry(name, array.dtype, array.shape, lambda: array)


def test_library_reads_what_we_write(tmp_path: Path) -> None:
    """Every element type of a checkpoint, with the library's own checks of the header."""
    rng = np.random.default_rng(0)
    arrays = {
        "codes": rng.integers(0, 127, (3, 5), np.uint8).view(ml_dtypes.float8_e4m3fn),
        "bytes": rng.integers(0, 255, (7,), np.uint8),
        "bf16": rng.standard_normal((2, 3)).astype(ml_dtypes.bfloat16),
        "f32": rng.standard_normal((1, 2, 3)).astype(np.float32),
        "empty": np.zeros((0, 4), np.float16),
    }
    path = tmp_path / "x.safetensors"
    write_file(path, [entry(n, a) for n, a in arrays.items()], {"format": "pt", "tp_size": "4"})
    found = dict(safetensors.deserialize(path.read_bytes()))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name]["shape"] == list(array.shape)
        assert DTYPES[found[name]["dtype"]] == array.dtype
        assert bytes(found[name]["data"]) == array.tobytes()
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt", "tp_size": "4"}


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(5, dtype=np.int64),
        "c": np.ones((2, 2), ml_dtypes.bfloat16),
    }
    save_file(arrays, tmp_path / "x.safetensors", {"format": "pt"})
    file, problems = open_file(tmp_path / "x.safetensors", "x.safetensors")
    assert problems == []
    assert file.metadata == {"format": "pt"}
    for name, array in arrays.items():
        read = file.tensors[name].read()
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)


def test_data_is_aligned(tmp_path: Path) -> None:
    """Wider types come first, whatever the order given, as readers that map files need it."""
    arrays = {
        "codes": np.zeros((3,), np.uint8),
        "scales": np.zeros((5,), np.float32),
        "norm": np.zeros((3,), ml_dtypes.bfloat16),
    }
    path = tmp_path / "x.safetensors"
    write_file(path, [entry(n, a) for n, a in arrays.items()], {})
    file, _ = open_file(path, "x")
    for tensor in file.tensors.values():
        assert tensor.start % DTYPES[tensor.dtype].itemsize == 0
    assert list(file.tensors) == ["scales", "norm", "codes"]


@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    first=st.integers(-7, 7),
    last=st.integers(-7, 7),
)
def test_row_ranges(
    shape: list[int], first: int, last: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any range of rows, as numpy slices."""
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    path = tmp_path_factory.mktemp("rows") / "x.safetensors"
    write_file(path, [entry("other", np.ones(3, np.uint8)), entry("a", array)], {})
    file, problems = open_file(path, "x")
    assert problems == []
    np.testing.assert_array_equal(file.tensors["a"].read(slice(first, last)), array[first:last])


def test_rows_are_contiguous_and_read_only(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_file(path, [entry("a", np.arange(6, dtype=np.float32).reshape(3, 2))], {})
    tensor = open_file(path, "x")[0].tensors["a"]
    with pytest.raises(ValueError, match="rows must be contiguous, found step 2"):
        tensor.read(slice(0, 3, 2))
    with pytest.raises(ValueError, match="read-only"):
        tensor.read()[0, 0] = 1.0


def test_arrays_must_be_as_announced(tmp_path: Path) -> None:
    wrong = Entry("a", np.dtype(np.float32), (2,), lambda: np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"a: announced float32 \(2,\), got float32 \(3,\)"):
        write_file(tmp_path / "x.safetensors", [wrong], {})
