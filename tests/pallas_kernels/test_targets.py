"""Lowering for hardware that isn't there, and its names."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import backends, targets


@pytest.mark.parametrize("hardware", [targets.HOPPER, *targets.TPUS], ids=lambda h: h.name)
def test_lowers_without_a_compiler(hardware):
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    kinds = []

    def f(x):
        mesh = jax.sharding.get_abstract_mesh()
        kinds.append(mesh.abstract_device.device_kind)
        return jax.lax.platform_dependent(x, cuda=jnp.sin, tpu=jnp.cos, default=jnp.tan)

    text = targets.lower(hardware, f, x).as_text()
    expected = {"cuda": "sine", "tpu": "cosine"}[hardware.target.platform]
    assert f"stablehlo.{expected} " in text
    assert kinds == [hardware.target.kind]


def test_backends_of_hardware_that_is_not_there():
    def names(hardware):
        return [n for n in backends.NAMES if backends.why_not(n, hardware.target) is None]

    assert names(targets.HOPPER) == ["mosaic_gpu", "triton"]
    assert all(names(tpu) == ["mosaic_tpu"] for tpu in targets.TPUS)


def test_compiling_without_a_compiler_says_so(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda _: None)
    assert "libtpu isn't importable" in (targets.V5E.why_not_compile() or "")
