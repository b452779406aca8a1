"""What a measurement ran on: device, versions, memory."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def machine(devices: Sequence[Any]) -> dict[str, Any]:
    """Devices, processor, versions and load, for JSON.

    Args:
      devices: those that the model is on.
    """
    return {
        "device": devices[0].device_kind,
        "platform": devices[0].platform,
        "devices": len(devices),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "load_average_before": os.getloadavg(),
    }


def peak_memory(devices: Sequence[Any]) -> tuple[int | None, str]:
    """Most bytes that were in use at once since the process began, loading included.

    Returns:
      Those of the device that had most, and "device"; where devices don't tell (CPUs), the
      process's resident memory, and "process"; None where nobody tells.
    """
    stats = [device.memory_stats() or {} for device in devices if _is_local(device)]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks), "device"
    try:
        import resource
    except ImportError:  # Windows
        return None, "process"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process"


def _is_local(device: Any) -> bool:
    return device.process_index == jax.process_index()


def cpu_model() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
