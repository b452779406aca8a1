import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tpu_weights import abstract

from pallas_kernels import targets
from pallas_kernels.moe import cases, mosaic_tpu

CASES = ["pro 1", "pro 8", "pro 64", "pro 8192", "pro/4 8", "pro/4 4096", "flash 8", "flash 4096"]


def arguments(case, tpu):
    e, f, d = case.experts, case.width, case.dim
    stacks = [abstract("mxfp4", shape, tpu) for shape in ((e, f, d), (e, f, d), (e, d, f))]
    return jax.eval_shape(lambda: cases.tokens(case, 0)), stacks


@pytest.mark.parametrize("tpu", targets.TPUS, ids=lambda t: t.name)
@pytest.mark.parametrize("name", CASES)
def test_compiles(name, tpu):
    given, stacks = arguments(cases.REAL[name], tpu)
    compiled = targets.compile(tpu, lambda *a: mosaic_tpu.moe(*a), *given, *stacks)
    if cases.REAL[name].tokens <= mosaic_tpu.FEW_TOKENS:
        # No weights are copied to another layout.
        temporary = compiled.program.memory_analysis().temp_size_in_bytes
        assert temporary < stacks[0].words.size


@pytest.mark.parametrize("tpu", targets.TPUS, ids=lambda t: t.name)
@pytest.mark.parametrize("name", ["pro 8", "flash 4096"])
def test_compiles_with_parts_of_the_experts_on_each_device(name, tpu):
    given, stacks = arguments(cases.REAL[name], tpu)
    devices = np.array(tpu.devices())
    mesh = Mesh(devices, ("expert",), axis_types=(AxisType.Auto,))

    def part(x, weights, chosen, *stacks):
        here = chosen - jax.lax.axis_index("expert") * stacks[0].shape[0]
        return jax.lax.psum(mosaic_tpu.moe(x, weights, here, *stacks), "expert")

    specs = (P(), P(), P(), P("expert"), P("expert"), P("expert"))
    computed = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    placed = [
        targets.placed(tree, NamedSharding(mesh, spec))
        for tree, spec in zip((*given, *stacks), specs)
    ]
    compiled = targets.compile(tpu, computed, *placed, mesh=mesh).program
    stored = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(stacks))
    on_a_device = compiled.memory_analysis().argument_size_in_bytes
    assert on_a_device < 1.1 * stored / len(devices)
