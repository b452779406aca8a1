"""Planned bytes are allocated bytes, to the last one, for every mesh and rules that fit."""

import dataclasses
from typing import Any

import golden
import jax
import numpy as np
import pytest

from mimo_jax import checkpoint
from mimo_jax.config import DFlashConfig, MiMoConfig
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.cache import init_cache
from mimo_jax.model.dflash import DFlash
from mimo_jax.model.mtp import MTP
from mimo_jax.model.parameters import abstract, parameters
from mimo_jax.model.placement import Placement
from mimo_jax.model.random_weights import random_release
from mimo_jax.planning import Plan, make_plan
from mimo_jax.planning.inventory import declarations, inventory
from sharding.devices import find_device
from sharding.mesh import make_mesh

# A small model in the release's formats (FP8 and MXFP4), and one in plain bfloat16.
RELEASE = MiMoConfig.from_pretrained(checkpoint.resolve("mimo-tiny"))
DRAFTER = dataclasses.replace(
    DFlashConfig.from_pretrained("MiMo-V2.5-DFlash"),
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
    v_head_dim=16,
)
PLAIN = MiMoConfig.from_dict(
    golden.tiny(
        num_attention_heads=8,
        swa_num_attention_heads=8,
        num_key_value_heads=2,
        swa_num_key_value_heads=4,
        n_routed_experts=8,
        max_position_embeddings=1024,
    ).config
)
LAYOUTS = [
    ("tensor=2", "latency"),
    ("tensor=8", "latency"),
    ("expert=2,tensor=4", "latency"),
    ("expert=4,tensor=2", "latency_experts"),
    ("expert=4,tensor=2", "throughput"),
    ("expert=8", "throughput"),
    ("data=2,tensor=4", "latency"),
    ("data=2,expert=2,tensor=2", "latency"),
    ("data=2,expert=2,tensor=2", "throughput"),
    ("data=2,expert=2,tensor=2", "wide_experts"),
    ("data=4,expert=2", "wide_experts"),
    ("data=8", "single"),
]
H200 = find_device("h200")


def plan(config: MiMoConfig, mesh: str, **options: Any) -> Plan:
    return make_plan(config, device=H200, mesh=mesh, context=200, prompt=8, **options)


def placement(config: MiMoConfig, mesh: str, rules: str) -> Placement:
    held = inventory(config, config.dtype, quantized=True, mtp_blocks=2, drafter=DRAFTER)
    return Placement.fit(make_mesh(mesh), rules, declarations(held))


def modules(config: MiMoConfig) -> list:
    """The backbone, two MTP blocks and a drafter, as shapes."""
    builds = (lambda m: MiMo(config, m), lambda m: MTP(config, 2, m), lambda m: DFlash(DRAFTER, m))
    return [abstract(build, config.dtype, quantized=True) for build in builds]


def zeros(where: Placement, param) -> object:
    """A parameter's arrays on the mesh."""
    value = param.get_value()
    return jax.tree.map(
        lambda a, s: jax.device_put(np.zeros(a.shape, a.dtype), s),
        value,
        where.shardings(param.spec, value),
    )


def allocated(tree) -> set[int]:
    """Bytes on each device, as a set: every device should have the same."""
    by_device: dict = {}
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            by_device[shard.device] = by_device.get(shard.device, 0) + shard.data.nbytes
    return set(by_device.values())


@pytest.mark.parametrize("config", [RELEASE, PLAIN], ids=["release", "plain"])
@pytest.mark.parametrize(("mesh", "rules"), LAYOUTS)
def test_weights_and_cache(config, mesh, rules):
    where = placement(config, mesh, rules)
    planned = plan(config, mesh, rules=rules, batch=8, mtp_blocks=2, drafter=DRAFTER)
    assert planned.placement.rules == where.rules
    spent = dict(planned.memory.spent)
    held = [[zeros(where, p) for _, p in parameters(m)] for m in modules(config)]
    assert allocated(held) == {spent["weights"]}
    by_group = {g.name: g.per_device for g in planned.weights}
    assert allocated(held[1]) == {by_group["MTP"]}
    assert allocated(held[2]) == {by_group["drafter"]}
    assert allocated(init_cache(config, 8, 200, placement=where)) == {spent["KV cache"]}


def test_weights_of_a_model_that_runs():
    planned = plan(RELEASE, "data=2,tensor=2")
    held = inventory(RELEASE, RELEASE.dtype, quantized=True, mtp_blocks=0, drafter=None)
    where = Placement.fit(make_mesh("data=2,tensor=2"), "latency", declarations(held))
    model = MiMo(RELEASE, random_release(0, RELEASE.dtype, where))
    assert allocated(model) == {dict(planned.memory.spent)["weights"]}


def test_groups_of_one_copy_are_all_weights():
    planned = plan(PLAIN, "")
    by_group = {g.name: g.once for g in planned.weights}
    config, itemsize = PLAIN, 2
    assert by_group["head"] == by_group["embedding"] == config.vocab_size * 32 * itemsize
    assert by_group["experts"] == 3 * 8 * config.moe_intermediate_size * 32 * itemsize
    assert by_group["router"] == 4 * 8 * (32 + 1)  # float32, and a bias
    assert by_group["dense MLP"] == 3 * config.intermediate_size * 32 * itemsize
    assert by_group["norms"] == 5 * 32 * itemsize
    assert list(by_group) == [g.name for g in planned.weights]
    assert all(g.per_device == g.once for g in planned.weights)


def test_dense_weights_and_another_dtype():
    quantised, dense = plan(RELEASE, ""), plan(RELEASE, "", quantized=False)
    ratio = {a.name: b.once / a.once for a, b in zip(quantised.weights, dense.weights, strict=True)}
    assert ratio["experts"] == pytest.approx(16 / 4.25)
    assert 1.9 < ratio["dense MLP"] < 2
    assert ratio["embedding"] == 1
    single = plan(RELEASE, "", dtype="float32")
    assert single.cache.per_token == 2 * quantised.cache.per_token
    embedding = [next(g.once for g in p.weights if g.name == "embedding") for p in (single, dense)]
    assert embedding[0] == 2 * embedding[1]


@pytest.mark.parametrize(
    ("name", "per_token", "per_ring_token"),
    [("MiMo-V2.6-Flash-RL", 23_040, 199_680), ("MiMo-V2.5-Pro-FP4-DFlash", 51_200, 307_200)],
)
def test_cache_of_the_releases(name, per_token, per_ring_token):
    """Bytes a token of MODEL_SPEC 2.14; rings have 128 slots beyond the window's 128."""
    config = MiMoConfig.from_pretrained(name)
    one = make_plan(config, device=H200).cache
    assert (one.per_token, one.rings) == (per_token, 256 * per_ring_token)
    assert one.once == (one.rings, one.per_token)
    four = make_plan(config, device=H200, mesh="tensor=4").cache
    assert (4 * four.per_token, 4 * four.rings) == (one.per_token, one.rings)
    # Fewer KV heads than devices are on several of them.
    heads = config.num_key_value_heads
    many = make_plan(config, device=H200, mesh=f"expert={heads},tensor=8").cache
    assert heads * many.per_token == one.per_token


def test_batch_is_rounded_up_to_what_the_mesh_splits_it_into():
    planned = plan(RELEASE, "data=4", batch=5)
    assert planned.batch == 8
    assert dict(planned.memory.spent)["KV cache"] == 2 * planned.cache.per_sequence(200)
    assert "batch 8, context 200" in str(planned)


def test_largest_context_and_batch_are_what_fits():
    config = MiMoConfig.from_pretrained("MiMo-V2.5-Pro-FP4-DFlash")

    def at(**numbers):
        return make_plan(config, device=H200, mesh="tensor=4", **numbers)

    planned = at(context=4096)
    assert planned.fits
    assert at(context=planned.largest_context).fits
    assert not at(context=planned.largest_context + 1).fits
    assert at(batch=planned.largest_batch).fits
    assert not at(batch=planned.largest_batch + 1).fits
    split = make_plan(config, device=H200, mesh="data=2,tensor=4", rules="throughput")
    assert split.largest_batch % 2 == 0


def test_largest_context_ends_at_the_model_s():
    assert plan(RELEASE, "").largest_context == RELEASE.max_position_embeddings


def test_a_given_workspace_takes_the_place_of_the_estimate():
    estimated, given = plan(RELEASE, ""), plan(RELEASE, "", workspace_bytes=12_345)
    assert estimated.workspace.estimated
    assert "estimate" in str(estimated)
    assert not given.workspace.estimated
    assert dict(given.memory.spent)["workspace"] == 12_345
    assert estimated.memory.needed - estimated.workspace.total == given.memory.needed - 12_345


# Temporary bytes of programs that XLA compiled for an H100 (jax 0.11.2): the step of 4 layers.
COMPILED = [
    ("MiMo-V2.6-Flash-RL", "", 1, 1, 134.3e6),
    ("MiMo-V2.6-Flash-RL", "", 8, 1, 285.3e6),
    ("MiMo-V2.6-Flash-RL", "", 64, 1, 744.1e6),
    ("MiMo-V2.6-Flash-RL", "", 1, 512, 429.0e6),
    ("MiMo-V2.6-Flash-RL", "", 1, 4096, 2515.5e6),
    ("MiMo-V2.6-Flash-RL", "", 8, 512, 3516.0e6),
    ("MiMo-V2.5-Pro-FP4-DFlash", "tensor=4", 1, 1, 100.8e6),
    ("MiMo-V2.5-Pro-FP4-DFlash", "tensor=4", 1, 512, 658.4e6),
    ("MiMo-V2.5-Pro-FP4-DFlash", "tensor=4", 1, 4096, 5227.1e6),
]


@pytest.mark.parametrize(("name", "mesh", "batch", "prompt", "nbytes"), COMPILED)
def test_workspace_is_near_what_xla_allocated(name, mesh, batch, prompt, nbytes):
    config = MiMoConfig.from_pretrained(name)
    planned = make_plan(config, device="h100", mesh=mesh, batch=batch, prompt=prompt, layers=4)
    assert 0.85 < planned.workspace.total / nbytes < 2.1
