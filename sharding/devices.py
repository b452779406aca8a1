"""Kinds of devices: their memory, and how fast they read it, multiply and exchange.

Figures are those of one device as JAX counts them, which on tpu7x is half a chip.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Literal

from sharding.memory import GIB, host_memory

# measured: on that kind of device, by the project (shared/KERNEL_NOTES.md 1 and 2).
# compiler: the limit that XLA's compiler for that kind states.
# datasheet: the vendor's.  The H100 and the H200 reached 90% of theirs in memory bandwidth and
# 80% in bf16 FLOP/s, so rooflines from datasheets are optimistic by about as much.
# assumed: taken over from a device that is alike, or arithmetic.
Source = Literal["measured", "compiler", "datasheet", "assumed"]


class DeviceError(ValueError):
    """No such kind of device; the message lists those there are."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number of a device, and where it comes from."""

    value: int | float
    source: Source


@dataclasses.dataclass(frozen=True)
class Device:
    """One kind of device; None where a figure is not known.

    Attributes:
      name: short name, as on the command line.
      kinds: what JAX calls it (`jax.Device.device_kind`); other spellings are aliases.
      memory: bytes it has.
      usable: bytes of these that programs can have.
      bandwidth: bytes it can read from its memory a second.
      flops: dense bfloat16 FLOPs a second.
      interconnect: bytes a second it can send to its neighbours, over all links together, while
        it receives as many.
      latency: seconds of an all-reduce of a few kB, by XLA.
      direct_latency: the same, where the devices of a host write into each other's memory.
      domain: how many devices that interconnect reaches.
      shared: the devices of a host are one, and share its memory.
    """

    name: str
    kinds: tuple[str, ...]
    memory: Figure
    usable: Figure
    bandwidth: Figure | None = None
    flops: Figure | None = None
    interconnect: Figure | None = None
    latency: Figure | None = None
    direct_latency: Figure | None = None
    domain: int | None = None
    shared: bool = False

    def not_measured(self) -> dict[str, Source]:
        """The figures that nobody measured, and where they come from."""
        figures = {
            "usable memory": self.usable,
            "bandwidth": self.bandwidth,
            "FLOP/s": self.flops,
            "interconnect": self.interconnect,
            "latency": self.latency,
            "direct latency": self.direct_latency,
        }
        return {k: f.source for k, f in figures.items() if f and f.source != "measured"}


# The part of what nvidia-smi reports that JAX could allocate, XLA_PYTHON_CLIENT_MEM_FRACTION=.98:
# 77 of 79.65 GiB (H100), 137.0 of 140.4 GiB (H200).  The smaller one is assumed of other GPUs.
_GPU_USABLE = 0.967
# Assumed of GPUs where it was not measured, since it is launches and hand-shakes more than bytes.
_GPU_LATENCY = Figure(20e-6, "assumed")
# Ten hops at about 1 us each: nobody has measured MiMo's reductions on a TPU.
_TPU_LATENCY = Figure(10e-6, "assumed")

_GPUS = (
    Device(
        "h100",
        ("NVIDIA H100 80GB HBM3",),
        memory=Figure(81_559 * 2**20, "datasheet"),  # nvidia-smi, of "80 GB"
        usable=Figure(77 * GIB, "measured"),
        bandwidth=Figure(3.01e12, "measured"),  # copy, read + write; datasheet 3.35e12
        flops=Figure(798e12, "measured"),  # 8192^3; datasheet 989e12
        interconnect=Figure(450e9, "datasheet"),  # NVLink 4: 900 GB/s, both directions together
        latency=Figure(18e-6, "measured"),  # four, 6144 values, a kernel around them
        direct_latency=Figure(7.2e-6, "measured"),  # the same, less their bytes' 0.3
        domain=8,  # an HGX board
    ),
    Device(
        "h200",
        ("NVIDIA H200",),
        memory=Figure(143_771 * 2**20, "datasheet"),  # nvidia-smi, of "141 GB"
        usable=Figure(137 * GIB, "measured"),
        bandwidth=Figure(4.3e12, "measured"),  # copy, read + write; datasheet 4.8e12
        flops=Figure(790e12, "measured"),  # 8192^3; datasheet 989e12
        interconnect=Figure(450e9, "datasheet"),  # NVLink 4: 900 GB/s, both directions together
        latency=Figure(20e-6, "measured"),  # 15 to 25 us on four, 6144 values
        direct_latency=Figure(6.9e-6, "measured"),  # four, as of the H100; two have 5.8
        domain=8,  # an HGX board
    ),
    Device(
        "b200",
        ("NVIDIA B200",),
        memory=Figure(179 * GIB, "datasheet"),  # nvidia-smi, of "180 GB"
        usable=Figure(int(_GPU_USABLE * 179 * GIB), "assumed"),
        bandwidth=Figure(8.0e12, "datasheet"),
        flops=Figure(2.25e15, "datasheet"),
        interconnect=Figure(900e9, "datasheet"),  # NVLink 5: 1.8 TB/s, both directions together
        latency=_GPU_LATENCY,
        domain=8,  # an HGX board; 72 in an NVL72 rack
    ),
    Device(
        "a100",
        ("NVIDIA A100-SXM4-80GB",),
        memory=Figure(80 * GIB, "datasheet"),  # nvidia-smi
        usable=Figure(int(_GPU_USABLE * 80 * GIB), "assumed"),
        bandwidth=Figure(2.039e12, "datasheet"),
        flops=Figure(312e12, "datasheet"),
        interconnect=Figure(300e9, "datasheet"),  # NVLink 3: 600 GB/s, both directions together
        latency=_GPU_LATENCY,
        domain=8,  # an HGX board
    ),
)

# Usable memory of TPUs is what libtpu 0.0.48 lets a program allocate, asked by compiling one that
# is too large.  The other figures are those of docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,
# tpu7x}; it gives the interconnect (ICI) of a chip in both directions together.
_TPUS = (
    Device(
        "v4",
        ("TPU v4",),  # one device a chip: its two cores work as one (megacore)
        memory=Figure(32 * GIB, "datasheet"),
        usable=Figure(int(30.75 * GIB), "compiler"),
        bandwidth=Figure(1.228e12, "datasheet"),
        flops=Figure(275e12, "datasheet"),
        interconnect=Figure(300e9, "datasheet"),
        latency=_TPU_LATENCY,
        domain=4096,
    ),
    Device(
        "v5e",
        ("TPU v5 lite", "TPU v5e"),
        memory=Figure(16 * GIB, "datasheet"),
        usable=Figure(int(15.75 * GIB), "compiler"),
        bandwidth=Figure(819e9, "datasheet"),
        flops=Figure(197e12, "datasheet"),
        interconnect=Figure(200e9, "datasheet"),
        latency=_TPU_LATENCY,
        domain=256,
    ),
    Device(
        "v5p",
        ("TPU v5", "TPU v5p"),  # one device a chip: its two cores work as one (megacore)
        memory=Figure(95 * GIB, "datasheet"),
        usable=Figure(int(95.73 * GIB), "compiler"),  # more than the documented 95, of 96
        bandwidth=Figure(2.765e12, "datasheet"),  # jax's own table of TPUs has 2.46e12
        flops=Figure(459e12, "datasheet"),
        interconnect=Figure(600e9, "datasheet"),
        latency=_TPU_LATENCY,
        domain=6144,  # the largest slice
    ),
    Device(
        "v6e",
        ("TPU v6 lite", "TPU v6e"),
        memory=Figure(32 * GIB, "datasheet"),
        usable=Figure(int(31.24 * GIB), "compiler"),
        bandwidth=Figure(1.638e12, "datasheet"),
        flops=Figure(918e12, "datasheet"),
        interconnect=Figure(400e9, "datasheet"),
        latency=_TPU_LATENCY,
        domain=256,
    ),
    Device(
        "tpu7x",
        ("TPU7x",),  # two devices a chip, each with a core and half of everything
        memory=Figure(192 * GIB // 2, "datasheet"),
        usable=Figure(int(94.74 * GIB), "compiler"),
        bandwidth=Figure(7.38e12 / 2, "datasheet"),
        flops=Figure(2307e12 / 2, "datasheet"),
        interconnect=Figure(600e9 / 2, "datasheet"),
        latency=_TPU_LATENCY,
        domain=9216 * 2,
    ),
)

_KNOWN = {device.name: device for device in _GPUS + _TPUS}
NAMES = (*_KNOWN, "cpu")


def find_device(name: str) -> Device:
    """The device of that name, or that JAX calls so; upper and lower case are the same.

    Raises:
      DeviceError: there is none.
    """
    wanted = name.strip().lower()
    if wanted == "cpu":
        return _cpu()
    for device in _KNOWN.values():
        if wanted in (device.name, *map(str.lower, device.kinds)):
            return device
    kinds = ", ".join(f"{d.name} ({d.kinds[0]})" for d in _KNOWN.values())
    raise DeviceError(f"no device is called {name!r}; there are {kinds} and cpu")


def _cpu() -> Device:
    """This machine's processor, whose speed is not known."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = host_memory()
    usable = Figure(memory, "assumed") if free is None else Figure(free, "measured")
    return Device("cpu", (), Figure(memory, "measured"), usable, shared=True)
