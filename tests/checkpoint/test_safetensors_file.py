"""Our safetensors files against the library's."""

import gc
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
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
        read = np.empty(array.shape, DTYPES[file.tensors[name].dtype])
        file.tensors[name].read_into(0, read)
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


def test_any_range_is_read_into_memory_given(tmp_path: Path) -> None:
    array = np.arange(35, dtype=np.float32).reshape(5, 7)
    path = tmp_path / "x.safetensors"
    write_file(path, [entry("other", np.ones(3, np.uint8)), entry("a", array)], {})
    tensor = open_file(path, "x")[0].tensors["a"]
    for first in range(36):
        for size in range(36 - first):
            out = np.zeros(size, np.float32)
            tensor.read_into(first, out)
            np.testing.assert_array_equal(out, array.reshape(-1)[first : first + size])


def test_reads_that_are_cut_short_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operating system may give fewer bytes than asked for: 2 GB at most, less on a signal."""
    array = np.arange(35, dtype=np.float32)
    path = tmp_path / "x.safetensors"
    write_file(path, [entry("a", array)], {})
    tensor, real = open_file(path, "x")[0].tensors["a"], os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, to, at: real(file, [to[0][:11]], at))
    out = np.zeros(35, np.float32)
    tensor.read_into(0, out)
    np.testing.assert_array_equal(out, array)


def test_a_file_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_file(path, [entry("a", np.arange(6, dtype=np.float32))], {})
    tensor = open_file(path, "x")[0].tensors["a"]
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(OSError, match=r"x.safetensors ends at byte .*, inside of a"):
        tensor.read_into(0, np.zeros(6, np.float32))


@pytest.mark.parametrize("out", [np.zeros(4), np.zeros((4, 2), np.float32)[:, 0]])
def test_reads_into_contiguous_memory_of_its_type(out: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_file(path, [entry("a", np.arange(6, dtype=np.float32))], {})
    with pytest.raises(ValueError, match="a: needs a contiguous array of float32"):
        open_file(path, "x")[0].tensors["a"].read_into(0, out)


def test_files_are_closed_with_their_last_tensor(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_file(path, [entry("a", np.arange(6, dtype=np.float32))], {})
    tensor = open_file(path, "x")[0].tensors["a"]
    descriptor = tensor.file.descriptor
    os.fstat(descriptor)
    del tensor
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_arrays_must_be_as_announced(tmp_path: Path) -> None:
    wrong = Entry("a", np.dtype(np.float32), (2,), lambda: np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"a: announced float32 \(2,\), got float32 \(3,\)"):
        write_file(tmp_path / "x.safetensors", [wrong], {})
