"""What a step reads, computes and exchanges: the numbers of KERNEL_NOTES, and compiled programs."""

import dataclasses
import functools
from typing import Any

import golden
import jax
import numpy as np
import pytest

from mimo_jax.config import DFlashConfig, MiMoConfig
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.cache import init_cache
from mimo_jax.model.parameters import Format, ParamSpec, parameters
from mimo_jax.model.placement import Placement
from mimo_jax.planning import Plan, make_plan
from mimo_jax.planning.steps import Step, qkv_rows, visible_pairs
from sharding import hlo
from sharding.mesh import make_mesh, use
from sharding.plan import Roofline
from sharding.types import put

PRO = "MiMo-V2.5-Pro-FP4-DFlash"
FLASH = "MiMo-V2.6-Flash-RL"


def limits(step: Step) -> Roofline:
    assert step.limits is not None
    return step.limits


def pro(mesh: str = "tensor=4", device: str = "h200", **options: Any) -> Plan:
    return make_plan(MiMoConfig.from_pretrained(PRO), device=device, mesh=mesh, **options)


def test_experts_of_pro_are_531_gb():
    once = {g.name: g.once for g in pro().weights}
    assert round(once["experts"] / 1e9, 1) == 531.4


@pytest.mark.parametrize("mesh", ["", "tensor=4", "expert=2,tensor=4"])
def test_bytes_of_a_step_of_pro(mesh):
    """39.3 GB a token, about 110 GB a verify step, 118 GB with the drafter (KERNEL_NOTES 1)."""
    config = DFlashConfig.from_pretrained(PRO)
    planned, drafted = pro(mesh, context=8), pro(mesh, context=8, drafter=config)
    # The notes have a bfloat16 router; this config's is float32, as MODEL_SPEC 2.12 has it.
    router = next(g.once for g in planned.weights if g.name == "router") / 2
    assert round((planned.token.once - router) / 1e9, 1) == 39.3
    assert 110e9 < planned.verify.once < 111e9
    assert 118e9 < drafted.verify.once < 119e9
    assert drafted.token.once == planned.token.once
    assert (round(planned.token.experts, 1), round(planned.verify.experts, 1)) == (8, 59.5)


def test_floor_of_pro_on_four_h200s():
    """2.3 and 6.9 ms at 17.2 TB/s.  A plan has 5% more for one token: routers are whole on every
    device, and do not share out."""
    planned = pro(context=8, drafter=DFlashConfig.from_pretrained(PRO))
    token, verify = limits(planned.token), limits(planned.verify)
    assert (token.bound, verify.bound) == ("memory", "memory")
    assert 2.3e-3 < token.seconds < 2.45e-3
    assert 6.9e-3 < verify.seconds < 7.05e-3
    routers = next(g for g in planned.weights if g.name == "router")
    assert routers.per_device == routers.once
    shared = planned.token.read - 0.75 * routers.once
    assert shared == pytest.approx(planned.token.once / 4, rel=1e-3)


def test_bytes_of_a_step_of_flash():
    planned = make_plan(MiMoConfig.from_pretrained(FLASH), device="h100", context=8)
    assert planned.token.read == pytest.approx(12.6e9, rel=0.01)
    assert planned.token.read == planned.token.once


def test_flops_of_a_token_are_two_for_each_active_weight():
    """42 B and 15 B active weights; the embedding is looked up and not multiplied."""
    for name, active in ((PRO, 41.9e9), (FLASH, 15.4e9)):
        config = MiMoConfig.from_pretrained(name)
        planned = make_plan(config, device="h200", context=1, verify=1)
        table = config.vocab_size * config.hidden_size
        assert planned.token.flops == pytest.approx(2 * (active - table), rel=5e-3)
        split = make_plan(config, device="h200", mesh="tensor=4", context=1, verify=1)
        assert split.token.flops == pytest.approx(planned.token.flops / 4, rel=0.03)


@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize(("first", "new"), [(0, 1), (0, 9), (5, 1), (5, 4), (2, 0)])
def test_visible_pairs(first, new, window):
    counted = sum(min(p + 1, window or p + 1) for p in range(first, first + new))
    assert visible_pairs(first, new, window) == counted


def test_cache_is_read_up_to_the_context_or_the_window():
    def cache_bytes(context: int, verify: int) -> list[float]:
        planned = pro(context=context, verify=verify)
        return [4 * dict(s.reads)["KV cache"] for s in (planned.token, planned.verify)]

    full, sliding = 51_200, 307_200  # MODEL_SPEC 2.14
    assert cache_bytes(100, 8) == [100 * (full + sliding)] * 2
    assert cache_bytes(4096, 8) == [4096 * full + 128 * sliding, 4096 * full + 135 * sliding]


def test_distinct_experts_are_those_that_are_expected():
    """Against draws of 8 tokens' experts, independent and uniform."""
    planned = pro()
    rng = np.random.default_rng(0)
    draws = [
        len({e for _ in range(8) for e in rng.choice(384, 8, replace=False)}) for _ in range(200)
    ]
    assert planned.verify.experts == pytest.approx(np.mean(draws), rel=0.02)
    assert planned.verify.local_experts == planned.verify.experts


@pytest.mark.parametrize(
    ("mesh", "rules", "whole", "local"),
    [
        # Eight rows of one token, all of which every device sees.
        ("tensor=8", "latency", 59.5, 59.5),
        ("expert=4,tensor=2", "latency", 59.5, 59.5 / 4),
        # Four rows for each copy of the experts: 31.0 of them.
        ("data=2,expert=2,tensor=2", "latency", 59.5, 31.0 / 2),
        # Tokens of data's two parts have experts of their own; those of expert's meet.
        ("data=2,expert=2,tensor=2", "throughput", 59.5, 31.0 / 2),
        ("data=2,expert=2,tensor=2", "wide_experts", 59.5, 59.5 / 4),
    ],
)
def test_distinct_experts_of_one_device(mesh, rules, whole, local):
    token = pro(mesh, rules=rules, batch=8).token
    assert token.experts == pytest.approx(whole, abs=0.05)
    assert token.local_experts == pytest.approx(local, abs=0.05)
    # A device reads that part of the experts it holds.
    planned = pro(mesh, rules=rules, batch=8)
    held = next(g.per_device for g in planned.weights if g.name == "experts")
    ways = planned.placement.rules.ways("expert", planned.placement.mesh)
    assert dict(token.reads)["experts"] == pytest.approx(held * local / (384 / ways), rel=2e-3)


def test_prefill_computes_the_head_once_a_row():
    one, two = pro(context=4096, batch=1).prefill, pro(context=4096, batch=2).prefill
    assert two.flops == pytest.approx(2 * one.flops)
    assert limits(one).bound == "compute"
    config = MiMoConfig.from_pretrained(PRO)
    head = 2 * config.vocab_size * config.hidden_size
    attention = sum(
        2 * visible_pairs(0, 1024, s.window) * s.num_heads * (s.head_dim + s.v_head_dim)
        for s in config.layers
    )
    active = 2 * (41.9e9 - 2 * config.vocab_size * config.hidden_size) * 1024
    whole = pro("", context=1024).prefill
    assert whole.flops == pytest.approx(active + attention + head, rel=5e-3)


CASE = golden.tiny(
    num_attention_heads=8,
    swa_num_attention_heads=8,
    num_key_value_heads=2,
    swa_num_key_value_heads=4,
    n_routed_experts=8,
    max_position_embeddings=1024,
)


@functools.cache
def model() -> MiMo:
    return golden.build(CASE)


def compiled(mesh: str, rules: str, batch: int) -> dict[str, hlo.Total]:
    """Collectives of a decode step's layers, as XLA compiles them for eight CPU devices."""
    held: list[tuple[ParamSpec, Format]] = [(p.spec, "plain") for _, p in parameters(model())]
    where = Placement.fit(make_mesh(mesh), rules, held)
    placed = where.place(model())
    rows = where.rules.spec(["batch"])
    tokens = put(np.zeros((batch, 1), np.int32), where.mesh, *rows)
    cache = init_cache(model().config, batch, 32, placement=where)

    def step(m, tokens, cache):
        return m.hidden_states(tokens, tokens, cache)[:2]

    with use(where.mesh):
        program = jax.jit(step).lower(placed, tokens, cache).compile()
    return hlo.summarize(hlo.collectives(program.as_text() or ""))


@pytest.mark.parametrize(
    ("mesh", "rules"),
    [
        ("tensor=2", "latency"),
        ("tensor=8", "latency"),  # groups of query heads are split
        ("expert=4,tensor=2", "latency_experts"),
        ("data=2,tensor=4", "latency"),
        ("expert=4,tensor=2", "throughput"),
    ],
)
def test_collectives_are_those_of_a_compiled_step(mesh, rules):
    config = dataclasses.replace(model().config, dtype="float32")
    planned = make_plan(config, device="h200", mesh=mesh, rules=rules, batch=8, context=32)
    expected: dict[str, tuple[int, int]] = {}
    for c in planned.token.collectives:
        count, nbytes = expected.get(c.kind, (0, 0))
        expected[c.kind] = (count + c.count, nbytes + c.count * c.nbytes)
    found = compiled(mesh, rules, 8)
    assert {k: t.count for k, t in found.items()} == {k: n for k, (n, _) in expected.items()}
    for kind in found.keys() - {"all-to-all"}:  # which carry padding on the CPU
        assert found[kind].bytes == expected[kind][1], kind


def test_latency_has_two_reductions_a_layer():
    planned = pro()
    kinds = [(c.kind, c.count, c.nbytes, c.ways) for c in planned.token.collectives]
    assert kinds == [
        ("all-gather", 1, 2 * 6144, 4),
        ("all-reduce", 70, 4 * 6144, 4),
        ("all-reduce", 1, 4 * 6144, 4),
        ("all-reduce", 69, 4 * 6144, 4),
    ]
    assert pro("").token.exchange == 0


def direct(planned: Plan) -> dict[str, list[int]]:
    """Sums by a kernel, of attention, dense layers and experts."""
    steps = {"token": planned.token, "verify": planned.verify, "prefill": planned.prefill}
    reduced = {k: [c for c in s.collectives if c.kind == "all-reduce"] for k, s in steps.items()}
    return {k: [c.count for c in found if c.direct] for k, found in reduced.items()}


def test_few_tokens_are_added_up_by_a_kernel():
    """What a step that is compiled for eight Hoppers has: tests/compiling/test_portability.py."""
    planned = pro()
    assert direct(planned) == {"token": [70, 69], "verify": [70, 69], "prefill": []}
    # And an all-reduce and an all-gather at 20 us (KERNEL_NOTES 2).
    assert planned.token.exchange == pytest.approx(139 * 7.2e-6 + 2 * 20e-6, rel=0.01)
    # 21 tokens of Pro come to a device from each of three others, and 64 from one.
    for mesh, most in (("tensor=4", 21), ("tensor=2", 64)):
        assert direct(pro(mesh, batch=most, context=64))["token"] == [70, 69]
        assert direct(pro(mesh, batch=most + 1, context=64))["token"] == []
    assert direct(pro("tensor=8", "b200"))["token"] == []
    assert direct(pro("tensor=8", dtype="float32"))["token"] == []
    # Where tokens travel to their experts, sums are over what splits the width of these.
    assert direct(pro("expert=2,tensor=4", rules="throughput", batch=2))["token"] == [70, 69]
    assert direct(pro("expert=8", rules="throughput", batch=8))["token"] == []


def test_rows_of_the_fused_projection():
    """MODEL_SPEC 2.4."""
    flash, whole = MiMoConfig.from_pretrained(FLASH), MiMoConfig.from_pretrained(PRO)
    assert {qkv_rows(s) for s in flash.layers} == {13_568, 14_848}
    assert {qkv_rows(s) for s in whole.layers} == {27_136}


def test_a_dense_model_has_no_experts():
    dense = MiMoConfig.from_dict(
        golden.tiny(moe_layer_freq=[0, 0], n_routed_experts=None, num_experts_per_tok=None).config
    )
    planned = make_plan(dense, device="h200", context=1, verify=1)
    assert planned.token.experts == planned.token.local_experts == 0
    assert "experts" not in str(planned)
    weights = sum(g.once for g in planned.weights if g.name != "embedding") / 2  # bfloat16
    attention = planned.token.flops - 2 * weights
    heads = sum(s.num_heads * (s.head_dim + s.v_head_dim) for s in dense.layers)
    assert attention == 2 * heads
