"""Kernels of lowered programs can be read, whatever backend they are of."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import targets
from pallas_kernels.attention import mosaic_gpu, mosaic_tpu, triton
from pallas_kernels.reading import kernels

Shape = jax.ShapeDtypeStruct
SIZES = {"q": (1, 256, 2, 4, 64), "k": (1, 256, 2, 64), "v": (1, 256, 2, 64)}


def lowered(hardware, attention):
    arrays = [Shape(shape, jnp.bfloat16) for shape in SIZES.values()]
    spans = [Shape((1,), jnp.int32)] * 3
    return targets.lower(hardware, lambda *a: attention(*a, window=None), *arrays, *spans)


@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("hardware", "module", "backend", "product"),
    [
        (targets.HOPPER, triton, "triton", "tt.dot"),
        (targets.HOPPER, mosaic_gpu, "mosaic_gpu", "llvm.inline_asm"),
        (targets.V6E, mosaic_tpu, "mosaic_tpu", "tpu.matmul"),
    ],
    ids=["triton", "mosaic_gpu", "mosaic_tpu"],
)
def test_attention(hardware, module, backend, product):
    program = lowered(hardware, module.attention)
    (found,) = kernels(program)
    assert found.backend == backend
    assert found.operations[product] > 0
    assert found.operations.total() > 100
    assert found.text.startswith(("module", "#"))
    assert 1000 < found.nbytes < len(program.as_text())
    if backend == "mosaic_gpu":
        assert "wgmma" in found.text


def test_plain_xla_has_none():
    program = targets.lower(targets.V6E, jnp.dot, *[Shape((8, 8), jnp.float32)] * 2)
    assert kernels(program) == []
