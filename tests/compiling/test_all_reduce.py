"""Sums over devices compile for hosts of Hoppers, as one kernel each, and no register spills."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import targets
from pallas_kernels.all_reduce import all_reduce
from pallas_kernels.all_reduce.exchange import Exchange, size

VALUES = 32 * 6144


@pytest.mark.parametrize("tokens", [1, 32])
@pytest.mark.parametrize(
    ("sizes", "axes"),
    [
        ({"tensor": 2}, ("tensor",)),
        ({"data": 2, "expert": 2, "tensor": 2}, ("expert", "tensor")),
    ],
    ids=["all", "four of eight"],
)
def test_at_real_sizes(sizes, axes, tokens):
    count = int(np.prod([*sizes.values()]))
    hardware = dataclasses.replace(targets.HOPPER, topology=f"1x1x{count}")
    devices = np.array(hardware.devices()).reshape(*sizes.values())
    mesh = Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    group = int(np.prod([sizes[axis] for axis in axes]))
    words = jax.ShapeDtypeStruct((count, size(group, VALUES)), jnp.uint32)
    exchange = Exchange(words, axes, VALUES)
    shape = (count, tokens, 6144)
    arrays = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    each = P(tuple(sizes))

    def twice(y, residual, exchange):
        for _ in range(2):
            residual = all_reduce(y, residual, exchange, axes=axes, kernels=("mosaic_gpu",))
        return residual

    specs = jax.tree.map(lambda _: each, (*arrays, exchange))
    f = jax.shard_map(twice, mesh=mesh, in_specs=specs, out_specs=each, check_vma=False)
    placed = targets.placed((*arrays, exchange), NamedSharding(mesh, each))
    compiled = targets.compile(hardware, f, *placed, mesh=mesh)
    text = compiled.program.as_text()
    assert text.count('custom_call_target="mosaic_gpu_v2"') == 2
    assert " all-reduce" not in text
    # What other devices write into is the argument itself, and never a copy of it.
    assert " copy(" not in text
    assert compiled.program.memory_analysis().temp_size_in_bytes < words.shape[1]
