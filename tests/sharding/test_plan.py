"""Arithmetic of memory and time, against really allocated arrays and numbers done by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from sharding.devices import find_device
from sharding.mesh import make_mesh
from sharding.plan import (
    Collective,
    Group,
    Memory,
    abstract_mesh,
    array_bytes,
    collective_seconds,
    explain,
    gib,
    grouped,
    largest,
    roofline,
    split,
    table,
)
from sharding.rules import SPILLS, ShardingRules

H200 = find_device("h200")


@pytest.mark.parametrize(
    "spec", [(), ("tensor",), (None, "data"), ("data", "tensor"), (("data", "tensor"),)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "uint8"])
def test_bytes_are_those_that_are_allocated(spec, dtype):
    mesh = make_mesh("data=2,tensor=4")
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    array = jax.device_put(jnp.zeros((16, 24), dtype), sharding)
    planned = NamedSharding(abstract_mesh(mesh.shape), PartitionSpec(*spec))
    shape = jax.ShapeDtypeStruct(array.shape, array.dtype)
    per_device, once = array_bytes({"a": shape}, {"a": planned})
    assert {s.data.nbytes for s in array.addressable_shards} == {per_device}
    assert once == array.nbytes


def test_groups_are_summed_by_name():
    parts = [("a", 1, 4), ("b", 2, 2), ("a", 10, 40)]
    assert grouped(parts) == (Group("a", 11, 44), Group("b", 2, 2))
    assert [split(g) for g in grouped(parts)] == ["1/4", "whole"]


def test_memory_fits_up_to_the_last_byte():
    memory = Memory((("weights", 70), ("cache", 30)), usable=100)
    assert (memory.needed, memory.left, memory.fits) == (100, 0, True)
    over = dataclasses.replace(memory, usable=99)
    assert (over.left, over.fits) == (-1, False)


@given(limit=st.integers(-1, 60), most=st.integers(0, 50), step=st.integers(1, 7))
def test_largest_is_the_largest_that_fits(limit, most, step):
    fitting = [n for n in range(step, most + 1, step) if n <= limit]
    assert largest(lambda n: n <= limit, most, step) == max(fitting, default=0)


def test_roofline_of_the_notes():
    """39.3 GB and 118 GB on four H200s at 17.2 TB/s: 2.3 and 6.9 ms (KERNEL_NOTES 1)."""
    token, verify = roofline(39.3e9 / 4, 1e9, H200), roofline(118e9 / 4, 1e9, H200)
    assert token is not None
    assert verify is not None
    assert (round(1e3 * token.seconds, 1), round(1e3 * verify.seconds, 1)) == (2.3, 6.9)
    assert token.bound == "memory"


def test_roofline_is_the_larger_limit():
    limits = roofline(4.3e9, 790e12, H200)
    assert limits is not None
    assert limits.memory == pytest.approx(1e-3)
    assert limits.compute == limits.seconds == pytest.approx(1.0)
    assert limits.bound == "compute"
    assert roofline(1e9, 1e9, find_device("cpu")) is None


def test_collectives_are_140_latencies_and_their_bytes():
    """140 all-reduces of a Pro step are 2.8 ms, as much as its weights (KERNEL_NOTES 2)."""
    reduce = Collective("all-reduce", 140, 4 * 6144, 4)
    assert reduce.sent == 2 * 4 * 6144 * 3 / 4
    seconds = collective_seconds([reduce], H200, 4)
    assert seconds == pytest.approx(140 * (20e-6 + reduce.sent / 450e9))
    assert Collective("all-gather", 1, 800, 8).sent == Collective("all-to-all", 1, 800, 8).sent
    assert Collective("all-gather", 1, 800, 8).sent == 700


def test_sums_through_each_other_s_memory_send_all_to_everyone():
    """Measured on four H100s: 7.5, 13 and 17 us for 1, 8 and 16 tokens (all_reduce_h100x4.json)."""
    h100 = find_device("h100")

    def seconds(tokens: int) -> float:
        reduce = Collective("all-reduce", 1, 4 * 6144 * tokens, 4, direct=True)
        assert reduce.sent == 3 * 2 * reduce.nbytes
        found = collective_seconds([reduce], h100, 4)
        assert found is not None
        return found

    assert seconds(1) == pytest.approx(7.5e-6, rel=0.02)
    assert 0.7 < seconds(8) / 13e-6 < 1
    assert 0.7 < seconds(16) / 17e-6 < 1


def test_collectives_beyond_what_is_connected_are_not_estimated():
    reduce = Collective("all-reduce", 1, 1024, 16)
    assert collective_seconds([reduce], H200, 16) is None
    assert collective_seconds([reduce], find_device("v5e"), 16) is not None
    assert collective_seconds([reduce], find_device("cpu"), 2) is None
    assert collective_seconds([], H200, 1) == 0


def test_explanation_says_what_is_split_and_why_not():
    mesh = abstract_mesh({"data": 1, "expert": 2, "tensor": 4})
    wanted = ShardingRules.preset("latency")
    sizes = {"kv_heads": 2, "group": 8, "qkv_row": 8, "mlp": 8, "vocab": 8, "features": 4}
    sizes |= {"expert": 8, "expert_mlp": 3}
    used = wanted.fitted(sizes, mesh)
    groups = [Group("experts", 2**30, 2**33), Group("norms", 2**20, 2**20)]
    text = explain(
        dict(used.axes),
        mesh.shape,
        groups,
        wanted=dict(wanted.axes),
        sizes=sizes,
        spills=SPILLS,
    )
    assert text.splitlines() == [
        "logical axis  split over           ways",
        "batch         whole                   1",
        "expert        expert=2 x tensor=4     8",
        "expert_mlp    whole                   1  3 parts, not a multiple of 4; tensor to expert",
        "features      tensor=4                4  4 parts, not a multiple of 8",
        "group         tensor=4                4",
        "kv_heads      expert=2                2  2 parts, not a multiple of 8; "
        "tensor to group, qkv_row",
        "mlp           expert=2 x tensor=4     8",
        "qkv_row       tensor=4                4",
        "vocab         expert=2 x tensor=4     8",
        "",
        "group    GiB a device  GiB in all  part",
        "experts          1.00        8.00  1/8",
        "norms          0.0010      0.0010  whole",
        "total            1.00        8.00  1/7.99",
    ]


def test_explanation_of_rules_alone():
    assert explain({"mlp": ("tensor",)}, {"tensor": 2}).splitlines() == [
        "logical axis  split over  ways",
        "mlp           tensor=2       2",
    ]


def test_sizes_in_words():
    assert [gib(n) for n in (0, 2**20, 2**30, 5.5 * 2**40)] == [
        "0.00",
        "0.0010",
        "1.00",
        "5,632.00",
    ]
    assert table([("a", "b"), ("cc", "1")], "<>") == ["a   b", "cc  1"]
