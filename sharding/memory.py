"""Whether arrays fit in the memory of devices, said before they are allocated."""

from __future__ import annotations

import collections
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

GIB = 2**30


class NotEnoughMemoryError(ValueError):
    """Arrays that do not fit; the message says what is needed, what there is and what to do."""


def check_memory(
    bytes_by_device: Mapping[Any, int],
    what: str = "the weights",
    advice: str = "split them over more devices with a larger mesh",
) -> None:
    """Refuses arrays that do not fit in the memory that is free.

    Devices that tell their limit (GPUs, TPUs) are asked one by one; those on the CPU share the
    host's memory.  Other devices are not checked.

    Args:
      bytes_by_device: what will be allocated on each of this process's devices.
      what: the arrays, for the message.
      advice: what would make them smaller.

    Raises:
      NotEnoughMemoryError: it does not fit; nothing has been allocated.
    """
    limits = {device: device_memory(device) for device in bytes_by_device}
    short: dict[tuple[int, int, int], list[Any]] = collections.defaultdict(list)
    for device, needed in bytes_by_device.items():
        limit = limits[device]
        if limit is not None and needed > limit[0]:
            short[(needed, *limit)].append(device)
    if short:
        (needed, free, limit), devices = max(short.items(), key=lambda item: item[0][0])
        raise NotEnoughMemoryError(
            f"{what} need {_shown(needed)} on {_counted(devices)} "
            f"({devices[0].device_kind}), but {_shown(free)} of {_shown(limit)} are "
            f"free there; {advice}, or free memory "
            "(XLA_PYTHON_CLIENT_MEM_FRACTION sets how much of a GPU jax may use)"
        )
    on_host = sum(n for device, n in bytes_by_device.items() if device.platform == "cpu")
    free = host_memory()
    if free is not None and on_host > free:
        raise NotEnoughMemoryError(
            f"{what} need {_shown(on_host)} of this host's memory, but {_shown(free)} "
            f"are available; {advice}, or use a machine with more memory, or devices with their own"
        )


def lack_of_memory(error: BaseException) -> str | None:
    """A sentence for an error of programs that ran out of memory; None for any other.

    Weights and caches are asked about before they are allocated (`check_memory`); what programs
    need besides is not known until they run.
    """
    if isinstance(error, MemoryError):
        what, found = "this host", str(error)
    elif isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        # XLA adds pages on what else there is.
        what, found = "a device", str(error).strip().splitlines()[0]
    else:
        return None
    said = f" ({found[:200]})" if found else ""
    return (
        f"{what} has too little memory for what runs beside weights and caches{said}; run fewer or "
        "shorter prompts at a time, or split the model over more devices with a larger mesh"
    )


def _shown(size: int) -> str:
    """Bytes for people; small ones so that they differ."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def _counted(devices: Sequence[Any]) -> str:
    return "a device" if len(devices) == 1 else f"each of {len(devices)} devices"


def device_memory(device: Any) -> tuple[int, int] | None:
    """Bytes that are free on a device and that jax may use in all; None if it does not tell."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0), stats["bytes_limit"]


def host_memory() -> int | None:
    """Bytes of the host's memory that can still be used; None if it does not tell."""
    try:
        # Free memory alone would not count what the page cache gives back.
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        return int(found[1]) * 1024 if found else None
    except OSError:
        names = os.sysconf_names
        if "SC_PHYS_PAGES" not in names:
            return None
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
