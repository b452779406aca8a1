"""Sums over devices: what defines them, when the kernel takes them, and a model's exchange."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from tiny import two_layers

from mimo_jax.model import packing
from pallas_kernels import backends
from pallas_kernels.all_reduce import all_reduce, exchange, mosaic_gpu
from pallas_kernels.all_reduce.exchange import BLOCK, Exchange

SIZES = {"data": 2, "expert": 2, "tensor": 2}
MESH = Mesh(np.array(jax.devices()).reshape(2, 2, 2), tuple(SIZES), axis_types=(AxisType.Auto,) * 3)
EACH = P(tuple(SIZES))


def on_each(f):
    """f of every device's part of arrays [8, ...], which are in any pytrees."""
    return jax.shard_map(f, mesh=MESH, in_specs=EACH, out_specs=EACH, check_vma=False)


def arrays(dtype="bfloat16", values=BLOCK):
    rng = np.random.default_rng(0)
    y = jnp.asarray(rng.standard_normal((8, 1, values), np.float32))
    return y, jnp.asarray(rng.standard_normal((8, 1, values), np.float32), dtype)


@pytest.mark.parametrize("axes", [("tensor",), ("expert", "tensor"), ("data",)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_each_group_of_devices_adds_up(axes, dtype):
    y, residual = arrays(dtype)
    # Backends that have no kernel here, and no exchange: the reference.
    kernels = ("mosaic_gpu", "triton")
    got = on_each(partial(all_reduce, axes=axes, kernels=kernels))(y, residual)
    assert got.dtype == residual.dtype
    at = tuple(list(SIZES).index(axis) for axis in axes)
    summed = np.asarray(y).reshape(2, 2, 2, -1).sum(axis=at, keepdims=True)
    summed = np.broadcast_to(summed, (2, 2, 2, BLOCK)).reshape(y.shape)
    rounded = jnp.asarray(summed, dtype).astype(jnp.float32)
    wanted = np.asarray(residual, np.float32) + np.asarray(rounded)
    tolerance = 1e-6 if dtype == "float32" else 2**-7
    np.testing.assert_allclose(np.asarray(got, np.float32), wanted, rtol=tolerance, atol=tolerance)


def held(axes=("expert", "tensor"), values=4 * BLOCK):
    return exchange.on(MESH, axes, values)


def reason(y, residual, given, axes=("expert", "tensor")):
    """What the kernel says against a sum; None if nothing."""
    reasons = []

    def ask(y, residual, given):
        reasons.append(mosaic_gpu.unsupported(y, residual, given, axes))
        return y

    jax.eval_shape(on_each(ask), y, residual, given)
    return reasons[0]


def test_what_the_kernel_takes():
    y, residual = arrays()
    assert reason(y, residual, held()) is None
    assert reason(y, residual, held(), ("tensor", "expert")) is None  # in any order
    assert "no memory that the devices share" in reason(y, residual, None)
    assert "is for sums over ('tensor',)" in reason(y, residual, held(("tensor",)))
    assert "float32 to bfloat16" in reason(*arrays("float32"), held())
    assert "not a multiple of 512" in reason(*arrays(values=96), held())
    assert "more than the exchange's 2048" in reason(*arrays(values=5 * BLOCK), held())
    with backends.interpreted():
        assert "the simulator" in reason(y, residual, held())


def test_memory_of_an_exchange():
    given = held(values=BLOCK + 1)
    assert given.values == 2 * BLOCK  # whole blocks
    # Twice, from each of four devices, values with numbers beside them; and a counter a block.
    assert given.words.shape == (8, 2 * 4 * 2 * 2 * BLOCK + 2)
    assert not given.words.any()
    assert {s.data.shape[0] for s in given.words.addressable_shards} == {1}


def test_axes_of_one_device_are_left_out():
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 2), ("expert", "tensor"))
    assert exchange.on(mesh, ("expert", "tensor"), 1).axes == ("tensor",)


def hopper(number):
    return SimpleNamespace(
        id=number,
        platform="gpu",
        device_kind="NVIDIA H100 80GB HBM3",
        compute_capability="9.0",
        client=SimpleNamespace(platform_version="cuda 13000"),
    )


def mesh_of(*numbers):
    devices = np.array([hopper(n) for n in numbers])
    return SimpleNamespace(devices=devices, shape={"tensor": len(numbers)}, size=len(numbers))


def test_which_devices_can(monkeypatch):
    def why_not(mesh):
        return str(exchange.why_not(mesh, ("tensor",)))

    assert "this is cpu" in why_not(MESH)
    assert why_not(mesh_of(0, 1)) == "None"
    assert "1 devices add up" in why_not(mesh_of(0))
    assert "16 devices add up" in why_not(mesh_of(*range(16)))
    assert "numbered from 0 in its order" in why_not(mesh_of(2, 3))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert "other processes" in why_not(mesh_of(0, 1))


def on_mesh():
    """A model of two layers on four devices, and where it is."""
    lm = two_layers(mesh="expert=2,tensor=2")
    assert lm.placement is not None
    return lm, lm.placement


class TestModel:
    def test_without_hopper_all_is_left_to_xla(self):
        assert on_mesh()[0].model.exchange is None

    def test_devices_that_do_not_reach_each_other(self, monkeypatch):
        lm, placement = on_mesh()
        monkeypatch.setattr(exchange, "why_not", lambda *_: None)

        def fails(*_):
            raise jax.errors.JaxRuntimeError("no peer access")

        monkeypatch.setattr(packing.all_reduce, "tried_exchange", fails)
        with pytest.warns(UserWarning, match="left to XLA: no peer access"):
            packing.use_exchange(lm.model, placement, ("mosaic_gpu", "reference"))
        assert lm.model.exchange is None

    def test_it_goes_to_every_sum_of_a_layer(self, monkeypatch):
        lm, placement = on_mesh()
        asked = []
        by_xla = lm.logits([[5, 6, 7]])
        monkeypatch.setattr(exchange, "why_not", lambda *_: None)
        monkeypatch.setattr(packing.all_reduce, "tried_exchange", exchange.on)
        packing.use_exchange(lm.model, placement, ("triton", "reference"))
        assert lm.model.exchange is None  # a kernel of another backend
        packing.use_exchange(lm.model, placement, ("mosaic_gpu", "reference"))
        given = lm.model.exchange
        assert isinstance(given, Exchange)
        assert given.axes == ("expert", "tensor")
        assert 0 <= given.values - exchange.most_values(4) < exchange.BLOCK

        def refuses(y, residual, given, axes):
            asked.append((given.words.shape, axes))
            return "tests have no GPU"

        [kernel, reference] = packing.all_reduce.IMPLEMENTATIONS
        kernel = dataclasses.replace(kernel, unsupported=refuses)
        monkeypatch.setattr(packing.all_reduce, "IMPLEMENTATIONS", (kernel, reference))
        for part in lm.model.layers:
            for norm in (part.input_layernorm, part.post_attention_layernorm, part.self_attn):
                norm.kernels = ("mosaic_gpu", "reference")
        np.testing.assert_allclose(lm.logits([[5, 6, 7]]), by_xla, rtol=1e-5, atol=1e-5)
        # Of both layers' attention, and of the one with experts.
        assert asked == [((1, given.words.shape[1]), ("expert", "tensor"))] * 3
