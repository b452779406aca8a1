"""What does not fit is refused with numbers, before anything is allocated."""

import dataclasses

import jax
import pytest

from sharding import memory
from sharding.memory import GIB, NotEnoughMemoryError, check_memory


@dataclasses.dataclass(frozen=True)
class Device:
    """A device that tells what jax's devices tell."""

    id: int
    limit: int | None = None
    used: int = 0
    platform: str = "gpu"
    device_kind: str = "H200"

    def memory_stats(self) -> dict[str, int] | None:
        if self.limit is None:
            return None
        return {"bytes_limit": self.limit, "bytes_in_use": self.used}


def test_what_fits_is_fine() -> None:
    check_memory({})
    check_memory({Device(0, 10, 3): 7, Device(1, 10): 10})
    check_memory({Device(0): 10**15})
    check_memory({jax.devices()[0]: 1000})


def test_too_much_for_some_devices() -> None:
    devices = [Device(i, 140 * GIB, 20 * GIB) for i in range(4)]
    needed = dict.fromkeys(devices, 130 * GIB) | {devices[3]: 119 * GIB}
    with pytest.raises(
        NotEnoughMemoryError,
        match=r"experts need 130.00 GiB on each of 3 devices \(H200\), but 120.00 GiB of 140.00 "
        r"GiB are free there; split them over more devices",
    ):
        check_memory(needed, "experts")


def test_a_small_device_and_small_arrays() -> None:
    with pytest.raises(
        NotEnoughMemoryError,
        match=r"need 30.0 MiB on a device \(H200\), but 20.5 MiB of 1.00 GiB are free there",
    ):
        check_memory({Device(0, GIB, GIB - 41 * 2**19): 30 * 2**20})


def test_devices_on_the_cpu_share_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "host_memory", lambda: 10 * GIB)
    check_memory(dict.fromkeys(jax.devices()[:2], 5 * GIB))
    with pytest.raises(NotEnoughMemoryError, match=r"need 15.00 GiB of this host's.* 10.00 GiB"):
        check_memory(dict.fromkeys(jax.devices()[:3], 5 * GIB))


def test_a_host_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "host_memory", lambda: None)
    check_memory({jax.devices()[0]: 10**15})


def test_memory_of_this_host() -> None:
    found = memory.host_memory()
    assert found is not None
    assert found > 2**20


def test_errors_of_programs_that_run_out_of_memory() -> None:
    xla = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte\nThe heap was ..."
    said = memory.lack_of_memory(RuntimeError(xla))
    assert said is not None
    assert said.startswith("a device has too little memory")
    assert "(RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte)" in said
    assert "larger mesh" in said
    host = memory.lack_of_memory(MemoryError("Unable to allocate 9 GiB"))
    assert host is not None
    assert host.startswith("this host has too little memory")
    assert "(Unable to allocate 9 GiB)" in host
    for other in (RuntimeError("INTERNAL: a bug"), ValueError("RESOURCE_EXHAUSTED")):
        assert memory.lack_of_memory(other) is None
