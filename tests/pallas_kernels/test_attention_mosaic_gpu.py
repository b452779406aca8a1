"""The Mosaic GPU kernels of `attention`, simulated on a CPU with its detection of races."""

import dataclasses

import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import cases, mosaic_gpu, reference
from pallas_kernels.attention.cases import Case
from pallas_kernels.attention.mosaic_gpu import Config

FINDING_RACES = plgpu.InterpretGPUParams(detect_races=True)
SMALL = {name: case for name, case in cases.SMALL.items() if case.value % 64 == 0}
# Of the two kernels' ways to cut the work.
MORE = {
    # Keys after the tokens, and programs whose tokens are all padding.
    "more keys than tokens see": Case(136, 400, 1, 1, 64, 64, ((3, 0, 100), (40, 0, 175))),
    "fewer keys than tokens see": Case(20, 130, 1, 1, 64, 64, ((200, 0, 219),)),
    "whole blocks after padding": Case(8, 300, 1, 1, 64, 64, ((280, -5, 287),), sink=0.5),
    "a window, three heads, keys from anywhere": Case(
        130, 270, 1, 3, 64, 64, ((503, 373, 632), (-9, -139, 50)), 128, 0.5
    ),
    "a window, one head, larger values": Case(70, 70, 2, 1, 64, 128, ((0, 0, 69),), 128),
    "a window beyond shared memory": Case(140, 300, 1, 1, 64, 64, ((160, 0, 299),), 150, 0.5),
    "a window of itself": Case(66, 66, 1, 2, 64, 64, ((0, 0, 65),), 1),
}


def check(case, config=None):
    args, options = cases.arrays(case, 0)
    q, k, v, *positions = args
    assert mosaic_gpu.unsupported(q, k, v, case.window) is None
    got = mosaic_gpu.attention(*args, **options, config=config, interpret=FINDING_RACES)
    assert not gpu_callbacks.get_races().races_found
    assert got.dtype == jnp.bfloat16
    got, *arrays = (x.astype(jnp.float32) for x in (got, q, k, v))
    expected = reference.attention(*arrays, *positions, **options)
    assert float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected)) < 5e-3
    seen = reference.visible(*positions, sizes=(case.tokens, case.keys), window=case.window)
    assert not got[~seen.any(-1)].any()


@pytest.mark.parametrize("name", SMALL)
def test_cases(name):
    check(SMALL[name])


@pytest.mark.parametrize("name", MORE)
def test_ways_to_cut_the_work(name):
    check(MORE[name])


def test_other_blocks():
    case = dataclasses.replace(SMALL["after cached keys"], sink=None)
    check(case, Config(keys=64, stages=3))


def test_what_they_cannot_do():
    (q, k, v, *rest), _ = cases.arrays(cases.SMALL["one token"], 0)
    assert "multiples of 64" in (mosaic_gpu.unsupported(q, k, v) or "")
    with pytest.raises(NotImplementedError, match="multiples of 64"):
        mosaic_gpu.attention(q, k, v, *rest)
    (q, k, v, *rest), _ = cases.arrays(SMALL["a small window"], 0)
    with pytest.raises(NotImplementedError, match="float32"):
        mosaic_gpu.attention(q.astype(jnp.float32), k, v, *rest)
    assert "larger than 128" in (mosaic_gpu.unsupported(q, k, jnp.tile(v, 3)) or "")
    wide = jnp.tile(q, 6), jnp.tile(k, 6), v
    assert "shared memory" in (mosaic_gpu.unsupported(*wide) or "")
