"""Batches on disks that are full, limited or read-only stop with advice and go on afterwards."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from endurance.batches import Job, lasting, mixed_requests, whole_lines, write_requests

REQUESTS = 150
# Of about 90,000 that the results have.
BYTES = 48 * 1024
OPTIONS = ("--batch-size", "16", "--max-tokens", "40")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Job:
    """A job that was done with nothing in its way."""
    folder = tmp_path_factory.mktemp("whole")
    source = write_requests(folder / "in.jsonl", mixed_requests(REQUESTS))
    job = Job(source, folder / "out.jsonl", folder / "cache", OPTIONS)
    assert job.run() == 1, job.said()  # malformed lines have errors
    assert job.out.stat().st_size > 1.6 * BYTES
    return job


def same(whole: Job, out: Path, file_size: int | None = None) -> Job:
    """The same job with its results elsewhere."""
    return Job(whole.source, out, whole.cache, OPTIONS, file_size)


def mount(*arguments: str | Path) -> None:
    """Mounts a file system, or skips the test."""
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a file system can't be mounted here: {done.stderr.strip()}")


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system in memory of so many bytes."""
    folder.mkdir()
    if os.geteuid():
        pytest.skip("only root may mount a file system")
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def assert_stopped(job: Job, advice: str) -> bytes:
    """Checks that an attempt stops as it should, and gives the lines that are safe."""
    assert job.run() == 1
    assert f"writing {job.out} failed" in job.said()
    assert f"{advice}, then run the same command to go on" in job.said()
    safe = job.out.read_bytes()
    assert safe == whole_lines(job.out), "half a line was left"
    lines = lasting(safe)
    assert 0 < len(lines) < REQUESTS
    assert f"the {len(lines)} lines in it are safe" in job.said()
    return safe


def assert_goes_on(job: Job, safe: bytes, whole: Job) -> None:
    """Checks that an attempt keeps what is safe and ends with what the whole run wrote."""
    assert job.run() == 1, job.said()
    done = job.out.read_bytes()
    assert done.startswith(safe)
    assert lasting(done) == lasting(whole.out.read_bytes())


def test_a_full_disk(tmp_path, whole):
    with small_disk(tmp_path / "disk", 64 * 1024) as disk:
        job = same(whole, disk / "out.jsonl")
        safe = assert_stopped(job, "make room on the disk")
        # Nothing more fits, and nothing gets lost.
        assert assert_stopped(job, "make room on the disk").startswith(safe)
        mount("-o", "remount,size=10m", disk)
        assert_goes_on(job, whole_lines(job.out), whole)


def test_a_full_disk_that_has_no_room_for_a_manifest(tmp_path, whole):
    with small_disk(tmp_path / "disk", 64 * 1024) as disk:
        with contextlib.suppress(OSError), open(disk / "other", "wb") as other:
            other.write(bytes(1024 * 1024))
        job = same(whole, disk / "out.jsonl")
        assert job.run() == 1
        assert f"{job.out}.manifest.json can't be written" in job.said()
        assert "make room on the disk" in job.said()
        os.unlink(disk / "other")
        mount("-o", "remount,size=10m", disk)
        assert_goes_on(job, b"", whole)


def test_a_limit_on_the_size_of_files(tmp_path, whole):
    out = tmp_path / "out.jsonl"
    safe = assert_stopped(
        same(whole, out, BYTES), "raise the limit on the size of files (ulimit -f)"
    )
    assert_goes_on(same(whole, out), safe, whole)


def test_a_disk_that_is_read_only_from_the_beginning(tmp_path, whole):
    with small_disk(tmp_path / "disk", 1024 * 1024) as disk:
        mount("-o", "remount,ro", disk)
        job = same(whole, disk / "out.jsonl")
        assert job.run() == 1
        assert f"{job.out} can't be written" in job.said()
        assert "mount the file system for writing" in job.said()
        mount("-o", "remount,rw", disk)
        assert_goes_on(job, b"", whole)


def test_a_disk_that_is_read_only_when_a_run_goes_on(tmp_path, whole):
    lines = whole.out.read_bytes().splitlines(keepends=True)
    safe = b"".join(lines[: REQUESTS // 2])
    with small_disk(tmp_path / "disk", 1024 * 1024) as disk:
        job = same(whole, disk / "out.jsonl")
        job.out.write_bytes(safe)
        manifest = Path(f"{whole.out}.manifest.json")
        Path(f"{job.out}.manifest.json").write_bytes(manifest.read_bytes())
        mount("-o", "remount,ro", disk)
        assert job.run() == 1
        assert f"{job.out} can't be written" in job.said()
        assert "mount the file system for writing" in job.said()
        assert job.out.read_bytes() == safe
        mount("-o", "remount,rw", disk)
        assert_goes_on(job, safe, whole)
