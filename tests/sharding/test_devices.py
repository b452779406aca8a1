"""The table of devices: figures that were measured, and of datasheets."""

import pytest

from sharding import devices
from sharding.devices import GIB, NAMES, DeviceError, Figure, find_device


def value(figure: Figure | None) -> float:
    assert figure is not None
    return figure.value


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("h100", "h100"),
        ("H200", "h200"),
        (" b200 ", "b200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("cpu", "cpu"),
    ],
)
def test_devices_are_found_by_their_names_and_by_jax_s(asked, name):
    assert find_device(asked).name == name


def test_an_unknown_device_is_answered_with_those_there_are():
    with pytest.raises(DeviceError, match="no device is called 'h300'") as error:
        find_device("h300")
    assert all(name in str(error.value) for name in NAMES)


def test_no_two_devices_have_a_name_in_common():
    found = [find_device(name) for name in NAMES]
    names = [n for d in found for n in {n.lower() for n in (d.name, *d.kinds)}]
    assert len(set(names)) == len(names)


def test_measured_figures_are_those_of_the_notes():
    h100, h200 = find_device("h100"), find_device("h200")
    assert h100.usable == Figure(77 * GIB, "measured")
    assert h200.usable == Figure(137 * GIB, "measured")
    assert (value(h100.bandwidth), value(h200.bandwidth)) == (3.01e12, 4.3e12)
    assert (value(h100.flops), value(h200.flops)) == (798e12, 790e12)
    assert 15e-6 <= value(h200.latency) <= 25e-6
    assert h100.not_measured() == h200.not_measured() == {"interconnect": "datasheet"}
    assert value(h100.direct_latency) < value(h100.latency) / 2


@pytest.mark.parametrize("name", [n for n in NAMES if n != "cpu"])
def test_figures_are_of_the_right_size(name):
    device = find_device(name)
    assert 0.9 < device.usable.value / device.memory.value < 1.01  # v5p has more than it says
    # Between bytes read, FLOPs and bytes exchanged, a machine of this kind has these ratios.
    assert 100 < value(device.flops) / value(device.bandwidth) < 600
    assert 3 < value(device.bandwidth) / value(device.interconnect) < 15
    assert (device.domain or 0) >= 8
    assert not device.shared


def test_a_device_of_tpu7x_is_half_a_chip():
    device = find_device("tpu7x")
    assert 2 * device.memory.value == 192 * GIB
    assert 2 * value(device.flops) == 2307e12
    assert 2 * value(device.bandwidth) == 7.38e12


def test_the_cpu_has_the_host_s_memory_and_no_known_speed(monkeypatch):
    monkeypatch.setattr(devices, "host_memory", lambda: 3 * GIB)
    cpu = find_device("CPU")
    assert cpu.usable.value == 3 * GIB
    assert cpu.shared
    assert cpu.memory.value > 0
    assert cpu.bandwidth is cpu.flops is cpu.interconnect is cpu.latency is None
    assert cpu.not_measured() == {}


def test_a_host_that_hides_what_is_free_is_taken_to_be_empty(monkeypatch):
    monkeypatch.setattr(devices, "host_memory", lambda: None)
    cpu = find_device("cpu")
    assert cpu.usable.value == cpu.memory.value
    assert cpu.not_measured() == {"usable memory": "assumed"}
