"""TPU kernels of experts: interpreted, with their memory simulated; and lowered."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tpu_weights import SIMULATED, abstract, assert_close, fp8

from pallas_kernels import columns, targets
from pallas_kernels.dequantize import dequantize
from pallas_kernels.moe import cases, mosaic_tpu, reference
from pallas_kernels.moe.mosaic_tpu import Blocks

definition = jax.jit(reference.moe)
pack = jax.jit(columns.pack, static_argnames="native")
MANY = Blocks(rows=16, up_columns=128, up_chunks=1, down_columns=128, down_chunks=1)
# What these are about is nothing to kernels of sorted tokens, or another case has it too.
ONLY_FEW = {"a few", "an odd number of experts", "as many as go without sorting"}


@functools.partial(jax.jit, static_argnames="blocks")
def simulated(*args, blocks=None):
    return mosaic_tpu.moe(*args, interpret=SIMULATED, blocks=blocks)


def check(stacks, given, native=False, blocks=None):
    x, weights, chosen = given
    decoded = [dequantize(w, jnp.float32) for w in stacks]
    expected = definition(x.astype(jnp.float32), weights, chosen, *decoded)
    packed = [pack(w, native=native) if native else pack(w) for w in stacks]
    got = simulated(*given, *packed, blocks=blocks)
    assert got.dtype == jnp.float32
    assert_close(got, expected)


@pytest.mark.parametrize("case", cases.SMALL.values(), ids=cases.SMALL.keys())
def test_few_tokens_against_the_reference(case):
    check(cases.experts(case, 1), cases.tokens(case, 2))


@pytest.mark.parametrize("name", [name for name in cases.SMALL if name not in ONLY_FEW])
def test_many_tokens_against_the_reference(name):
    case = cases.SMALL[name]
    check(cases.experts(case, 1), cases.tokens(case, 2), blocks=MANY)


@pytest.mark.parametrize("blocks", [None, MANY], ids=["few", "many"])
def test_native_codes(blocks):
    case = cases.SMALL["off the tile grid"]
    check(cases.experts(case, 1), cases.tokens(case, 2), native=True, blocks=blocks)


@pytest.mark.parametrize(
    "blocks", [Blocks(0, 128, 1, 256, 1), Blocks(0, 384, 3, 128, 2), Blocks(32, 256, 3, 384, 2)]
)
def test_blocks_of_any_size(blocks):
    """Several blocks in every dimension; the last ones have less than the others."""
    case = cases.Case(24, 768, 512, 3, 2)
    check(cases.experts(case, 3), cases.tokens(case, 4), blocks=blocks)


def test_more_tokens_than_go_without_sorting():
    case = cases.Case(mosaic_tpu.FEW_TOKENS + 1, 256, 256, 4, 2)
    check(cases.experts(case, 5), cases.tokens(case, 6))


@pytest.mark.parametrize("blocks", [None, MANY], ids=["few", "many"])
def test_all_experts_elsewhere(blocks):
    case = cases.SMALL["a few"]
    x, weights, chosen = cases.tokens(case, 2)
    packed = [pack(w) for w in cases.experts(case, 1)]
    for away in (chosen + case.experts, -1 - chosen):
        got = simulated(x, weights, away, *packed, blocks=blocks)
        assert not got.any()


def test_what_experts_compute_of_others_tokens_is_not_looked_at():
    """Expert 0 overflows for every token, and none has chosen it but the first."""
    case = cases.Case(4, 128, 128, 2, 1)
    gate, up, down = cases.experts(case, 1)
    huge = [
        dataclasses.replace(w, scales=w.scales.at[0].set(columns.MAX_SCALE))
        for w in (gate, up, down)
    ]
    x, weights, _ = cases.tokens(case, 2)
    chosen = jnp.array([[0], [1], [1], [1]], jnp.int32)
    packed = [pack(w) for w in huge]
    got = simulated(x, weights, chosen, *packed)
    assert not np.isfinite(got[0]).all()
    expected = definition(x[1:].astype(jnp.float32), weights[1:], chosen[1:], gate, up, down)
    assert_close(got[1:], expected)


@pytest.mark.parametrize("blocks", [None, MANY], ids=["few", "many"])
def test_fp8_experts(blocks):
    case = cases.Case(5, 200, 256, 3, 2)
    stacks = fp8((3, 256, 200), 1), fp8((3, 256, 200), 2), fp8((3, 200, 256), 3)
    check(stacks, cases.tokens(case, 4), blocks=blocks)


@pytest.mark.parametrize("axis", [0, 1], ids=["experts", "width"])
def test_parts_in_shard_map(axis):
    """Every device has half of the experts, or half of the width of each."""
    case = cases.Case(6, 256, 512, 4, 2)
    stacks, (x, weights, chosen) = cases.experts(case, 7), cases.tokens(case, 8)
    mesh = jax.make_mesh((2,), ("part",), (jax.sharding.AxisType.Auto,))
    wide, tall = P(*[None] * axis, "part"), P(*[None] * (2 * axis), "part")

    def part(x, weights, chosen, *stacks):
        if axis == 0:
            chosen = chosen - jax.lax.axis_index("part") * 2
        packed = [columns.pack(w) for w in stacks]
        y = mosaic_tpu.moe(x, weights, chosen, *packed, interpret=SIMULATED)
        return jax.lax.psum(y, "part")

    specs = (P(), P(), P(), wide, wide, tall)
    computed = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    got = jax.jit(computed)(x, weights, chosen, *stacks)
    assert_close(got, definition(x.astype(jnp.float32), weights, chosen, *stacks))


def test_what_they_cannot_do():
    case = cases.SMALL["a few"]
    stacks, (x, weights, chosen) = cases.experts(case, 1), cases.tokens(case, 2)
    packed = [pack(w) for w in stacks]
    assert mosaic_tpu.unsupported(x, chosen, packed[0]) is None
    assert "MXFP4Array" in (mosaic_tpu.unsupported(x, chosen, stacks[0]) or "")
    narrow = columns.pack(fp8((2, 128, 128)))
    assert "128 wide" in (mosaic_tpu.unsupported(x, chosen, narrow) or "")
    with pytest.raises(NotImplementedError, match="float32"):
        mosaic_tpu.moe(x.astype(jnp.float32), weights, chosen, *packed)


@pytest.mark.parametrize("tpu", [targets.V5E, targets.TPU7X], ids=lambda t: t.name)
@pytest.mark.parametrize("case", cases.REAL.values(), ids=cases.REAL.keys())
def test_lowers(case, tpu):
    e, f, d = case.experts, case.width, case.dim
    stacks = [abstract("mxfp4", shape, tpu) for shape in ((e, f, d), (e, f, d), (e, d, f))]
    given = jax.eval_shape(lambda: cases.tokens(case, 0))
    text = targets.lower(tpu, lambda *a: mosaic_tpu.moe(*a), *given, *stacks).as_text()
    assert text.count("tpu_custom_call") == 2
