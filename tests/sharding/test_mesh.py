import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from sharding.mesh import AXES, MeshError, describe, make_mesh, parse_mesh


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("", (1, 1, 1)),
        ("tensor=4", (1, 1, 4)),
        ("expert=2,tensor=4", (1, 2, 4)),
        (" tensor = 2 , data=3 ", (3, 1, 2)),
    ],
)
def test_text(text, sizes):
    assert parse_mesh(text) == dict(zip(AXES, sizes, strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensor", "'tensor' is not AXIS=SIZE"),
        ("tensor=two", "is not AXIS=SIZE"),
        ("model=2", "no axis 'model'; axes are data, expert, tensor"),
        ("tensor=2,tensor=4", "names 'tensor' twice"),
        ("tensor=0", "tensor=0 must be at least 1"),
    ],
)
def test_malformed_text(text, message):
    with pytest.raises(MeshError, match=message):
        parse_mesh(text)


def test_mesh_is_explicit_and_has_all_axes():
    mesh = make_mesh("expert=2,tensor=2")
    assert dict(mesh.shape) == {"data": 1, "expert": 2, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Explicit}
    assert list(mesh.devices.flat) == jax.devices()[:4]
    assert describe(mesh) == "expert=2,tensor=2"
    assert describe(make_mesh("")) == "one device"


def test_more_devices_than_there_are():
    with pytest.raises(MeshError, match=r"tensor=16 needs 16 devices, but there are 8 \(cpu\)"):
        make_mesh("tensor=16")


def test_given_meshes():
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    mesh = jax.sharding.Mesh(devices, ("tensor", "data"), axis_types=(AxisType.Explicit,) * 2)
    made = make_mesh(mesh)
    assert tuple(made.axis_names) == AXES
    assert dict(made.shape) == {"data": 2, "expert": 1, "tensor": 2}
    assert made.devices[1, 0, 0] == devices[0, 1]  # data=1, tensor=0
    assert make_mesh(made) is made


def test_given_meshes_of_another_kind():
    devices = np.array(jax.devices()[:2])
    with pytest.raises(MeshError, match="not in explicit mode"):
        make_mesh(jax.sharding.Mesh(devices, ("tensor",), axis_types=(AxisType.Auto,)))
    with pytest.raises(MeshError, match=r"axes \['model'\]; mimo-jax knows data"):
        make_mesh(jax.sharding.Mesh(devices, ("model",), axis_types=(AxisType.Explicit,)))
