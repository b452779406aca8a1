"""Plans as people meet them: verdicts, suggestions, tables, errors."""

import json
import math
from typing import Any

import pytest

from mimo_jax.config import DFlashConfig, MiMoConfig, presets
from mimo_jax.planning import Plan, make_plan
from mimo_jax.planning.kernels import TARGETS
from mimo_jax.planning.plan import mesh_sizes
from mimo_jax.planning.steps import Step
from sharding import devices
from sharding.devices import GIB, NAMES, DeviceError
from sharding.mesh import MeshError, make_mesh
from sharding.plan import Roofline, abstract_mesh
from sharding.rules import PRESETS, ShardingError, ShardingRules

PRO = MiMoConfig.from_pretrained("MiMo-V2.5-Pro-FP4-DFlash")
FLASH = MiMoConfig.from_pretrained("MiMo-V2.6-Flash-RL")
TINY = MiMoConfig.from_pretrained("colibri-tiny")
BACKBONES = [name for name in presets() if not name.endswith(".dflash")]


def limits(step: Step) -> Roofline:
    assert step.limits is not None
    return step.limits


def pro(mesh: str = "tensor=4", device: str = "h200", **options: Any) -> Plan:
    return make_plan(PRO, device=device, mesh=mesh, **options)


@pytest.mark.parametrize(
    ("mesh", "device", "rules", "fits"),
    [
        ("tensor=4", "h200", "latency", True),
        ("tensor=2", "h200", "latency", False),
        ("expert=2,tensor=4", "h200", "latency", True),
        ("tensor=8", "h100", "latency", True),
        ("tensor=4", "h100", "latency", False),
        ("expert=8,tensor=8", "v5e", "latency", True),
        ("data=4,expert=8,tensor=8", "v5e", "throughput", True),
        ("expert=4,tensor=4", "tpu7x", "throughput", True),
        ("tensor=4", "b200", "latency", True),
        ("", "a100", "single", False),
    ],
)
def test_where_pro_fits(mesh, device, rules, fits):
    """Four H200s and a v5e-64 hold it (KERNEL_NOTES 1 and 5)."""
    planned = pro(mesh, device, rules=rules, prompt=32, context=1024)
    assert planned.fits == fits
    assert planned.devices == math.prod(mesh_sizes(mesh).values())
    weights = dict(planned.memory.spent)["weights"]
    assert sum(g.per_device for g in planned.weights) == weights
    assert sum(g.once for g in planned.weights) == pytest.approx(561.8e9, rel=1e-3)
    assert f"{weights / GIB:,.2f}" in str(planned)


def test_memory_of_pro_on_four_h200s():
    """About 4 GiB a GPU to spare with the drafter (KERNEL_NOTES 1)."""
    drafter = DFlashConfig.from_pretrained("MiMo-V2.5-Pro-FP4-DFlash")
    planned = pro(drafter=drafter)
    experts = next(g for g in planned.weights if g.name == "experts")
    assert round(experts.per_device / GIB, 1) == 123.7
    assert 3.5 < planned.memory.left / GIB < 4.5
    assert planned.verdict() == "fits: needs 133.4 of 137.0 GiB a device, 3.6 GiB are left"


def test_a_mesh_that_is_too_small_gets_a_suggestion_that_fits():
    planned = pro("")
    assert planned.verdict() == (
        "does not fit: needs 524.4 of 137.0 GiB a device; try mesh tensor=4"
    )
    assert planned.largest_context == planned.largest_batch == 0
    for device, start in (("h100", "tensor=4"), ("v5e", "tensor=16"), ("a100", "data=2,tensor=4")):
        mesh = pro(start, device).suggestion
        assert mesh is not None
        assert pro(mesh, device).fits
        assert mesh_sizes(mesh)["data"] == mesh_sizes(start)["data"]
        half = pro(mesh, device).devices // 2
        assert not any(
            pro(f"expert={half // t},tensor={t}", device).fits
            for t in (1, 2, 4, 8)
            if t <= half and "data" not in start
        )


def test_no_mesh_helps_where_devices_share_their_memory(monkeypatch):
    monkeypatch.setattr(devices, "host_memory", lambda: 8 * GIB)
    planned = pro("tensor=2", "cpu")
    assert planned.memory.usable == 4 * GIB
    assert planned.suggestion is None
    assert "no larger mesh was found; reduce batch, context or prompt" in planned.verdict()
    assert "the speed of this cpu is not known" in str(planned)
    assert planned.token.limits is planned.token.exchange is None
    assert planned.tokens_per_second(4.0) is None
    assert make_plan(TINY, device="cpu", context=64).fits


@pytest.mark.parametrize("name", BACKBONES)
def test_every_preset_has_a_plan(name):
    config = MiMoConfig.from_pretrained(name)
    planned = make_plan(config, device="h100", context=64, mtp_blocks=1, name=name)
    assert str(planned).startswith(f"{name} on 1 h100: one device")
    assert planned.placement.rules == ShardingRules()


@pytest.mark.parametrize("device", NAMES)
def test_every_device_prints_in_80_columns(device):
    planned = pro("data=2,expert=8,tensor=8", device, rules="throughput", batch=16)
    assert max(map(len, str(planned).splitlines())) <= 80
    assert json.loads(json.dumps(planned.to_dict()))["device"]["name"] == device


def test_kernels_are_known_for_every_device():
    assert set(TARGETS) == set(NAMES)


def test_text_says_what_was_estimated_and_assumed():
    text = str(pro(batch=2))
    assert "workspace" in text
    assert "estimate" in text
    assert "* estimate, not in the roofline: 1 all-gather, 140 all-reduce (139 kernels)" in text
    assert "experts: expected, if tokens choose them independently and uniformly" in text
    assert "not measured: interconnect (datasheet)" in text
    assert "not counted: XLA's autotuning while it compiles" in text
    many = str(pro("expert=2,tensor=8"))
    assert "not known: the mesh is more than the 8 that are connected" in many
    assert "collectives" not in str(make_plan(TINY, device="h200", context=64))


def test_rates_follow_from_the_steps():
    planned = pro(batch=2)
    steps = planned.to_dict()
    seconds = limits(planned.verify).seconds
    assert planned.tokens_per_second(5.56) == pytest.approx(2 * 5.56 / seconds)
    assert steps["verify_tokens_per_second"] == {n: 2 * n / seconds for n in range(1, 9)}
    assert f"roofline tokens/s: {2 / limits(planned.token).seconds:,.0f}" in str(planned)


def test_data_has_every_number():
    drafter = DFlashConfig.from_pretrained("MiMo-V2.5-Pro-FP4-DFlash")
    planned = pro("expert=2,tensor=4", drafter=drafter, mtp_blocks=3)
    data = planned.to_dict()
    assert data["mesh"] == {"data": 1, "expert": 2, "tensor": 4}
    assert data["rules"]["expert_mlp"] == ["tensor"]
    assert data["memory"]["needed"] + planned.memory.left == data["memory"]["usable"]
    assert list(data["weights"]) == [
        *("embedding", "norms", "dense MLP", "attention", "experts", "router", "head"),
        *("MTP", "drafter"),
    ]
    assert data["steps"]["verify"]["read"]["drafter"] == data["weights"]["drafter"]["per_device"]
    assert data["steps"]["token"]["read"]["drafter"] == 0
    assert "MTP" not in data["steps"]["token"]["read"]
    assert data["device"]["bandwidth"] == {"value": 4.3e12, "source": "measured"}
    assert data["steps"]["token"]["collectives"][0] == {
        **{"kind": "all-gather", "count": 1, "nbytes": 12288, "ways": 8, "direct": False}
    }


def test_explanation_of_a_plan():
    text = pro("expert=8,tensor=8", "v5e").explain()
    lines = [line.split(maxsplit=1) for line in text.splitlines()]
    rows = {words[0]: words[1] for words in lines if len(words) > 1}
    assert rows["kv_heads"] == (
        "expert=8                8  8 parts, not a multiple of 64; tensor to group, qkv_row"
    )
    assert rows["experts"].split() == ["7.73", "494.86", "1/64"]
    assert rows["router"].split() == ["0.61", "0.61", "whole"]
    assert rows["total"].split()[1] == "523.24"


def test_meshes_in_every_form():
    sizes = {"data": 1, "expert": 2, "tensor": 4}
    mesh = make_mesh("expert=2,tensor=4")
    forms = ("expert=2,tensor=4", {"tensor": 4, "expert": 2}, mesh, abstract_mesh(sizes))
    for form in forms:
        assert mesh_sizes(form) == sizes
        planned = make_plan(TINY, device="h200", mesh=form, context=64)
        assert planned.mesh == sizes


def test_rules_may_be_given_as_they_are():
    rules = ShardingRules.of({"expert": "tensor", "mlp": "tensor"})
    planned = pro("tensor=4", rules=rules)
    assert planned.placement.rules == planned.wanted == rules
    part = {g.name: g.once / g.per_device for g in planned.weights}
    assert (part["experts"], part["dense MLP"], part["attention"]) == (4, 4, 1)


def test_part_of_the_layers():
    whole, part = make_plan(FLASH, device="h100"), make_plan(FLASH, device="h100", layers=20)
    assert not whole.fits
    assert part.fits
    once = [{g.name: g.once for g in p.weights}["experts"] for p in (whole, part)]
    assert once[1] == once[0] * 19 // 47


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "h300"}, DeviceError, "no device is called 'h300'; there are h100"),
        ({"mesh": "tensor"}, MeshError, "'tensor' is not AXIS=SIZE"),
        ({"mesh": {"pipeline": 2}}, MeshError, "there is no axis 'pipeline'"),
        ({"mesh": {"tensor": 0}}, MeshError, "tensor=0 must be at least 1"),
        ({"mesh": "tensor=7"}, ShardingError, "expert has 384 indivisible parts"),
        ({"rules": "fast"}, ShardingError, "no rules are called 'fast'"),
        ({"context": 0}, ValueError, "context=0 must be at least 1"),
        ({"context": 2_000_000}, ValueError, "more than the model's 1048576 positions"),
        ({"batch": 0}, ValueError, "batch=0 must be at least 1"),
        ({"prompt": -1}, ValueError, "prompt=-1 must be at least 1"),
        ({"verify": 9, "context": 8}, ValueError, "longer than context=8"),
        ({"layers": 0}, ValueError, "0 layers were asked for; the model has 70"),
        ({"layers": 71}, ValueError, "71 layers were asked for; the model has 70"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        pro(**options)


def test_every_preset_of_rules_has_a_plan():
    for rules in PRESETS:
        planned = pro("data=2,expert=2,tensor=4", rules=rules, batch=4)
        assert planned.batch == 4
        assert planned.wanted == ShardingRules.preset(rules)
