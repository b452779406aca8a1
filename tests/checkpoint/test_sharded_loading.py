"""On any mesh the same bytes, of which each process reads its own, with little memory beside."""

import math
import os
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from checkpoint.release_format import make_release
from checkpoint.test_layouts import FORMATS
from checkpoint.test_transformers import native
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mimo_jax import checkpoint
from mimo_jax.checkpoint import sources, streaming
from mimo_jax.checkpoint.safetensors_file import Entry, open_file, write_file
from mimo_jax.checkpoint.sources import Index, Tensor, extent, whole
from mimo_jax.model.parameters import parameters
from sharding import memory
from sharding.memory import NotEnoughMemoryError
from sharding.mesh import make_mesh
from sharding.rules import ShardingError

LATENCY = ("latency", "expert=2,tensor=2")
THROUGHPUT = ("throughput", "data=2,expert=2,tensor=2")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """File, first byte and number of bytes of every read of weights."""
    found, real = [], os.preadv

    def read(file: int, to: Any, at: int) -> int:
        count = real(file, to, at)
        found.append((os.readlink(f"/proc/self/fd/{file}"), at, count))
        return count

    monkeypatch.setattr(os, "preadv", read)
    return found


@pytest.fixture
def far_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's devices treated as if they had their own memory."""
    monkeypatch.setattr(streaming, "shares_memory", lambda device: False)
    # jax on the CPU would go on using the memory that threads read into.
    monkeypatch.setattr(
        streaming, "put", lambda block, device: jax.device_put(block.copy(), device)
    )


def modules(loaded: checkpoint.Loaded) -> list[Any]:
    return [m for m in (loaded.model, loaded.mtp, loaded.drafter) if m is not None]


def assert_same_bytes(one: checkpoint.Loaded, other: checkpoint.Loaded) -> None:
    first, second = (jax.tree.flatten(modules(x)) for x in (one, other))
    assert first[1] == second[1]
    for a, b in zip(first[0], second[0], strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def assert_placed(loaded: checkpoint.Loaded, mesh: Mesh) -> None:
    """Every array is where the placement says."""
    assert loaded.placement is not None
    assert loaded.placement.mesh == mesh
    for module in modules(loaded):
        for _, param in parameters(module):
            value = param.get_value()
            wanted = loaded.placement.shardings(param.spec, value)
            for array, sharding in zip(
                jax.tree.leaves(value), jax.tree.leaves(wanted), strict=True
            ):
                assert array.sharding == sharding, param.spec.name


def assert_sharded_equals_whole(folder: Path, **options: Any) -> None:
    one = checkpoint.load(folder, **options)
    assert one.placement is None
    for rules, mesh in ((r, make_mesh(m)) for r, m in (LATENCY, THROUGHPUT)):
        many = checkpoint.load(folder, mesh=mesh, rules=rules, **options)
        assert_same_bytes(one, many)
        assert_placed(many, mesh)


@pytest.mark.parametrize("name", FORMATS)
def test_every_layout(name: str, tmp_path: Path) -> None:
    assert_sharded_equals_whole(make_release(**FORMATS[name]).write(tmp_path))


@pytest.mark.parametrize("qkv", ["interleaved", "plain", "split", "split_own"])
def test_every_layout_dequantised(qkv: str, tmp_path: Path) -> None:
    release = make_release(qkv=qkv, drafter=True)
    assert_sharded_equals_whole(release.write(tmp_path), dequantize=True, dtype="float32")


@pytest.mark.parametrize("mesh", ["tensor=4", "expert=4", "data=2,expert=2,tensor=2"])
def test_stacked_experts(mesh: str, tmp_path: Path) -> None:
    """transformers' own layout, gate and up in one tensor."""
    release = make_release(qkv="split", linear="plain", experts="plain", mtp=0, single_file=True)
    native(release)
    folder = release.write(tmp_path)
    assert_same_bytes(checkpoint.load(folder), checkpoint.load(folder, mesh=make_mesh(mesh)))


@pytest.mark.parametrize(("rules", "mesh"), [("single", None), LATENCY, THROUGHPUT])
@pytest.mark.usefixtures("far_devices")
def test_devices_with_their_own_memory(
    rules: str, mesh: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrays are put together on the device, from pieces of rows and of columns."""
    folder = make_release().write(tmp_path)
    one = checkpoint.load(folder)
    monkeypatch.setattr(streaming, "PIECE", 20_000)
    if mesh is None:
        many = checkpoint.load(folder)
    else:
        many = checkpoint.load(folder, mesh=make_mesh(mesh), rules=rules)
    assert_same_bytes(one, many)


def test_without_a_mesh_arrays_follow_others(tmp_path: Path) -> None:
    """As jax's own arrays they may be computed with on any device."""
    loaded = checkpoint.load(make_release(mtp=0).write(tmp_path))
    assert not any(array.committed for array in jax.tree.leaves(loaded.model))
    with jax.default_device(jax.devices()[3]):
        loaded = checkpoint.load(tmp_path)
    assert {d for a in jax.tree.leaves(loaded.model) for d in a.devices()} == {jax.devices()[3]}


def test_inside_of_a_mesh(tmp_path: Path) -> None:
    """What mesh the caller computes on does not matter."""
    folder, mesh = make_release(mtp=0).write(tmp_path), make_mesh("tensor=2")
    with jax.set_mesh(make_mesh("expert=4")):
        found = checkpoint.load(folder, mesh=mesh)
    assert_same_bytes(found, checkpoint.load(folder))


def test_on_the_cpu_arrays_are_the_memory_that_was_read_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No second copy, and one for all devices that hold the same."""
    real, addresses = streaming.aligned, set()

    def aligned(*args: Any) -> np.ndarray:
        array = real(*args)
        addresses.add(array.ctypes.data)
        return array

    monkeypatch.setattr(streaming, "aligned", aligned)
    mesh = make_mesh("expert=2,tensor=2")
    loaded = checkpoint.load(make_release(mtp=0).write(tmp_path), mesh=mesh)
    shards = [s for a in jax.tree.leaves(loaded.model) for s in a.addressable_shards]
    assert {s.data.unsafe_buffer_pointer() for s in shards} <= addresses
    norm = loaded.model.norm.weight.get_value()
    assert len({s.data.unsafe_buffer_pointer() for s in norm.addressable_shards}) == 1


@pytest.mark.parametrize(
    ("rules", "mesh", "kept", "exactly"),
    [
        (*LATENCY, {0}, True),
        (*LATENCY, {0, 1}, False),
        (*THROUGHPUT, {1, 2}, True),
        (*THROUGHPUT, {0, 1, 2, 3}, False),
    ],
)
def test_a_process_reads_what_its_devices_hold(
    rules: str,
    mesh: str,
    kept: set[int],
    exactly: bool,
    tmp_path: Path,
    reads: list[tuple[str, int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bytes that several of its devices hold are read once, those of other processes never.

    Of rows so short that reading parts of them would not pay, the other parts are read as well.
    """
    folder = make_release(drafter=True).write(tmp_path)
    placed = checkpoint.load(folder, mesh=make_mesh(mesh), rules=rules)
    expected = 0
    for array in jax.tree.leaves(modules(placed)):
        shards = [s for s in array.addressable_shards if s.device.id in kept]
        parts = {s.index: s.data.nbytes for s in shards}
        expected += sum(parts.values())
    assert placed.drafter is not None
    expected -= placed.drafter.mask_embedding.get_value().nbytes
    reads.clear()

    real = streaming.local_parts

    def some(*args: Any) -> dict[Any, Index]:
        return {d: index for d, index in real(*args).items() if d.id in kept}

    def nothing(self: Any) -> jax.Array:
        return jax.numpy.zeros(self.source.shape, self.source.dtype)

    monkeypatch.setattr(streaming, "local_parts", some)
    monkeypatch.setattr(streaming._Incoming, "result", nothing)
    if exactly:
        monkeypatch.setattr(sources, "RUN", 0)
        monkeypatch.setattr(streaming, "RUN", 0)
    checkpoint.load(folder, mesh=make_mesh(mesh), rules=rules)
    total = sum(n for *_, n in reads)
    if exactly:
        assert total == expected
        ends: dict[str, int] = {}
        for file, at, n in sorted(reads):
            assert ends.get(file, 0) <= at
            ends[file] = at + n
    else:
        paths = [*folder.glob("*.safetensors"), *folder.glob("dflash/*.safetensors")]
        tensors = [t for p in paths for t in open_file(p, "x")[0].tensors.values()]
        assert expected <= total <= sum(t.nbytes for t in tensors)


def big(folder: Path, shape: tuple[int, ...]) -> Tensor:
    array = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    path = folder / "x.safetensors"
    write_file(path, [Entry("x", array.dtype, array.shape, lambda: array)], {})
    return Tensor(open_file(path, "x.safetensors")[0].tensors["x"], shape, set())


@pytest.mark.parametrize("spec", [("tensor",), (None, "tensor"), (None, None, "tensor"), ()])
@pytest.mark.usefixtures("far_devices")
def test_host_memory_is_bounded(
    spec: tuple[str | None, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 MB onto devices with 4 MB at a time, however they are split."""
    source = big(tmp_path, (8, 8, 512 * 1024))
    monkeypatch.setattr(streaming, "PIECE", 1 << 20)
    monkeypatch.setattr(streaming, "BUDGET", 4 << 20)
    monkeypatch.setattr(sources, "STEP", 1 << 18)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert streaming.threads() == 2
    sharding = NamedSharding(make_mesh("tensor=8"), PartitionSpec(*spec))
    tracemalloc.start()
    (array,) = streaming.stream([(source, sharding)])
    jax.block_until_ready(array)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert array.sharding == sharding
    assert peak < 7 << 20  # jax on the CPU keeps pieces until they are in their place
    np.testing.assert_array_equal(np.asarray(array), source.read())


@pytest.mark.parametrize("spec", [("tensor",), (None, None, "tensor"), ()])
def test_on_the_cpu_memory_is_that_of_the_arrays(
    spec: tuple[str | None, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = big(tmp_path, (8, 8, 512 * 1024))
    monkeypatch.setattr(streaming, "PIECE", 1 << 20)
    monkeypatch.setattr(sources, "STEP", 1 << 18)
    sharding = NamedSharding(make_mesh("tensor=8"), PartitionSpec(*spec))
    tracemalloc.start()
    (array,) = streaming.stream([(source, sharding)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = math.prod(source.shape)
    assert size < peak < size + (6 << 20)
    np.testing.assert_array_equal(np.asarray(array), source.read())


def test_columns_of_several_devices_are_read_with_their_rows(
    tmp_path: Path, reads: list[tuple[str, int, int]]
) -> None:
    """Also where rows are short and every device has a part of each."""
    source = big(tmp_path, (64, 4096))
    sharding = NamedSharding(make_mesh("tensor=8"), PartitionSpec(None, "tensor"))
    streaming.stream([(source, sharding)])
    assert [n for *_, n in reads] == [64 * 4096]


def test_groups_of_parts() -> None:
    def columns(*ranges: tuple[int, int], rows: slice = slice(0, 4)) -> list[Index]:
        return [(rows, slice(a, b)) for a, b in ranges]

    shape = (4, 100)
    joined = columns((0, 50), (50, 100))
    assert streaming.together(joined, shape, 1) == [joined]
    gap = columns((0, 25), (75, 100))
    assert streaming.together(gap, shape, 1) == [[part] for part in gap]
    long = columns((0, 50 * sources.RUN), (50 * sources.RUN, 100 * sources.RUN))
    assert streaming.together(long, (4, 100 * sources.RUN), 1) == [[part] for part in long]
    rows = [whole((2, 100)), (slice(2, 4), slice(0, 100))]
    assert streaming.together(rows, shape, 1) == [[part] for part in rows]
    assert extent(rows[1]) == (2, 100)


def test_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grows to the size of the tensors, whether they are kept as they are or not."""
    release = make_release(drafter=True)
    folder = release.write(tmp_path)
    assert release.drafter is not None
    size = sum(
        len(t.data)
        for r in (release, release.drafter)
        for file in r.tensors.values()
        for t in file.values()
    )
    monkeypatch.setattr(streaming, "PIECE", 50_000)
    several: list[dict[str, Any]] = [
        {},
        {"mesh": make_mesh("expert=2,tensor=2")},
        {"dequantize": True},
    ]
    for options in several:
        seen: list[tuple[int, int]] = []
        checkpoint.load(folder, progress=lambda *now, seen=seen: seen.append(now), **options)
        assert len({total for _, total in seen}) == 1
        assert [n for n, _ in seen] == sorted(n for n, _ in seen)
        assert seen[-1][0] == seen[-1][1]
        assert abs(seen[-1][1] - size) < size * 0.01


def test_bad_values_in_many_pieces_are_one_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = make_release(mtp=0)
    name = "model.layers.0.self_attn.o_proj.weight"
    tensor = release.find(name)[name]
    values = np.frombuffer(tensor.data, np.uint16).copy()
    values[::1000] = 0x7FC0
    tensor.data = values.tobytes()
    folder = release.write(tmp_path)
    monkeypatch.setattr(streaming, "PIECE", 5000)
    for mesh in (None, make_mesh("expert=2,tensor=2")):
        with pytest.raises(checkpoint.CheckpointError) as caught:
            checkpoint.load(folder, mesh=mesh)
        (problem,) = caught.value.problems
        assert problem.tensor == name
        assert problem.found == f"{len(values[::1000])} of 40960 values (nan at [0, 0])"


def test_a_file_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_release(mtp=0).write(tmp_path)
    monkeypatch.setattr(os, "preadv", lambda *args: 0)
    with pytest.raises(checkpoint.CheckpointError, match=r"unreadable file.*ends at byte"):
        checkpoint.load(folder)


def test_a_mesh_that_does_not_divide_the_model(
    tmp_path: Path, reads: list[tuple[str, int, int]]
) -> None:
    folder = make_release(mtp=0).write(tmp_path)
    with pytest.raises(ShardingError, match="choose a mesh that divides it"):
        checkpoint.load(folder, mesh=make_mesh("tensor=8"))
    with pytest.raises(ShardingError, match="no rules are called 'fast'"):
        checkpoint.load(folder, mesh=make_mesh("tensor=2"), rules="fast")
    assert not reads


def test_too_little_memory_is_said_before_reading(
    tmp_path: Path, reads: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_release(mtp=0).write(tmp_path)
    monkeypatch.setattr(memory, "host_memory", lambda: 1000)
    with pytest.raises(NotEnoughMemoryError, match=r"the weights need [0-9.]+ MiB of this host's"):
        checkpoint.load(folder)
    assert not reads
