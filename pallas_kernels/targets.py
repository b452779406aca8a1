"""Compiling for hardware that isn't there.

A CPU can lower a function for every platform, and compile it where the platform's compiler is
importable: jax's CUDA plugin with ptxas and libdevice for Hopper, libtpu for TPUs (`make compile`
installs both in a folder of their own, since jax starts every plugin that it finds).  Compiling
finds what lowering can't: layouts that have no instruction, shared memory or VMEM that doesn't
suffice, registers that spill.

Set JAX_PLATFORMS=cpu where compilers are importable, or jax tries to run programs on them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
)

from pallas_kernels.backends import Target


class RegisterSpillError(RuntimeError):
    """A kernel keeps values in memory because it has too few registers."""


class SerializedError(RuntimeError):
    """A kernel's matrix instructions wait for each other."""


# What has to be importable to compile for a platform, and the packages that it comes with.
_COMPILERS = {
    "tpu": ("libtpu", "libtpu"),
    "cuda": (
        "jax_plugins.xla_cuda13",
        "jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm",
    ),
}


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A kind of device to lower and compile for.

    Attributes:
      name: what it is called here.
      target: what `pallas_kernels.backends` chooses by.
      cores: streaming multiprocessors of a GPU, tensor cores of a TPU device.
      topology: in the form of `jax.experimental.topologies`.
    """

    name: str
    target: Target
    cores: int
    topology: str

    def why_not_compile(self) -> str | None:
        """Why its compiler can't be used here; None if it can."""
        module, packages = _COMPILERS["tpu" if self.target.platform == "tpu" else "cuda"]
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found:
            return None
        return (
            f"no compiler for {self.name}: {module} isn't importable; run `make compile` in the "
            f"repository, or pip install --no-deps --target .compilers {packages}"
        )

    def devices(self) -> list[Any]:
        """Devices of its topology, to make meshes of; they exist only for the compiler."""
        return list(_topology(self).devices)


def _tpu(name: str, kind: str, topology: str, cores: int = 1) -> Hardware:
    return Hardware(name, Target("tpu", kind), cores, f"{name}:{topology}")


HOPPER = Hardware("hopper", Target("cuda", "NVIDIA H100 80GB HBM3", 90), 132, "1x1x8")
AMPERE = Hardware("ampere", Target("cuda", "NVIDIA A100-SXM4-80GB", 80), 108, "1x1x8")
BLACKWELL = Hardware("blackwell", Target("cuda", "NVIDIA B200", 100), 148, "1x1x8")
GPUS = (HOPPER, AMPERE, BLACKWELL)
V4 = _tpu("v4", "TPU v4", "2x2x1", cores=2)
V5E = _tpu("v5e", "TPU v5 lite", "2x4")
V6E = _tpu("v6e", "TPU v6 lite", "2x4")
V5P = _tpu("v5p", "TPU v5", "2x2x2", cores=2)
TPU7X = _tpu("tpu7x", "TPU7x", "2x2x1")
TPUS = (V5E, V6E, V5P, TPU7X)  # those that the kernels are tested for

# XLA's description of a GPU in its own format, as jax reports it on an H100.
_GPU_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock}
  device_memory_size: {memory} shared_memory_per_block_optin: {block_shared}
  cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" device_address_bits: 64 name: "{name}"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""
# The H100's figures are those that jax reports on one; the others' are the vendor's.
_GPU_FIGURES: dict[str, dict[str, Any]] = {
    "hopper": {
        "shared": 233472, "block_shared": 232448, "fpus": 128, "clock": 1.98,
        "bandwidth": 3352320000000, "l2": 52428800, "memory": 84942979072,
    },
    "ampere": {
        "shared": 167936, "block_shared": 166912, "fpus": 64, "clock": 1.41,
        "bandwidth": 2039000000000, "l2": 41943040, "memory": 85899345920,
    },
    "blackwell": {
        "shared": 233472, "block_shared": 232448, "fpus": 128, "clock": 1.965,
        "bandwidth": 8000000000000, "l2": 132644864, "memory": 192000000000,
    },
}  # fmt: skip


@functools.cache
def _topology(hardware: Hardware) -> Any:
    reason = hardware.why_not_compile()
    if reason is not None:
        raise RuntimeError(reason)
    if hardware.target.platform == "tpu":
        # libtpu otherwise asks a metadata server what machine it is on, and is for one process.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        # A v4 chip's two cores are one device, as they are for programs that run on one.
        options = {"chip_config_name": "megacore"} if hardware.name == "v4" else {}
        return topologies.get_topology_desc(hardware.topology, "tpu", **options)
    config = _GPU_CONFIG.format(
        name=hardware.target.kind,
        major=hardware.target.capability // 10,
        cores=hardware.cores,
        **_GPU_FIGURES[hardware.name],
    )
    return topologies.get_topology_desc(
        hardware.topology, "cuda", target_config=config, topology=hardware.topology
    )


def trace(hardware: Hardware, f: Callable, *args: Any, mesh: Mesh | None = None) -> Any:
    """Traces `f` as a device would; needs no compiler of it.

    Args:
      hardware: the device.
      f: takes arrays; jitted or not.
      args: arrays or `jax.ShapeDtypeStruct`s, in any pytrees, placed on the mesh if there is one.
      mesh: of the hardware's `devices()`; None for one device.

    Returns:
      What `jax.jit(f).trace(*args)` returns on the device, for `lower_traced`.
    """
    jitted = f if hasattr(f, "trace") else jax.jit(f)
    with _as_if_on(hardware, mesh):
        return jitted.trace(*args)


def lower_traced(hardware: Hardware, traced: Any, mesh: Mesh | None = None) -> Any:
    """Lowers what `trace` returned for the same device and mesh."""
    with _as_if_on(hardware, mesh):
        return traced.lower(lowering_platforms=(hardware.target.platform,))


def lower(hardware: Hardware, f: Callable, *args: Any, mesh: Mesh | None = None) -> Any:
    """Traces and lowers `f` for a device; needs no compiler of it.  Arguments as of `trace`.

    Returns:
      What `jax.jit(f).lower(*args)` returns on the device.
    """
    return lower_traced(hardware, trace(hardware, f, *args, mesh=mesh), mesh)


def _as_if_on(hardware: Hardware, mesh: Mesh | None) -> Any:
    """A context in which the device is there."""
    sizes, names, types = (1,), ("device",), (AxisType.Auto,)
    if mesh is not None:
        sizes, names, types = mesh.axis_sizes, mesh.axis_names, mesh.axis_types
    platform = hardware.target.platform
    kind = AbstractDevice(
        device_kind=hardware.target.kind,
        num_cores=hardware.cores,
        platform="gpu" if platform == "cuda" else platform,
    )
    # Kernels look the device up.
    described = AbstractMesh(sizes, names, types, abstract_device=kind)
    return jax.sharding.use_abstract_mesh(described)


# Of Mosaic GPU kernels, by their hashes: what ptxas reported of the program they were first in.
_reports: dict[str, list[str]] = {}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program.

    Attributes:
      program: what `jax.stages.Lowered.compile` returned; its `memory_analysis` works.
      registers: registers a thread of each Mosaic GPU kernel, by the kernel's name.
    """

    program: Any
    registers: dict[str, int]


def placed(arrays: Any, sharding: NamedSharding) -> Any:
    """Shapes of arrays in any pytree, to compile for."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arrays)


def compile(
    hardware: Hardware,
    f: Callable,
    *args: Any,
    mesh: Mesh | None = None,
    spills: bool = False,
) -> Compiled:
    """Compiles `f` for a device.

    Args:
      hardware: the device, as of `lower`.
      f: as of `lower`.
      args: as of `lower`.
      mesh: as of `lower`; without a mesh all is on the first device.
      spills: let kernels of a GPU spill registers, and serialize matrix instructions.

    Raises:
      RegisterSpillError: a Triton or Mosaic GPU kernel spills registers.
      SerializedError: ptxas makes matrix instructions of a Mosaic GPU kernel wait for each other.
      RuntimeError: the compiler isn't here (`make compile`).
    """
    if mesh is None:
        args = on_first_device(hardware, args)
    return compile_lowered(hardware, lower(hardware, f, *args, mesh=mesh), spills=spills)


def on_first_device(hardware: Hardware, arrays: Any) -> Any:
    """Shapes of arrays in any pytree, placed on the first of the hardware's devices."""
    one = Mesh(np.array(hardware.devices()[:1]), ("device",))
    return placed(arrays, NamedSharding(one, PartitionSpec()))


def compile_lowered(hardware: Hardware, lowered: Any, *, spills: bool = False) -> Compiled:
    """Compiles what `lower` or `lower_traced` returned; errors as of `compile`."""
    if hardware.target.platform == "tpu":
        return Compiled(lowered.compile(), {})
    with tempfile.TemporaryDirectory() as folder, _mosaic_gpu_dumps(folder):
        try:
            options = {"xla_gpu_fail_ptx_compilation_on_register_spilling": not spills}
            program = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "register spilling" in str(error):  # of Triton: XLA compiles those kernels
                raise RegisterSpillError("a kernel spills registers") from error
            raise
        new = [d.read_text() for d in sorted(Path(folder).glob("*.ptxas"))]
    registers = {}
    for kernel in re.findall(r'kernel_hash = "([^"]*)"', lowered.as_text()):
        # A kernel that this process has compiled before is not compiled or reported again.
        for report in _reports.setdefault(kernel, new):
            registers |= _registers(report, spills)
        if not _reports[kernel]:
            raise RuntimeError("Mosaic GPU wrote no report of a kernel")
    return Compiled(program, registers)


class _mosaic_gpu_dumps:  # noqa: N801
    """Mosaic GPU writes ptxas' reports to a folder while in this context."""

    def __init__(self, folder: str):
        self.settings = {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTXAS": "1"}

    def __enter__(self) -> None:
        self.before = {k: os.environ.get(k) for k in self.settings}
        os.environ.update(self.settings)

    def __exit__(self, *_: object) -> None:
        for name, value in self.before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _registers(report: str, spills: bool) -> dict[str, int]:
    """Registers a thread of a kernel, from a report of ptxas -v."""
    name = re.search(r"entry function '(\w+?)(?:_mosaic_gpu_kernel)?'", report)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    used = re.search(r"Used (\d+) registers", report)
    if not (name and spilled and used):
        raise RuntimeError(f"no registers in what ptxas reports: {report}")
    if any(int(n) for n in spilled) and not spills:
        raise RegisterSpillError(f"{name[1]} spills registers: {report.strip()}")
    if "serialized" in report and not spills:  # C7512 and the like
        raise SerializedError(f"matrix instructions of {name[1]} are serialized: {report.strip()}")
    return {name[1]: int(used[1])}
