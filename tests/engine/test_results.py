"""A file of results: what is on the disk when, and going on from what is."""

import errno
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from engine.outcomes import done, failed, failure, request

from mimo_jax.engine import results as module
from mimo_jax.engine.requests import Failure
from mimo_jax.engine.results import Results, ResultsError


def lines_of(path: Path) -> list[int]:
    return [json.loads(raw)["line"] for raw in path.read_bytes().splitlines()]


def filled(path: Path, *records) -> bytes:
    with Results(path) as results:
        results.append(*records)
    return path.read_bytes()


def test_lines_are_counted_and_not_held(tmp_path):
    path = tmp_path / "deep" / "out.jsonl"
    with Results(path) as results:
        results.append(done(2), failed(1))
        results.append(done(3))
        results.append()
    with Results(path) as results:
        assert (len(results), results.completed, results.failed) == (3, 2, 1)
        assert [r["line"] for r in results.completions()] == [2, 3]
        assert [r.line for r in results.pending([request(i) for i in range(1, 6)])] == [4, 5]
        assert results.entries[2] == ("id-2", False, request(2).fingerprint)


def test_half_a_line_at_the_end_is_cut_off_wherever_it_was_cut(tmp_path):
    path = tmp_path / "out.jsonl"
    first = filled(path, done(1))
    whole = filled(path, done(2))
    for end in range(len(first), len(whole)):
        path.write_bytes(whole[:end] + bytes(3) * (end % 2))
        with Results(path) as results:
            assert list(results.entries) == [1]
        assert path.read_bytes() == first


def test_zeros_that_a_power_failure_left_are_cut_out(tmp_path):
    path = tmp_path / "out.jsonl"
    first, second = filled(path, done(1)), json.dumps(done(2)).encode()
    whole = filled(path, done(3))
    third = whole[len(first) :]
    lost = second[:50] + bytes(len(second) - 50) + b"\n"
    path.write_bytes(first + lost + third)
    with Results(path) as results:
        assert sorted(results.entries) == [1, 3]
        results.append(done(2))
    assert path.read_bytes().startswith(first + third)
    assert lines_of(path) == [1, 3, 2]


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": "my input"}\n',
        json.dumps(done(1)).encode() + b'\n{"id": "b", "prompt": "x"}\n',
        json.dumps(done(1)).encode() + b"\n\n",
        b'{"line": 1, "id": "a", "text": ""}\n',
        b'{"line": 1, "id": "a", "fingerprint": "", "text"}\n',
        b'{"id": "a", "prompt": "no line end"}',
        b"notes",
        b"\n",
        bytes(100),
    ],
)
def test_another_kind_of_file_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(ResultsError, match="is no result of a batch"):
        Results(path)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_two_results_of_a_line_are_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(2 * filled(path, done(1)))
    with pytest.raises(ResultsError, match="two results of line 1"):
        Results(path)


def test_what_can_not_be_a_file_of_results(tmp_path):
    with pytest.raises(ResultsError, match="is not a regular file"):
        Results(tmp_path)
    with pytest.raises(ResultsError, match="is not a regular file"):
        Results(Path("/dev/full"))
    (tmp_path / "file").touch()
    with pytest.raises(ResultsError, match="can't be written"):
        Results(tmp_path / "file" / "out.jsonl")


def test_a_read_only_place_is_an_error_that_says_so(tmp_path, monkeypatch):
    def read_only(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(module.os, "open", read_only)
    with pytest.raises(ResultsError, match="mount the file system for writing"):
        Results(tmp_path / "out.jsonl")


def test_one_run_at_a_time(tmp_path):
    path = tmp_path / "out.jsonl"
    with Results(path), pytest.raises(ResultsError, match="another run is writing"):
        Results(path)
    Results(path).close()


# Writing that fails


@pytest.mark.parametrize("failing", ["pwrite", "fsync"])
def test_a_failed_write_leaves_whole_lines_and_says_so(tmp_path, monkeypatch, failing):
    path = tmp_path / "out.jsonl"
    safe = filled(path, done(1))
    results = Results(path)
    real_write, full = os.pwrite, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write_some(file: int, data: memoryview, offset: int) -> int:
        if len(data) < len(safe):  # the rest of what was written in part
            raise full
        return real_write(file, data[:7], offset)

    def fsync(file: int) -> None:
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(module.os, failing, write_some if failing == "pwrite" else fsync)
        message = r"out.jsonl failed .*No space left.*the 1 lines in it are safe: make room"
        with pytest.raises(ResultsError, match=message):
            results.append(done(2))
    assert path.read_bytes() == safe
    results.append(done(3))
    results.close()
    assert lines_of(path) == [1, 3]


def test_of_several_lines_the_whole_ones_stay(tmp_path, monkeypatch):
    path, records = tmp_path / "out.jsonl", [done(i) for i in range(1, 5)]
    size = len(filled(tmp_path / "one.jsonl", done(1)))
    room = 2 * size + size // 2
    real_write = os.pwrite

    def write(file: int, data: memoryview, offset: int) -> int:
        if offset == room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_write(file, data[: room - offset], offset)

    with Results(path) as results, monkeypatch.context() as patch:
        patch.setattr(module.os, "pwrite", write)
        with pytest.raises(ResultsError, match="the 2 lines in it are safe"):
            results.append(*records)
        assert list(results.entries) == [1, 2]
    assert lines_of(path) == [1, 2]
    assert path.stat().st_size == 2 * size


def test_a_limit_of_the_system_is_met_with_whole_lines(tmp_path):
    path = tmp_path / "out.jsonl"
    size = len(filled(path, done(1)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Results(path) as results:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size * 7 // 2, before[1]))
            with pytest.raises(ResultsError, match=r"the 3 lines in it are safe: .*ulimit -f"):
                results.append(*(done(i) for i in range(2, 9)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert lines_of(path) == [1, 2, 3]
    assert path.stat().st_size == 3 * size


def test_ctrl_c_while_writing_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    real_write = os.pwrite

    def interrupt(file: int, data: memoryview, offset: int) -> int:
        real_write(file, data[:30], offset)
        raise KeyboardInterrupt

    with Results(path) as results:
        results.append(done(1))
        with monkeypatch.context() as patch:
            patch.setattr(module.os, "pwrite", interrupt)
            with pytest.raises(KeyboardInterrupt):
                results.append(done(2))
        results.append(failed(3))  # shorter than what was torn
    assert lines_of(path) == [1, 3]


def test_what_could_not_be_cut_off_is_before_the_next_line(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    real_write = os.pwrite

    def write(file: int, data: memoryview, offset: int) -> int:
        if offset:
            fail()
        return real_write(file, data[:-1], offset)

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Results(path) as results:
        with monkeypatch.context() as patch:
            patch.setattr(module.os, "pwrite", write)
            patch.setattr(module.os, "ftruncate", fail)
            with pytest.raises(ResultsError, match="check the disk"):
                results.append(done(1))
        results.append(failed(2))  # shorter
    assert lines_of(path) == [2]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_fails_no_finished_line_is_lost(tmp_path, monkeypatch, seed):
    rng, path = random.Random(seed), tmp_path / "out.jsonl"
    real = {name: getattr(os, name) for name in ("pwrite", "fsync", "ftruncate")}
    rate = rng.choice((0.1, 0.5))

    def broken(name: str):
        def call(*args):
            if name == "pwrite" and rng.random() < 0.6:
                size = rng.randint(0 if rng.random() < 0.1 else 1, len(args[1]))
                args = (args[0], args[1][:size], args[2])
            if rng.random() < rate:
                code = rng.choice((errno.ENOSPC, errno.EIO, errno.EDQUOT))
                raise OSError(code, os.strerror(code))
            return real[name](*args)

        return call

    safe: set[int] = set()
    for line in range(1, 60, 3):
        records = [(done if rng.random() < 0.7 else failed)(line + i) for i in range(3)]
        with Results(path) as results:
            assert safe <= set(results.entries)
            with monkeypatch.context() as patch:
                for name in real:
                    patch.setattr(module.os, name, broken(name))
                said = None
                try:
                    results.append(*records)
                except ResultsError as error:
                    said = str(error)
            whole = {line, line + 1, line + 2} <= set(results.entries)
            assert whole if said is None else f"the {len(results)} lines in it are safe" in said
            safe |= set(results.entries)
    with Results(path) as results:
        assert safe <= set(results.entries)
    assert len(lines_of(path)) == len(set(lines_of(path)))


# Going on


def test_what_failed_is_tried_again_only_if_it_changed(tmp_path):
    path = tmp_path / "out.jsonl"
    over_long = request(3)
    with Results(path) as results:
        results.append(done(1), failed(2, "a"), failed(4, "a"), failed(5, "gone"))
        results.add_failures([Failure.of(over_long, "invalid_prompt", "too long")])
        same, changed = [request(1), over_long], [request(4)]
        results.match([*same, *changed], [failure(2, "a")])
        assert sorted(results.entries) == [1, 2, 3]
        assert results.pending([*same, *changed]) == changed
        results.add_failures([failure(2, "a"), failure(6, "b")])
        results.append(done(4))
    assert lines_of(path) == [1, 2, 3, 6, 4]
    content = path.read_bytes()
    with Results(path) as results:
        results.match([*same, *changed], [failure(2, "a"), failure(6, "b")])
    assert path.read_bytes() == content


def test_a_link_stays_one(tmp_path):
    (tmp_path / "out.jsonl").symlink_to(tmp_path / "real.jsonl")
    with Results(tmp_path / "out.jsonl") as results:
        results.append(failed(1), done(2))
        results.match([request(1), request(2)], [])
        results.append(done(1))
    assert (tmp_path / "out.jsonl").is_symlink()
    assert lines_of(tmp_path / "real.jsonl") == [2, 1]


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (request(1, "other"), "of 'id-1' with other prompt than asked for now"),
        (request(1, temperature=0.5), "of 'id-1' with other params than asked for now"),
        (failure(1), "of 'id-1' for line 1, which is now another line"),
    ],
)
def test_a_completion_of_something_else_is_refused(tmp_path, now, message):
    path = tmp_path / "out.jsonl"
    content = filled(path, done(1))
    outcome = ([], [now]) if isinstance(now, Failure) else ([now], [])
    with Results(path) as results:
        with pytest.raises(ResultsError, match=message):
            results.match(*outcome)
        if "params" in message:
            results.match(*outcome, force=True)
            assert results.pending(outcome[0]) == []
        else:
            with pytest.raises(ResultsError, match=message):
                results.match(*outcome, force=True)
    assert path.read_bytes() == content


def test_the_lock_ends_with_the_process(tmp_path):
    path = tmp_path / "out.jsonl"
    program = (
        "import os, pathlib, signal, sys\n"
        "from mimo_jax.engine.results import Results\n"
        "results = Results(pathlib.Path(sys.argv[1]))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode < 0
    Results(path).close()


def test_half_a_surrogate_pair_is_escaped_rather_than_lost(tmp_path):
    path = tmp_path / "out.jsonl"
    record = {**done(1), "text": "\ud800"}
    filled(path, record)
    assert json.loads(path.read_bytes())["text"] == "\ud800"
