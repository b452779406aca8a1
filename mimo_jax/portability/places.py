"""Where a program is tried: kinds of devices by name, with a topology, that need not be there."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax

from pallas_kernels import targets
from pallas_kernels.backends import NAMES, REFERENCE, Target, resolve, why_not
from pallas_kernels.mosaic_tpu import converts_e2m1
from pallas_kernels.targets import Hardware
from sharding.devices import Device, DeviceError, find_device

CPU = "cpu"
HERE = "here"
HARDWARE = {h.name: h for h in (*targets.GPUS, targets.V4, *targets.TPUS)}
# The device of `sharding.devices` that a kind of GPU is compiled as.
_GPUS = {"hopper": "h100", "ampere": "a100", "blackwell": "b200"}
# GPUs of a machine.
_MACHINE = 8
# Sizes of a topology: more digits than these no slice has.
_SIZE = "[1-9][0-9]{0,4}"
_SIZES = f"{_SIZE}(x{_SIZE})+"


class PlaceError(ValueError):
    """There is no such target; the message lists those there are."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A kind of device, and how many of them.

    Attributes:
      name: as it was asked for: "cpu", "hopper:8", "v5p:4x4x4"; of devices that are present, their
        kind in `sharding.devices`, such as "h100".
      kind: the name without the topology.
      hardware: to compile for; None of what is present.
      devices: how many.
    """

    name: str
    kind: str
    hardware: Hardware | None
    devices: int

    @property
    def target(self) -> Target:
        """What kernels are chosen by."""
        if self.hardware is not None:
            return self.hardware.target
        return Target.of(jax.devices("cpu")[0] if self.kind == CPU else None)

    @property
    def device(self) -> Device | None:
        """Its memory and speeds; None of a CPU, and of what isn't known."""
        if self.kind == CPU:
            return None
        try:
            return find_device(_GPUS.get(self.kind, self.kind))
        except DeviceError:
            return None

    @property
    def native_e2m1(self) -> bool:
        """Whether weights are packed for conversion by the device."""
        return self.target.platform == "tpu" and converts_e2m1(self.target)

    @property
    def mesh(self) -> str:
        """How devices are arranged for a step."""
        return arranged(self.devices)

    def backends(self) -> dict[str, str | None]:
        """Each backend's name, and why it can't run here, if so."""
        reasons: dict[str, str | None] = {n: why_not(n, self.target) for n in NAMES}
        return {REFERENCE: None, **reasons}

    def allowed(self, kernels: str) -> tuple[str, ...]:
        """The backends that `kernels` stands for; `BackendError` if they don't run here."""
        return resolve(kernels, self.target)

    def topology_devices(self) -> list[Any]:
        """The devices that there are, or that exist for a compiler only."""
        if self.hardware is None:
            return list(jax.devices("cpu") if self.kind == CPU else jax.devices())
        return self.hardware.devices()


def find_place(name: str, present: str = "") -> Place:
    """The target of that name.

    Args:
      name: "cpu"; "here" for the accelerator that is present; a kind of `HARDWARE`, with the number
        of GPUs or the topology of a TPU slice behind a colon, or one device without.
      present: kind of that accelerator, where a process isn't to ask jax for it and so take it.

    Raises:
      PlaceError: there is none.
    """
    kind, colon, size = name.strip().lower().partition(":")
    if kind in (CPU, HERE):
        if colon:
            raise PlaceError(f"target {name!r}: {kind} has no topology")
        kind = kind if kind == CPU else present or present_kind()
        return Place(kind, kind, None, 1)
    if kind not in HARDWARE:
        known = ", ".join((CPU, HERE, *HARDWARE))
        raise PlaceError(f"there is no target {name!r}; there are {known}")
    hardware = HARDWARE[kind]
    if not colon:
        return Place(kind, kind, hardware, 1)
    if hardware.target.platform == "tpu":
        example = "4x4" if hardware.topology.partition(":")[2].count("x") == 1 else "4x4x4"
        if re.fullmatch(_SIZES, size) is None or size.count("x") != example.count("x"):
            raise PlaceError(f"target {name!r}: write chips of a slice as {kind}:{example}")
        count = slice_devices(kind, size)
        largest = find_device(kind).domain
        if largest is not None and count > largest:
            raise PlaceError(f"target {name!r}: a slice has at most {largest} devices")
        hardware = dataclasses.replace(hardware, topology=f"{kind}:{size}")
        return Place(f"{kind}:{size}", kind, hardware, count)
    if re.fullmatch(_SIZE, size) is None:
        raise PlaceError(f"target {name!r}: write how many GPUs, as {kind}:8")
    count = int(size)
    if count > _MACHINE and count % _MACHINE:
        raise PlaceError(f"target {name!r}: more than {_MACHINE} GPUs are whole machines of them")
    machines = max(1, count // _MACHINE)
    topology = f"1x{machines}x{count // machines}"
    return Place(f"{kind}:{count}", kind, dataclasses.replace(hardware, topology=topology), count)


def slice_devices(kind: str, topology: str) -> int:
    """Devices, as JAX counts them, of so many chips: a tpu7x chip is two."""
    return math.prod(map(int, topology.split("x"))) * (2 if kind == "tpu7x" else 1)


def arranged(devices: int) -> str:
    """A mesh of so many: as many as eight along tensor, the rest along expert; "" for one."""
    tensor = math.gcd(devices, 8)
    sizes = {"expert": devices // tensor, "tensor": tensor}
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)


def present_kind() -> str:
    """What kind of accelerator jax finds on this machine.

    Raises:
      PlaceError: it finds none.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        raise PlaceError("target 'here': jax finds no accelerator on this machine")
    try:
        return find_device(device.device_kind).name
    except DeviceError:
        return device.device_kind.lower().replace(" ", "-")
