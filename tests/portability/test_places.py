"""Targets by name: devices, topologies and meshes, and what is said of names that are none."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimo_jax.portability import places
from mimo_jax.portability.places import HARDWARE, PlaceError, arranged, find_place
from mimo_jax.portability.study import TARGETS
from pallas_kernels import targets
from pallas_kernels.backends import BackendError


@pytest.mark.parametrize(
    ("name", "kind", "topology", "devices", "mesh"),
    [
        ("hopper", "hopper", "1x1x8", 1, ""),
        ("hopper:1", "hopper", "1x1x1", 1, ""),
        ("hopper:3", "hopper", "1x1x3", 3, "expert=3"),
        ("ampere:6", "ampere", "1x1x6", 6, "expert=3,tensor=2"),
        ("blackwell:8", "blackwell", "1x1x8", 8, "tensor=8"),
        ("hopper:64", "hopper", "1x8x8", 64, "expert=8,tensor=8"),
        ("v5e", "v5e", "v5e:2x4", 1, ""),
        ("v5e:4x8", "v5e", "v5e:4x8", 32, "expert=4,tensor=8"),
        ("v6e:16x16", "v6e", "v6e:16x16", 256, "expert=32,tensor=8"),
        ("v4:2x2x1", "v4", "v4:2x2x1", 4, "tensor=4"),
        ("v5p:4x4x4", "v5p", "v5p:4x4x4", 64, "expert=8,tensor=8"),
        # A chip is two devices.
        ("tpu7x:2x2x1", "tpu7x", "tpu7x:2x2x1", 8, "tensor=8"),
        (" TPU7x:2X2x4\n", "tpu7x", "tpu7x:2x2x4", 32, "expert=4,tensor=8"),
    ],
)
def test_a_name_is_a_kind_and_a_topology(name, kind, topology, devices, mesh):
    place = find_place(name)
    assert place.hardware is not None
    assert (place.kind, place.hardware.topology) == (kind, topology)
    assert (place.devices, place.mesh) == (devices, mesh)
    assert place.name == name.strip().lower()
    assert place.hardware.target == HARDWARE[kind].target == place.target


@pytest.mark.parametrize("name", [*HARDWARE, *TARGETS])
def test_every_target_is_known_whole(name):
    place = find_place(name)
    if name == "cpu":
        assert (place.hardware, place.device, place.mesh) == (None, None, "")
        assert place.allowed("auto") == ("reference",)
        return
    assert place.device is not None
    assert place.hardware is not None
    kinds = {kind.lower() for kind in place.device.kinds}
    assert place.hardware.target.kind.lower() in kinds
    assert {n for n, why in place.backends().items() if why is None} == set(place.allowed("auto"))
    assert len(place.allowed("auto")) > 1
    assert place.native_e2m1 == (place.kind == "tpu7x")


def test_what_does_not_run_there_is_said():
    assert "TPU" in (find_place("hopper").backends()["mosaic_tpu"] or "")
    assert "Hopper" in (find_place("ampere").backends()["mosaic_gpu"] or "")
    assert find_place("ampere").allowed("auto") == ("triton", "reference")
    with pytest.raises(BackendError, match="need an NVIDIA GPU"):
        find_place("v5e").allowed("triton")


@pytest.mark.parametrize("name", ["", ":", "hoper", "h100", "v5", "tpu", "cuda:8", "cpu8", "4x4"])
def test_an_unknown_kind_is_told_all_that_there_are(name):
    with pytest.raises(PlaceError, match="there is no target") as told:
        find_place(name)
    assert repr(name) in str(told.value)
    assert all(known in str(told.value) for known in ("cpu", "here", *HARDWARE))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *((f"hopper:{size}", "as hopper:8") for size in ("", "0", "-8", "08", "1x8", "8 8", "a")),
        ("ampere:\u0663", "as ampere:8"),  # a digit, of Arabic
        ("hopper:" + "9" * 5000, "as hopper:8"),  # more than int() reads
        ("hopper:8:8", "as hopper:8"),
        *((f"hopper:{n}", "whole machines") for n in (9, 12, 63)),
        *((f"v5e:{size}", "as v5e:4x4") for size in ("", "8", "4x", "x4", "0x4", "4x4x4", "4*4")),
        *((f"v4:{size}", "as v4:4x4x4") for size in ("", "8", "4x4", "2x2x2x2", "2x2x0")),
        ("tpu7x:2x2", "as tpu7x:4x4x4"),
        ("v5p:" + "x".join(["9" * 5000] * 3), "as v5p:4x4x4"),
        ("v5e:32x16", "at most 256 devices"),
        ("v5p:99x99x99", "at most 6144 devices"),
        ("cpu:", "cpu has no topology"),
        ("CPU:8", "cpu has no topology"),
        ("here:8", "here has no topology"),
    ],
)
def test_a_malformed_topology_is_told_what_to_write(name, said):
    with pytest.raises(PlaceError, match=said) as told:
        find_place(name)
    assert repr(name) in str(told.value)


_SIZES = st.lists(st.integers(-1, 300) | st.integers(), max_size=4).map(
    lambda sizes: "x".join(map(str, sizes))
)


@given(
    st.text()
    | st.builds(
        "{}{}{}".format,
        st.sampled_from([*HARDWARE, "cpu", "Hopper "]),
        st.sampled_from(["", ":", "::", " :", ":x"]),
        _SIZES | st.text(max_size=4),
    )
)
def test_any_name_is_a_target_or_an_error_that_says_so(name):
    try:
        place = find_place(name, present="h100")
    except PlaceError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert repr(name) in said
        return
    sizes = [part.partition("=")[2] for part in place.mesh.split(",") if part]
    assert math.prod(map(int, sizes)) == place.devices > 0
    if place.hardware is not None:
        assert find_place(place.name) == place


@given(st.integers(1, 10_000))
def test_devices_are_arranged_whole(devices):
    sizes = dict(part.split("=") for part in arranged(devices).split(",") if part)
    tensor, expert = int(sizes.get("tensor", 1)), int(sizes.get("expert", 1))
    assert tensor * expert == devices
    assert tensor in (1, 2, 4, 8)
    assert "1" not in sizes.values()
    # As many along tensor as there can be.
    assert tensor == 8 or expert % 2


def test_here_is_what_is_present(monkeypatch):
    with pytest.raises(PlaceError, match="no accelerator on this machine"):
        find_place("here")
    place = find_place(" Here", present="h200")
    assert (place.name, place.kind, place.hardware, place.devices) == ("h200", "h200", None, 1)
    assert place.device is not None
    assert place.device.name == "h200"
    assert find_place("here", present="gb10").device is None

    class Device:
        platform, device_kind = "gpu", "NVIDIA H100 80GB HBM3"

    monkeypatch.setattr(places.jax, "devices", lambda *_: [Device])
    assert find_place("here").kind == "h100"
    Device.device_kind = "NVIDIA GB10"
    assert find_place("here").kind == "nvidia-gb10"


def test_devices_that_do_not_exist_are_the_compilers(monkeypatch):
    assert find_place("cpu").topology_devices()[0].platform == "cpu"
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda _: None)
    targets._topology.cache_clear()
    with pytest.raises(RuntimeError, match="make compile"):
        find_place("v5e:2x2").topology_devices()
