"""Weights repacked for TPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_weights import fp8, mxfp4

from pallas_kernels import columns
from pallas_kernels.formats import MXFP4Array


def assert_same(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize("native", [False, True], ids=["bits", "native"])
@pytest.mark.parametrize("shape", [(1, 32), (3, 300, 320), (2, 2, 256, 512)], ids=str)
def test_mxfp4_comes_back(shape, native):
    w = mxfp4(shape, scales=(0, columns.MAX_SCALE))
    packed = columns.pack(w, ("mosaic_tpu",), native=native)
    assert (packed.shape, packed.ndim) == (shape, len(shape))
    assert packed.padded == tuple(-(-n // 256) * 256 for n in shape[-2:])
    assert packed.kernels == ("mosaic_tpu",)
    assert_same(columns.unpack(packed), w)


@pytest.mark.parametrize("shape", [(1, 1), (130, 512), (2, 3, 424, 300)], ids=str)
def test_fp8_comes_back(shape):
    w = fp8(shape, nan=True)
    packed = columns.pack(w)
    assert packed.shape == shape
    assert_same(columns.unpack(packed), w)


@pytest.mark.parametrize("w", [mxfp4((256, 512)), fp8((256, 512))])
def test_packed_bytes_are_those_of_the_checkpoint(w):
    packed = columns.pack(w)
    assert packed.words.nbytes == w.codes.nbytes
    # A byte for 32 codes of MXFP4; of FP8, four for 128 (repeated for each of 128 rows).
    assert packed.scales.nbytes == 256 * 512 // 32


@pytest.mark.parametrize(
    ("scale", "expected"), [(0, False), (252, False), (253, True), (255, True)]
)
def test_scales_that_cannot_be_packed(scale, expected):
    w = MXFP4Array(jnp.zeros((2, 16), jnp.uint8), jnp.array([[0], [scale]], jnp.uint8))
    assert bool(columns.unpackable(w)) == expected
    assert not bool(columns.unpackable(fp8((3, 4))))


def test_parts_of_a_mesh_know_the_whole_shape():
    w = mxfp4((3, 320, 192))
    parts = [columns.pack(MXFP4Array(w.codes, w.scales)) for _ in range(2)]
    whole = jax.tree.map(lambda *a: jnp.concatenate(a, axis=-1), *parts)
    assert whole.shape == (3, 640, 192)
