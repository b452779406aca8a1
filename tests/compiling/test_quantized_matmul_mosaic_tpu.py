import jax
import jax.numpy as jnp
import pytest
from tpu_weights import abstract

from pallas_kernels import targets
from pallas_kernels.quantized_matmul import cases
from pallas_kernels.quantized_matmul.mosaic_tpu import quantized_matmul


@pytest.mark.parametrize("tpu", targets.TPUS, ids=lambda t: t.name)
@pytest.mark.parametrize("case", cases.REAL, ids=lambda c: c.name)
def test_compiles(case, tpu):
    w = abstract(case.format, case.weights, tpu)
    for rows in (1, 64, 8192):
        x = jax.ShapeDtypeStruct((rows, case.weights[-1]), jnp.bfloat16)
        compiled = targets.compile(tpu, lambda x, w: quantized_matmul(x, w), x, w)
        memory = compiled.program.memory_analysis()
        # The product may be rearranged; weights are read as they are, and not copied.
        assert (
            memory.temp_size_in_bytes
            < w.words.size * w.words.dtype.itemsize / 2 + 3 * memory.output_size_in_bytes
        )
