"""The Mosaic GPU kernels at the models' sizes compile for Hopper at full speed."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import targets, words
from pallas_kernels.formats import MXFP4Array
from pallas_kernels.moe import cases, mosaic_gpu

ShapeDtype = jax.ShapeDtypeStruct


def mxfp4(*shape: int) -> words.MXFP4Words:
    *lead, rows, columns = shape
    codes = ShapeDtype((*lead, rows, columns // 2), jnp.uint8)
    scales = ShapeDtype((*lead, rows, columns // 32), jnp.uint8)
    return jax.eval_shape(words.pack, MXFP4Array(codes, scales))


@pytest.mark.parametrize("name", ["pro 1", "pro 64", "pro/4 8", "pro 256", "pro 4096", "pro 8192"])
def test_moe(name):
    case = cases.REAL[name]
    e, f, d = case.experts, case.width, case.dim
    program = targets.compile(
        targets.HOPPER,
        mosaic_gpu.moe,
        ShapeDtype((case.tokens, d), jnp.bfloat16),
        ShapeDtype((case.tokens, case.top_k), jnp.float32),
        ShapeDtype((case.tokens, case.top_k), jnp.int32),
        *(mxfp4(e, f, d), mxfp4(e, f, d), mxfp4(e, d, f)),
    )
    form = "_few" if case.tokens <= mosaic_gpu.FEW_TOKENS else ""
    assert {f"moe_gate_up{form}", f"moe_down{form}"} <= set(program.registers)
