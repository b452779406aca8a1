"""Random weights, and the simulated TPU, for tests of TPU kernels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import columns, mosaic_tpu
from pallas_kernels.formats import FP8Array, MXFP4Array

# Memory starts as NaN, and copies are watched for races.
SIMULATED = pltpu.InterpretParams(detect_races=True)


def assert_close(got, expected):
    """After a kernel ran on the simulated TPU."""
    assert got.shape == expected.shape
    got, expected = (a.astype(jnp.float32) for a in (got, expected))
    assert jnp.linalg.norm(got - expected) <= 5e-3 * jnp.linalg.norm(expected)
    assert interpreter.races is not None
    assert not interpreter.races.races_found


def mxfp4(shape, seed=0, scales=(117, 121)):
    """Random codes and scale bytes."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (*shape[:-1], shape[-1] // 2), np.uint8)
    bytes_ = rng.integers(scales[0], scales[1] + 1, (*shape[:-1], shape[-1] // 32), np.uint8)
    return MXFP4Array(jnp.asarray(codes), jnp.asarray(bytes_))


def fp8(shape, seed=0, *, nan=False):
    """Random codes, which are NaN only if that is asked for, and scales."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 256, shape, np.uint8)
    if not nan:
        bits = np.where(bits & 0x7F == 0x7F, 0x80, bits)
    blocks = tuple(-(-n // 128) for n in shape[-2:])
    return FP8Array(
        jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.float8_e4m3fn),
        jnp.asarray(rng.random((*shape[:-2], *blocks)), jnp.float32),
    )


def abstract(format, shape, tpu):
    """Shapes of weights that are packed for a TPU."""
    *lead, rows, width = shape
    w = FP8Array(
        jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct((*lead, -(-rows // 128), -(-width // 128)), jnp.float32),
    )
    if format == "mxfp4":
        parts = [jax.ShapeDtypeStruct((*lead, rows, width // n), jnp.uint8) for n in (2, 32)]
        w = MXFP4Array(*parts)
    native = mosaic_tpu.converts_e2m1(tpu.target)
    return jax.eval_shape(lambda w: columns.pack(w, native=native), w)


def with_scales(w, scale):
    """The weights with the same scale byte everywhere."""
    return dataclasses.replace(w, scales=jnp.full_like(w.scales, scale))
