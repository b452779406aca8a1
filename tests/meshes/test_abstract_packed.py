"""A model of shapes only is, on a mesh, what a real one becomes for the same kernels."""

import dataclasses

import jax
import pytest

from mimo_jax import checkpoint
from mimo_jax.config import MiMoConfig
from mimo_jax.model.packing import abstract_packed, use_kernels
from mimo_jax.model.parameters import parameters
from mimo_jax.portability.places import HARDWARE
from mimo_jax.quant import FP8Array, MXFP4Array
from pallas_kernels.backends import REFERENCE, resolve
from pallas_kernels.mosaic_tpu import converts_e2m1
from pallas_kernels.packed import Packed
from sharding.mesh import make_mesh

# A dense layer and one of experts, with Pro's heads and formats.
CONFIG = dataclasses.replace(
    MiMoConfig.from_pretrained("MiMo-V2.5-Pro-FP4-DFlash").truncated(2),
    **{"vocab_size": 256, "hidden_size": 512, "intermediate_size": 1024},
    **{"moe_intermediate_size": 512, "n_routed_experts": 8, "num_experts_per_tok": 2},
)


@pytest.mark.parametrize("mesh", ["", "tensor=8", "expert=2,tensor=4"])
@pytest.mark.parametrize(
    ("target", "kernels"),
    [
        ("hopper", "auto"),
        ("v5e", "auto"),
        ("tpu7x", "auto"),
        ("ampere", "triton"),
        ("v4", REFERENCE),
    ],
)
def test_shapes_are_those_of_the_real_one(target, kernels, mesh):
    on = HARDWARE[target].target
    allowed, native = resolve(kernels, on), converts_e2m1(on)
    loaded = checkpoint.random_weights(CONFIG, 0, mesh=make_mesh(mesh) if mesh else None)
    use_kernels(loaded.model, allowed, native_e2m1=native)
    shapes = abstract_packed(CONFIG, allowed, loaded.placement, native_e2m1=native)
    real, made = [*parameters(loaded.model)], [*parameters(shapes)]
    assert [name for name, _ in real] == [name for name, _ in made]
    for (name, is_), (_, would_be) in zip(real, made, strict=True):
        arrays, tree = jax.tree.flatten(is_.get_value())
        structs, same = jax.tree.flatten(would_be.get_value())
        assert same == tree, name  # which kernels they are packed for is in it
        for array, struct in zip(arrays, structs, strict=True):
            assert (struct.shape, struct.dtype) == (array.shape, array.dtype), name
            if mesh:
                assert struct.sharding.is_equivalent_to(array.sharding, array.ndim), name
    kinds = [type(p.get_value()) for _, p in real]
    assert any(issubclass(k, Packed) for k in kinds) == (kernels != REFERENCE)
    assert any(k in (FP8Array, MXFP4Array) for k in kinds) or kernels != REFERENCE
