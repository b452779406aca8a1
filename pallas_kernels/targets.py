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
        module = "libtpu" if self.target.platform == "tpu" else "jax_plugins.xla_cuda13"
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        return None if found else f"no compiler for {self.name}: {module} isn't importable"

    def devices(self) -> list[Any]:
        """Devices of its topology, to make meshes of; they exist only for the compiler."""
        return list(_topology(self).devices)


def _tpu(name: str, kind: str, topology: str, cores: int = 1) -> Hardware:
    return Hardware(name, Target("tpu", kind), cores, f"{name}:{topology}")


HOPPER = Hardware("hopper", Target("cuda", "NVIDIA H100 80GB HBM3", 90), 132, "1x1x8")
V5E = _tpu("v5e", "TPU v5 lite", "2x4")
V6E = _tpu("v6e", "TPU v6 lite", "2x4")
V5P = _tpu("v5p", "TPU v5", "2x2x2", cores=2)
TPU7X = _tpu("tpu7x", "TPU7x", "2x2x1")
TPUS = (V5E, V6E, V5P, TPU7X)

# XLA's description of the GPU named here, as jax reports it on one.
_HOPPER_CONFIG = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" device_address_bits: 64 name: "NVIDIA H100 80GB HBM3"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


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
        return topologies.get_topology_desc(hardware.topology, "tpu")
    return topologies.get_topology_desc(
        hardware.topology, "cuda", target_config=_HOPPER_CONFIG, topology=hardware.topology
    )


def lower(hardware: Hardware, f: Callable, *args: Any, mesh: Mesh | None = None) -> Any:
    """Lowers `f` for a device; needs no compiler of it.

    Args:
      hardware: the device.
      f: takes arrays; jitted or not.
      args: arrays or `jax.ShapeDtypeStruct`s, in any pytrees, placed on the mesh if there is one.
      mesh: of the hardware's `devices()`; None for one device.

    Returns:
      What `jax.jit(f).lower(*args)` returns on the device.
    """
    sizes, names, types = (1,), ("device",), (AxisType.Auto,)
    if mesh is not None:
        sizes, names, types = mesh.axis_sizes, mesh.axis_names, mesh.axis_types
    platform = hardware.target.platform
    kind = AbstractDevice(
        device_kind=hardware.target.kind,
        num_cores=hardware.cores,
        platform="gpu" if platform == "cuda" else platform,
    )
    jitted = f if hasattr(f, "trace") else jax.jit(f)
    with jax.sharding.use_abstract_mesh(
        AbstractMesh(sizes, names, types, abstract_device=kind)  # kernels look the device up
    ):
        return jitted.trace(*args).lower(lowering_platforms=(platform,))


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
      hardware, f, args, mesh: as of `lower`; without a mesh all is on the first device.
      spills: let kernels of a GPU spill registers, and serialize matrix instructions.

    Raises:
      RegisterSpillError: a Triton or Mosaic GPU kernel spills registers.
      SerializedError: ptxas makes matrix instructions of a Mosaic GPU kernel wait for each other.
      RuntimeError: the compiler isn't here (`make compile`).
    """
    if mesh is None:
        one = Mesh(np.array(hardware.devices()[:1]), ("device",))
        args = placed(args, NamedSharding(one, PartitionSpec()))
    if hardware.target.platform == "tpu":
        return Compiled(lower(hardware, f, *args, mesh=mesh).compile(), {})
    with tempfile.TemporaryDirectory() as folder, _mosaic_gpu_dumps(folder):
        lowered = lower(hardware, f, *args, mesh=mesh)
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
