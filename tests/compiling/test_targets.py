"""The checks of compiled kernels find what they are for."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plt

from pallas_kernels import targets


def triton_softmax(x, warps):
    def kernel(x_ref, out_ref):
        y = jnp.exp(x_ref[...].astype(jnp.float32))
        out_ref[...] = (y / y.sum()).astype(x.dtype)

    params = plt.CompilerParams(num_warps=warps)
    return pl.pallas_call(kernel, out_shape=x, compiler_params=params)(x)


def mosaic_gpu_exp(x):
    def kernel(x_ref, out_ref, tile, barrier):
        plgpu.copy_gmem_to_smem(x_ref, tile, barrier)
        plgpu.barrier_wait(barrier)
        y = plgpu.load(tile, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        tile[...] = (y * jnp.exp(y) + jnp.sin(y)).astype(tile.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, out_ref)
        plgpu.wait_smem_to_gmem(0)

    transforms = (
        plgpu.TilingTransform((8, 64)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
    )
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[plgpu.SMEM(x.shape, x.dtype, transforms=transforms), plgpu.Barrier()],
    )(x)


def square(n):
    return jax.ShapeDtypeStruct((n, n), jnp.bfloat16)


@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
def test_triton_kernels_that_spill_are_refused():
    def one_warp(x):
        return triton_softmax(x, 1)

    targets.compile(targets.HOPPER, lambda x: triton_softmax(x, 8), square(128))
    with pytest.raises(targets.RegisterSpillError):
        targets.compile(targets.HOPPER, one_warp, square(128))
    targets.compile(targets.HOPPER, one_warp, square(128), spills=True)


def test_mosaic_gpu_kernels_that_spill_are_refused():
    assert targets.compile(targets.HOPPER, mosaic_gpu_exp, square(64)).registers["kernel"] < 255
    for _ in range(2):  # compiled, and remembered
        with pytest.raises(targets.RegisterSpillError, match=r"[1-9]\d* bytes spill stores"):
            targets.compile(targets.HOPPER, mosaic_gpu_exp, square(128))
    many = targets.compile(targets.HOPPER, mosaic_gpu_exp, square(128), spills=True)
    assert many.registers == {"kernel": 255}


@pytest.mark.parametrize("tpu", targets.TPUS, ids=lambda t: t.name)
def test_tpu_kernels_know_the_generation_and_its_memory(tpu):
    generations = []

    def kernel(x_ref, out_ref, scratch):
        generations.append(pltpu.get_tpu_info().generation)
        scratch[0] = x_ref[...]
        out_ref[...] = scratch[0]

    def copy(x, pages):
        return pl.pallas_call(
            kernel,
            out_shape=x,
            scratch_shapes=[pltpu.VMEM((pages, *x.shape), x.dtype)],
            compiler_params=pltpu.CompilerParams(vmem_limit_bytes=2**30),
        )(x)

    targets.compile(tpu, lambda x: copy(x, 1), square(1024))
    assert generations[0] == {"v5e": 5, "v5p": 5, "v6e": 6, "tpu7x": 7}[tpu.name]
    with pytest.raises(jax.errors.JaxRuntimeError, match="space=vmem"):
        targets.compile(tpu, lambda x: copy(x, 96), square(1024))
