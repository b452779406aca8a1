"""Each of two processes reads its half, and a problem that one of them finds ends both."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from checkpoint.release_format import make_release
from two_processes import run_in_processes

from mimo_jax import checkpoint
from mimo_jax.checkpoint import sources, streaming
from sharding.mesh import make_mesh


def parts(loaded: checkpoint.Loaded) -> list[Any]:
    return jax.tree.leaves((loaded.model, loaded.mtp, loaded.drafter))


def compare(folder: str, converted: str, mesh: str) -> None:
    """Loads from both folders onto a mesh of all devices; prints the share of bytes read."""
    read = []
    real = os.preadv

    def preadv(file: int, to: Any, at: int) -> int:
        read.append(real(file, to, at))
        return read[-1]

    whole = checkpoint.load(folder)
    os.preadv = preadv
    sources.RUN = streaming.RUN = 0  # rows are short here: read no more of them than needed
    own = [checkpoint.load(f, mesh=make_mesh(mesh)) for f in (folder, converted)]
    for loaded in own:
        for expected, array in zip(parts(whole), parts(loaded), strict=True):
            assert len(array.sharding.device_set) == 8
            for shard in array.addressable_shards:
                found = np.asarray(shard.data)
                assert found.tobytes() == np.asarray(expected)[shard.index].tobytes()
    print(sum(read) / sum(array.nbytes for array in parts(whole)))


# Split over data, both processes hold everything; else half of it and what eight do not divide.
@pytest.mark.parametrize(
    ("mesh", "least", "most"), [("data=2,expert=4", 0.9, 1.0), ("expert=8", 0.4, 0.75)]
)
def test_each_process_reads_its_part(mesh: str, least: float, most: float, tmp_path: Path) -> None:
    folder = make_release(drafter=True, n_routed_experts=8).write(tmp_path / "in")
    checkpoint.convert(checkpoint.load(folder), tmp_path / "out")
    ends = run_in_processes(compare, str(folder), str(tmp_path / "out"), mesh)
    for end in ends:
        assert end.returncode == 0, end.stderr
        assert least < float(end.stdout) <= most


def fail(folder: str, damaged: str) -> None:
    mine = damaged if jax.process_index() else folder
    try:
        checkpoint.load(mine, mesh=make_mesh("data=2,expert=4"))
    except (checkpoint.CheckpointError, OSError) as error:
        print(f"{type(error).__name__}: {error}")
    for write in (checkpoint.convert, lambda loaded, to: checkpoint.save(to, loaded)):
        try:
            write(checkpoint.load(folder), damaged)
        except checkpoint.CheckpointError as error:
            print(error)


def test_a_problem_of_one_process_ends_both(tmp_path: Path) -> None:
    release = make_release(mtp=0)
    folder = release.write(tmp_path / "good")
    tensor = release.find("lm_head.weight")["lm_head.weight"]
    tensor.data = b"\xff" * len(tensor.data)
    first, second = run_in_processes(fail, str(folder), str(release.write(tmp_path / "bad")))
    assert "DistributedError: process 1 of 2 failed:" in first.stdout
    assert "bad values: lm_head.weight" in first.stdout
    assert second.stdout.startswith("CheckpointError")
    assert "bad values: lm_head.weight" in second.stdout
    for process in (first, second):
        assert "cannot be converted: found 2 processes" in process.stdout
        assert "cannot be saved: found 2 processes" in process.stdout
