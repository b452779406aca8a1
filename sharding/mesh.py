"""Device meshes with the axes data, expert and tensor, in JAX's explicit mode."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh

AXES: tuple[str, ...] = ("data", "expert", "tensor")


class MeshError(ValueError):
    """A mesh that cannot be made; the message says what to ask for instead."""


class NoDevicesError(OSError):
    """jax finds no devices of the platforms that it is to use; an OSError, since the cause is in
    the process's surroundings."""


def all_devices() -> list[Any]:
    """All devices of all processes, the default one first.

    Raises:
      NoDevicesError: there are none of the platforms that JAX_PLATFORMS names.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # it asserts that some plugin was found
        asked = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        said = str(error).partition(" (set JAX_PLATFORMS")[0] or f"no plugin for {asked}"
        raise NoDevicesError(
            f"jax finds no device of the platforms {asked} ({said}); install jax's plugin for "
            "them, or set JAX_PLATFORMS to those that are here (cpu is), or to nothing"
        ) from error


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes by axis from text such as "expert=2,tensor=4"; axes not named have size 1.

    Raises:
      MeshError: the text is malformed, names an unknown axis or one twice, or a size is not
        positive.
    """
    sizes = dict.fromkeys(AXES, 1)
    seen = set()
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = re.fullmatch(r"(\w+)\s*=\s*(\d+)", part)
        if match is None:
            raise MeshError(f'mesh {text!r}: {part!r} is not AXIS=SIZE; write "expert=2,tensor=4"')
        axis, size = match[1], int(match[2])
        if axis not in AXES:
            raise MeshError(f"mesh {text!r}: there is no axis {axis!r}; axes are {', '.join(AXES)}")
        if axis in seen:
            raise MeshError(f"mesh {text!r} names {axis!r} twice; give each axis one size")
        if size < 1:
            raise MeshError(f"mesh {text!r}: {axis}={size} must be at least 1")
        seen.add(axis)
        sizes[axis] = size
    return sizes


def make_mesh(mesh: str | Mesh, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh in explicit mode.

    Args:
      mesh: text such as "expert=2,tensor=4", or a mesh, whose axes must be in explicit mode and
        among `AXES`; those it lacks are added with size 1.
      devices: to take the first of; all devices of all processes by default.

    Raises:
      MeshError: there are fewer devices than the mesh needs, processes would be left without one,
        or a given mesh has other axes or another mode.
      NoDevicesError: there are no devices at all.
    """
    if isinstance(mesh, Mesh):
        return _checked(mesh)
    if not isinstance(mesh, str):
        raise MeshError(
            f"mesh is {mesh!r} of type {type(mesh).__name__}; give text such as "
            '"expert=2,tensor=4", or a jax Mesh'
        )
    sizes = parse_mesh(mesh)
    devices = list(all_devices() if devices is None else devices)
    needed = math.prod(sizes.values())
    if needed > len(devices):
        raise MeshError(
            f"mesh {describe(sizes)} needs {needed} devices, but there are {len(devices)} "
            f"({devices[0].device_kind}); ask for a smaller mesh"
        )
    chosen = devices[:needed]
    idle = {d.process_index for d in devices} - {d.process_index for d in chosen}
    if idle:
        raise MeshError(
            f"mesh {describe(sizes)} uses {needed} of {len(devices)} devices and leaves processes "
            f"{sorted(idle)} without any; use all devices, or start fewer processes"
        )
    # An axis may be a part of a TPU's physical one, or parts of several: eight of 4x4x4 chips.
    grid = create_device_mesh(tuple(sizes.values()), chosen, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def describe(sizes: Any) -> str:
    """A mesh as text: "data=2,tensor=4"; axes of size 1 are left out."""
    shape = dict(sizes.shape) if isinstance(sizes, Mesh) else dict(sizes)
    return ",".join(f"{a}={n}" for a, n in shape.items() if n > 1) or "one device"


def use(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """The context in which arrays on `mesh` are computed with; nothing for None."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def _checked(mesh: Mesh) -> Mesh:
    unknown = [a for a in mesh.axis_names if a not in AXES]
    if unknown:
        raise MeshError(f"the mesh has axes {unknown}; mimo-jax knows {', '.join(AXES)}")
    if any(t != AxisType.Explicit for t in mesh.axis_types):
        raise MeshError(
            "the mesh's axes are not in explicit mode; make it with jax.make_mesh(..., "
            "axis_types=(AxisType.Explicit,) * n) or give its text, such as 'tensor=4'"
        )
    shape = dict(mesh.shape)
    if tuple(mesh.axis_names) == AXES:
        return mesh
    names = tuple(mesh.axis_names) + tuple(a for a in AXES if a not in shape)
    grid = mesh.devices.reshape(*mesh.devices.shape, *[1] * (len(AXES) - len(shape)))
    order = [names.index(a) for a in AXES]
    return Mesh(grid.transpose(order), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
