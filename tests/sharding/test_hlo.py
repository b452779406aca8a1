"""Collectives read from the text of compiled programs: made here, and printed by other backends."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sharding.hlo import KINDS, Collective, collectives, summarize


def compiled(program, *shapes_and_specs, shape=(2, 4), names=("data", "tensor")) -> str:
    """The optimised text of a program of eight devices."""
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Explicit,) * len(shape))
    with jax.set_mesh(mesh):
        args = [jax.device_put(jnp.ones(size), P(*spec)) for size, spec in shapes_and_specs]
        text = jax.jit(program).lower(*args).compile().as_text()
    assert text is not None
    return text


def one(line: str, header: str = "HloModule m, num_partitions=8") -> Collective:
    [found] = collectives(f"{header}\n\nENTRY %main {{\n  {line}\n}}\n")
    return found


def everything(x):
    """One collective of each kind that CPUs have, the permutation in a loop."""
    full = jax.lax.all_gather(x, "tensor", axis=1, tiled=True)
    x = jax.lax.psum_scatter(full, "tensor", scatter_dimension=1, tiled=True)
    x = jax.lax.all_to_all(x, ("data", "tensor"), 0, 0, tiled=True)
    ring = [(i, (i + 1) % 4) for i in range(4)]
    x = jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.ppermute(x, "tensor", ring) + 1, x)
    return jax.lax.psum(x, "data")


def test_every_kind_of_a_compiled_program():
    def program(x):
        return jax.shard_map(everything, out_specs=P(None, "tensor"))(x)

    found = collectives(compiled(program, ((16, 12), ("data", "tensor"))))
    by_kind = {c.kind: c for c in found}
    assert len(found) == len(by_kind) == 5  # the permutation in the loop once
    local, full = (8, 3), (8, 12)
    assert by_kind["all-gather"].arrays == (("f32", full),)
    assert by_kind["all-gather"].bytes == 8 * 12 * 4
    assert by_kind["reduce-scatter"].arrays == (("f32", local),)
    assert by_kind["all-reduce"].arrays == (("f32", local),)
    # XLA:CPU splits what goes to each device.
    assert by_kind["all-to-all"].bytes == by_kind["all-reduce"].bytes == 8 * 3 * 4
    sizes = {kind: c.group_size for kind, c in by_kind.items()}
    assert sizes == {
        "all-gather": 4,
        "reduce-scatter": 4,
        "all-to-all": 8,
        "collective-permute": None,
        "all-reduce": 2,
    }
    assert by_kind["all-gather"].op_name.endswith("all_gather")
    assert "while/body" in by_kind["collective-permute"].op_name


def test_combined_reductions_are_one_with_all_their_bytes():
    def program(x):
        def local(x):
            return jax.lax.psum((x, 2 * x[:1]), "tensor")

        return jax.shard_map(local, out_specs=(P("data"), P("data")))(x)

    text = compiled(program, ((4, 8), ("data", "tensor")))
    [found] = collectives(text)
    assert sorted(found.arrays) == [("f32", (1, 2)), ("f32", (2, 2))]
    assert found.bytes == (2 + 4) * 4
    assert summarize([found, found]) == {"all-reduce": (2, 48)}


def test_collectives_that_sharding_implies():
    def program(x, w):
        return jnp.dot(x, w, out_sharding=P("data", None))

    text = compiled(program, ((4, 8), ("data", "tensor")), ((8, 6), ("tensor", None)))
    [found] = collectives(text)
    assert (found.kind, found.arrays, found.group_size) == ("all-reduce", (("f32", (2, 6)),), 4)


def test_a_program_without_collectives():
    text = compiled(lambda x: jnp.sin(x) @ x.T, ((4, 8), (None, None)))
    assert collectives(text) == []
    assert summarize([]) == {}


def unfold(text: str) -> str:
    """Puts back together the lines that end with a backslash: XLA doesn't break instructions."""
    return re.sub(r"\\\n *", "", text).lstrip()


# What jaxlib 0.11.2 printed when it compiled for H100s and for TPU v5e, shortened.
CUDA = unfold(r"""
    HloModule jit_inner, is_scheduled=true, num_partitions=8, frontend_attributes={a="b"}

    %body (arg: (s32[], bf16[512,512])) -> (s32[], bf16[512,512]) {
      %collective-permute-start = ((bf16[512,512]{1,0}), bf16[512,512]{1,0}) \
    collective-permute-start(%get-tuple-element.23), channel_id=1, \
    source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}, \
    metadata={op_name="jit(inner)/while/body/ppermute" stack_frame_id=16}
      %collective-permute-done = bf16[512,512]{1,0} \
    collective-permute-done(%collective-permute-start), \
    metadata={op_name="jit(inner)/while/body/ppermute" stack_frame_id=16}
    }

    ENTRY %main.6_spmd (param.4: bf16[16,1024]) -> f32[16,1024] {
      %all-gather-start = ((s32[1,4]{1,0}), s32[4,4]{1,0}) all-gather-start(%bitcast.4.0), \
    channel_id=1, replica_groups=mesh['data'=2,'expert'=4] {'expert'}, dimensions={0}, \
    use_global_device_ids=true, metadata={op_name="jit(inner)/shard_map/all_gather"}
      %all-gather-done = s32[4,4]{1,0} all-gather-done(%all-gather-start)
      %all-gather.2 = (bf16[4,512]{1,0}, bf16[8,512]{1,0}) all-gather(%a, %b), channel_id=1, \
    replica_groups=mesh['data'=2,'tensor'=4] {'tensor'}, dimensions={0}, \
    metadata={op_name="jit(inner)/shard_map/all_gather" scheduling_name="all-gather-start.3"}
      %all-reduce-start.1 = ((f32[512,1]{1,0}), f32[512,1]{1,0}) \
    all-reduce-start(%get-tuple-element.18), replica_groups=mesh['data'=2,'tensor'=4] {'data'}, \
    to_apply=%region_6.0, output_to_operand_aliasing={{1}: (0, {})}
      %ragged-all-to-all-start.1 = ((f32[64,1024]{1,0}, f32[64,1024]{1,0:S(1)}, s64[4]{0}, \
    s64[4]{0}, s64[4]{0}, /*index=5*/s64[4]{0}), f32[64,1024]{1,0:S(1)}) \
    ragged-all-to-all-start(%a, %b, %c, %d, %e, /*index=5*/%f), channel_id=1, \
    replica_groups={{0,1,2,3},{4,5,6,7}}, backend_config={"is_sync":false}
      %all-reduce-done.1 = f32[512,1]{1,0} all-reduce-done(%all-reduce-start.1)
      ROOT %ragged-all-to-all-done.1 = f32[64,1024]{1,0:S(1)} \
    ragged-all-to-all-done(%ragged-all-to-all-start.1)
      %psum_invariant.23.2 = bf16[] all-reduce(%get-tuple-element.19), channel_id=1, \
    replica_groups=mesh['data'=2,'tensor'=4] {'data','tensor'}, to_apply=%region_8.0
    }
    """)

TPU = unfold(r"""
    HloModule jit_inner, is_scheduled=true, num_partitions=8

    ENTRY %main {
      %collective-permute-start = (bf16[512,512]{1,0:T(8,128)(2,1)S(1)}, \
    bf16[512,512]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) \
    collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
      %collective-permute-done = bf16[512,512]{1,0:T(8,128)(2,1)S(1)} \
    collective-permute-done(%collective-permute-start)
      %ragged_all_to_all.26 = u16[64,2,640]{2,1,0:T(2,128)(2,1)S(1)} ragged-all-to-all(%a, %b, \
    %c, %d, %e, /*index=5*/%f), channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}, \
    metadata={op_name="jit(inner)/shard_map/ragged_all_to_all" stack_frame_id=39}
      %all-reduce = (bf16[512,512]{1,0:T(8,128)(2,1)S(1)}, bf16[512,3]{1,0:T(8,128)(2,1)S(1)}) \
    all-reduce(%y, %z), replica_groups=mesh['data'=2,'tensor'=4] {'tensor'}, to_apply=%region_5.0
      %all-reduce.2 = s32[16]{0:T(128)S(1)} all-reduce(%dynamic-update-slice), channel_id=2, \
    replica_groups=mesh['data'=2,'expert'=4] {'expert'}, to_apply=%add.2
      %all_to_all.9 = bf16[8,64,512]{2,1,0:T(8,128)(2,1)S(1)} all-to-all(%bitcast.27), \
    replica_groups=mesh['data'=2,'tensor'=4] {'data','tensor'}, dimensions={0}
      %get-tuple-element.21 = bf16[512,3]{1,0:T(8,128)(2,1)} get-tuple-element(%all-reduce), index=1
    }
    """)


def rows(text: str) -> list[tuple]:
    return [(c.kind, c.bytes, c.group_size) for c in collectives(text)]


def test_the_text_of_a_gpu():
    assert rows(CUDA) == [
        ("collective-permute", 512 * 512 * 2, None),
        ("all-gather", 4 * 4 * 4, 4),
        ("all-gather", (4 + 8) * 512 * 2, 4),
        ("all-reduce", 512 * 4, 2),
        ("ragged-all-to-all", 64 * 1024 * 4, 4),
        ("all-reduce", 2, 8),
    ]
    names = [c.op_name for c in collectives(CUDA)]
    assert names[:2] == ["jit(inner)/while/body/ppermute", "jit(inner)/shard_map/all_gather"]
    assert names[-1] == ""
    totals = summarize(collectives(CUDA))
    assert totals["all-reduce"] == (2, 2050)
    assert totals["all-gather"].count == 2
    assert set(totals) < set(KINDS)


def test_the_text_of_a_tpu():
    assert rows(TPU) == [
        ("collective-permute", 512 * 512 * 2, None),
        ("ragged-all-to-all", 64 * 2 * 640 * 2, 2),
        ("all-reduce", (512 * 512 + 512 * 3) * 2, 4),
        ("all-reduce", 16 * 4, 4),
        ("all-to-all", 8 * 64 * 512 * 2, 8),
    ]


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("{{0,1,2,3,4,5,6,7}}", 8),
        ("{{0},{1},{2},{3},{4},{5},{6},{7}}", 1),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("[1,8]<=[2,2,2]T(2,0,1)", 8),
        ("mesh['a'=2,'b'=4] {'a'}", 2),
        ("mesh['a'=2,'b'=4] {'b','a'}", 8),
        ("mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {axis_1,axis_2}", 4),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", 2),
        ("mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}", 4),
        ("{}", 8),
    ],
)
def test_every_notation_of_groups(groups, size):
    found = one(f"%r = f32[8]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%add")
    assert found.group_size == size


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("pred[3]{0}", 3),
        ("bf16[2,3]{1,0:T(8,128)(2,1)}", 12),
        ("s4[3]{0:E(4)}", 2),
        ("f4e2m1fn[8,2]{1,0}", 8),
        ("f8e4m3fn[5]{0}", 5),
        ("f8e8m0fnu[5]{0}", 5),
        ("c64[2]{0}", 16),
        ("s64[0,4]{1,0}", 0),
        ("f32[<=8,2]{1,0}", 64),
        ("(f32[2]{0}, (s8[3]{0}, token[]))", 11),
    ],
)
def test_bytes_of_every_shape(shape, size):
    assert one(f"ROOT r.1 = {shape} all-gather(x), replica_groups={{{{0,1}}}}").bytes == size


def test_verbose_operands_and_quotes_in_names():
    text = unfold(r"""
        s = f32[4]{0:T(128)} all-reduce-start(f32[4]{0:T(128)} %x), replica_groups={{0,1}}, \
            metadata={op_name="f(\"a\")/psum"}
        d = f32[4]{0:T(128)} all-reduce-done(f32[4]{0:T(128)} %s), metadata={op_name="other"}
        """)
    [found] = collectives(text)
    assert found == Collective("all-reduce", (("f32", (4,)),), 16, 2, r"f(\"a\")/psum")


def test_other_instructions_that_mention_collectives_do_not_count():
    text = """HloModule m
    %all-reduce.5 = f32[2]{0} fusion(%x), calls=%f, metadata={op_name="my all-reduce(x) twice"}
    y = f32[2]{0} custom-call(x), custom_call_target="all-gather(", api_version=4
    %all-gather = f32[2]{0} copy(%all-gather(8))
    """
    assert collectives(text) == []


def test_halves_of_pairs_are_refused():
    start = "%s = f32[4]{0} all-reduce-start(%x), replica_groups={{0,1}}"
    with pytest.raises(ValueError, match="start and are never done: s"):
        one(start)
    with pytest.raises(ValueError, match="all-reduce-done d has no all-reduce-start"):
        one("%d = f32[4]{0} all-reduce-done(%s)")


def test_groups_in_an_unknown_notation_are_refused():
    with pytest.raises(ValueError, match="Cannot read the replica groups"):
        one("%r = f32[4]{0} all-reduce(%x), replica_groups=all_of_them")
