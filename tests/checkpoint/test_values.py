"""Values are checked a piece at a time, and copied from devices without more than is wanted."""

import tracemalloc
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mimo_jax.checkpoint import values
from mimo_jax.checkpoint.safetensors_file import Entry, StoredTensor, open_file, write_file


def stored(folder: Path, name: str, array: np.ndarray) -> StoredTensor:
    path = folder / "x.safetensors"
    write_file(path, [Entry(name, array.dtype, array.shape, lambda: array)], {})
    return open_file(path, "x.safetensors")[0].tensors[name]


def check(folder: Path, name: str, array: np.ndarray) -> tuple[str, str] | None:
    """What is wrong with a stored array; `any_wrong` must agree."""
    problem = values.bad_values(stored(folder, name, array))
    assert values.any_wrong(name, array) == (problem is not None)
    if problem is None:
        return None
    assert (problem.kind, problem.tensor, problem.file) == ("bad values", name, "x.safetensors")
    return problem.found, problem.expected


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "PIECE_BYTES", 64)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_bad_values_in_several_pieces(dtype: type, tmp_path: Path) -> None:
    array = np.ones((20, 30), dtype)
    assert check(tmp_path, "w", array) is None
    array[3, 7] = np.inf
    array[3, 8] = np.nan
    array[19, 29] = -np.inf
    expected = "3 of 600 values (inf at [3, 7])", "finite numbers"
    assert check(tmp_path, "w", array) == expected


@pytest.mark.usefixtures("small_pieces")
def test_every_float8_and_scale_byte(tmp_path: Path) -> None:
    every = np.arange(256, dtype=np.uint8)
    for byte in every:
        for name, dtype in (("w", ml_dtypes.float8_e4m3fn), ("w_scale", np.uint8)):
            one = np.full(1, byte).view(dtype)
            nan = byte & 0x7F == 0x7F if name == "w" else byte in (0, 255)
            assert values.any_wrong(name, one) == nan
    found = check(tmp_path, "w", every.view(ml_dtypes.float8_e4m3fn))
    assert found == ("2 of 256 values (nan at [127])", "codes other than NaN")
    assert not values.any_wrong("w", every[:0x7F].view(ml_dtypes.float8_e4m3fn))
    assert not values.any_wrong("w_scale", every[1:255])
    found = check(tmp_path, "w_scale", every)
    assert found == ("2 of 256 values (0 at [0])", "exponent bytes other than 0 and 255")
    assert check(tmp_path, "w", every) is None


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_float_of_two_bytes(dtype: type) -> None:
    every = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(dtype)
    finite = np.isfinite(every)
    assert not values.any_wrong("w", every[finite])
    for one in every[~finite]:
        assert values.any_wrong("w", np.full(3, one))


@pytest.mark.parametrize("bad", [0.0, -0.0, -1.0, np.inf, -np.inf, np.nan, -np.nan])
def test_multipliers(bad: float) -> None:
    good = np.array([np.finfo(np.float32).tiny, 1e-45, 1.0, np.finfo(np.float32).max], np.float32)
    assert not values.any_wrong("w_scale_inv", good)
    assert values.any_wrong("w_scale_inv", np.append(good, np.float32(bad)))
    assert values.any_wrong("w", np.append(good, np.float32(bad))) == (not np.isfinite(bad))


@pytest.mark.parametrize("spec", [(), ("a",), (None, "b"), ("b", "a"), (("a", "b"),)])
@pytest.mark.parametrize("within", [True, False])
def test_to_host(spec: Any, within: bool) -> None:
    """Whole arrays and items of stacks, however they are split, inside of a mesh and outside."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    array = np.arange(8 * 4 * 3, dtype=np.float32).reshape(8, 4, 3)
    placed = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    with jax.set_mesh(mesh if within else values.NO_MESH):
        np.testing.assert_array_equal(values.to_host(placed), array)
        for i in range(8):
            np.testing.assert_array_equal(values.to_host(placed, i), array[i])


def test_an_item_of_a_stack_needs_memory_for_that_item() -> None:
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Explicit,))
    array = np.zeros((8, 1 << 20), np.uint8)
    for spec in (("a",), (None, "a")):
        placed = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
        values.to_host(placed, 3)
        tracemalloc.start()
        values.to_host(placed, 4)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 3 << 20


def test_to_host_of_one_device_and_of_none() -> None:
    array = np.arange(6, dtype=np.uint8).reshape(3, 2)
    for held in (array, jax.numpy.asarray(array)):
        np.testing.assert_array_equal(values.to_host(held), array)
        np.testing.assert_array_equal(values.to_host(held, 2), array[2])
