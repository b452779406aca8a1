"""Processes that do jobs: whatever happens to one, its row says so and the next job is done."""

import dataclasses
import functools
import json
import os
import signal
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from mimo_jax.portability import study, workers
from mimo_jax.portability.jobs import Job, unfinished
from mimo_jax.portability.results import STAGES, Results
from mimo_jax.portability.workers import environment, run_jobs

# A process in the place of the real one, that does what a job's case says.
FAKE = """
import json, os, signal, subprocess, sys, time

def finished(job):
    stages = {name: {"status": "ok"} for name in ("trace", "lower", "compile", "agree", "time")}
    row = {key: job[key] for key in ("subject", "case", "target", "backend")}
    text = json.dumps({**row, "devices": 1, "mesh": str(os.getpid()), "stages": stages})
    os.write(1, text.encode() + b"\\n")

def say(text):
    os.write(2, text.encode())

for line in sys.stdin:
    job = json.loads(line)
    say(f"began {job['case']}; ")
    exec(job["case"])
    finished(job)
"""
GOOD = "pass"


def job(does: str, backend: str = "reference") -> Job:
    return Job("moe", does, "hopper", backend)


@pytest.fixture
def run(tmp_path):
    """Does jobs with the fake process, and returns their rows by case."""
    fake = tmp_path / "fake.py"
    fake.write_text(FAKE)

    def run(*cases: str, timeout: float = 60.0, count: int = 1, done=None) -> dict:
        rows = {}

        def keep(job: Job, row) -> None:
            assert job.case not in rows
            rows[job.case] = row
            if done is not None:
                done(job, row)

        jobs = [job(case) for case in cases]
        command = [sys.executable, "-S", str(fake)]
        run_jobs(jobs, os.environ, workers=count, timeout=timeout, done=keep, command=command)
        return rows

    run.command = [sys.executable, "-S", str(fake)]
    return run


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No process that isn't waited for, no open file, no thread."""

    def held() -> tuple[set[str], int]:
        return set(os.listdir("/proc/self/fd")), threading.active_count()

    before = held()
    yield
    after = held()
    assert len(after[0]) <= len(before[0])
    assert after[1] == before[1]
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def failed(row) -> str:
    """Why a row failed, which has all stages nevertheless."""
    assert tuple(sorted(row.stages)) == tuple(sorted(STAGES))
    assert row.reached == ("trace", row.stages["trace"])
    assert row.stages["trace"].status == "failed"
    assert {row.stages[name].status for name in STAGES[1:]} == {"not run"}
    return row.stages["trace"].reason


@pytest.mark.parametrize(
    ("does", "why", "said"),
    [
        ("say('LLVM ERROR'); os.abort()", "ended by SIGABRT", "LLVM ERROR"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "ended by SIGKILL", "began os.kill"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV", "began os.kill"),
        ("os.kill(os.getpid(), signal.SIGRTMIN + 1)", f"signal {signal.SIGRTMIN + 1}", "began"),
        ("sys.exit(3)", "ended with exit code 3", "began sys.exit"),
        ("os._exit(0)", "ended with exit code 0", "began os._exit"),
        ("raise MemoryError('no more')", "ended with exit code 1", "MemoryError: no more"),
        ("sys.stdin.close(); 1 / 0", "ended with exit code 1", "ZeroDivisionError"),
        ("os.write(1, b'{half a row'); os.abort()", "ended by SIGABRT", "began"),
        # It answers no more some time before it ends.
        ("os.close(1); time.sleep(0.5); os._exit(7)", "ended with exit code 7", "began os.close"),
        ("say('x' * 3_000_000 + ' the end'); os.abort()", "SIGABRT", "xxx the end"),
        ("os.write(2, b'\\xff\\xfe\\x00 odd'); os.abort()", "SIGABRT", "odd"),
    ],
)
def test_a_process_that_dies_is_started_again(run, does, why, said):
    rows = run(GOOD, does, GOOD + " ")
    reason = failed(rows[does])
    assert why in reason
    assert "it said last: " in reason
    assert reason.endswith(said) or said in reason
    assert len(reason) < 2200
    assert rows[GOOD].reached[1].status == rows[GOOD + " "].reached[1].status == "ok"
    assert rows[GOOD].mesh != rows[GOOD + " "].mesh  # of two processes


def test_a_process_does_job_after_job(run):
    rows = run("1", "2", "3")
    assert len({row.mesh for row in rows.values()}) == 1


def test_what_was_said_before_the_job_is_not_its_last_word(run):
    rows = run("say('earlier'); ", "os.abort()")
    assert "earlier" not in failed(rows["os.abort()"])


def test_a_process_that_hangs_is_given_up_with_what_it_started(run, tmp_path):
    pid = tmp_path / "pid"
    child = "subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'])"
    hangs = f"open({str(pid)!r}, 'w').write(str({child}.pid)); say('at it'); time.sleep(600)"
    begun = time.monotonic()
    rows = run(hangs, GOOD, timeout=1.5)
    assert time.monotonic() - begun < 60
    reason = failed(rows[hangs])
    assert "not done after 1.5 s, and given up" in reason
    assert reason.endswith("at it")
    assert rows[GOOD].reached[1].status == "ok"
    assert gone(int(pid.read_text()))


def gone(pid: int) -> bool:
    """Whether a process has ended, or does within some seconds."""
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        try:
            if stat.read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_a_process_that_died_between_jobs_costs_no_row(run):
    dies = "threading = __import__('threading'); threading.Timer(0.3, os._exit, [9]).start()"

    def wait(_, __):
        time.sleep(1.0)

    rows = run(dies, GOOD, done=wait)
    assert rows[GOOD].reached[1].status == rows[dies].reached[1].status == "ok"


def test_several_processes_share_the_jobs(run):
    cases = [f"time.sleep(0.2) or {n}" for n in range(6)]
    rows = run(*cases, count=3)
    assert set(rows) == set(cases)
    assert len({row.mesh for row in rows.values()}) == 3


@pytest.mark.parametrize("count", [1, 4])
def test_no_jobs_need_no_process(count, monkeypatch):
    monkeypatch.setattr(workers.subprocess, "Popen", lambda *_, **__: pytest.fail("a process"))
    run_jobs([], os.environ, workers=count, timeout=1.0, done=lambda *_: pytest.fail("a row"))


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_what_is_raised_on_the_way_ends_all_at_once(run, error):
    """As of a full disk; other processes' jobs are neither finished nor given a row."""
    rows = []

    def raises(job: Job, row) -> None:
        rows.append(job.case)
        raise error

    begun = time.monotonic()
    with pytest.raises(type(error)):
        run(GOOD, "time.sleep(599)", "time.sleep(600)", "1", "2", count=3, done=raises)
    assert time.monotonic() - begun < 60
    assert rows == [GOOD]


def test_ctrl_c_ends_the_processes_and_keeps_the_rows(tmp_path):
    """In a process of its own, as from a terminal."""
    fake, pid = tmp_path / "fake.py", tmp_path / "pid"
    fake.write_text(FAKE)
    hangs = f"open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = f"""
        import functools, pathlib, sys
        from mimo_jax.portability import study, workers
        from mimo_jax.portability.jobs import Job
        study.run_jobs = functools.partial(
            workers.run_jobs, command=[sys.executable, "-S", {str(fake)!r}]
        )
        study.plan_jobs = lambda *_, **__: [
            Job("moe", case, "hopper", "reference") for case in ("pass", "os.abort()", {hangs!r})
        ]
        out = pathlib.Path({str(tmp_path / "out")!r})
        options = study.Options(slices=False)
        study.run_study(options, "", lambda *_: None, lambda r: r.write(out))
    """
    # What a shell runs in the background ignores Ctrl-C, and so do its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    command = [sys.executable, "-c", textwrap.dedent(code)]
    process = workers.subprocess.Popen(command, stderr=workers.subprocess.PIPE)
    signal.signal(signal.SIGINT, before)
    with process:
        for _ in range(600):
            if (pid.exists() and pid.read_text()) or process.poll() is not None:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = process.stderr.read().decode()
    assert "KeyboardInterrupt" in said
    assert process.returncode == -signal.SIGINT
    assert gone(int(pid.read_text()))
    kept = Results.read(tmp_path / "out")
    assert [row.case for row in kept] == ["pass", "os.abort()"]
    assert "SIGABRT" in failed(kept.rows[1])


def test_a_study_keeps_rows_when_keeping_fails_later(run, monkeypatch, tmp_path):
    """What was written stays whole and readable."""
    jobs = [job(case) for case in (GOOD, "os.abort()", "3")]
    monkeypatch.setattr(study, "plan_jobs", lambda *_, **__: jobs)
    monkeypatch.setattr(study, "run_jobs", functools.partial(run_jobs, command=run.command))

    def keep(results: Results) -> None:
        if len(results.rows) == 3:
            raise OSError("no space left on device")
        results.write(tmp_path)

    with pytest.raises(OSError, match="no space"):
        study.run_study(study.Options(slices=False), "", lambda *_: None, keep)
    assert [row.case for row in Results.read(tmp_path)] == [GOOD, "os.abort()"]


def test_results_are_replaced_whole_or_not_at_all(monkeypatch, tmp_path):
    first = Results((), ())
    first.write(tmp_path)

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        Results((), (unfinished(job(GOOD), "why"),)).write(tmp_path)
    assert Results.read(tmp_path) == first


# The real process.


def test_the_real_process_answers_whatever_it_is_given():
    """Jobs that can't be done, what compilers print, and a row at the end."""
    jobs = [
        Job("moe", "no such case", "hopper", "reference"),
        Job("decode", "", "hopper", "auto", "no-such-model"),
        Job("decode", "", "hopper", "auto", "colibri-tiny", layers=99),
        Job("decode", "", "hopper", "no-such-kernels", "colibri-tiny", layers=1),
        Job("decode", "", "hopper:8", "auto", "casinca-tiny-mimo-v2-flash", layers=1),
        Job("moe", "small 5", "cpu", "mosaic_gpu"),
    ]
    rows = []
    env = environment(None, devices=False)
    run_jobs(jobs, env, workers=1, timeout=300.0, done=lambda job, row: rows.append(row))
    assert all(set(row.stages) == set(STAGES) for row in rows)
    said = (
        *("there is no moe of case 'no such case'", "called 'no-such-model'", "the model has 6"),
        *("there are no kernels 'no-such-kernels'", "make compile", ""),
    )
    status = ("failed", "failed", "failed", "refused", "not run", "ok")
    for row, why, how in zip(rows, said, status, strict=True):
        assert why in row.stages["trace"].reason
        assert row.stages["trace"].status == how
    assert rows[-1].backend == "mosaic_gpu interpreted"
    assert [rows[-1].stages[name].status for name in STAGES[1:]] == ["ok", "ok", "ok", "not run"]


def test_a_real_process_whose_asker_has_gone_ends_in_the_midst_of_a_job(tmp_path):
    """With what it started, and without a row: a job that would go on for half a minute."""
    pid = tmp_path / "pid"
    code = f"""
        import subprocess, sys, time
        from mimo_jax.portability import worker

        def run_job(job):
            child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
            open({str(pid)!r}, "w").write(str(child.pid))
            print("begun", file=sys.stderr, flush=True)
            time.sleep(30)
            return job

        worker.run_job = run_job
        worker.main()
    """
    process = workers.subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=workers.subprocess.PIPE,
        stdout=workers.subprocess.PIPE,
        stderr=workers.subprocess.PIPE,
        start_new_session=True,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(json.dumps(dataclasses.asdict(job(GOOD))).encode() + b"\n")
        process.stdin.flush()
        assert process.stderr.readline() == b"begun\n"
        process.stdin.close()
        assert process.stdout.read() == b""
    assert process.returncode == -signal.SIGKILL
    assert gone(int(pid.read_text()))


def test_the_environment_of_a_process(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "mine")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    apart = environment(Path("there"), devices=False)
    assert apart["JAX_PLATFORMS"] == "cpu"
    assert apart["MIMO_JAX_COMPILATION_CACHE"] == "off"
    assert apart["PYTHONPATH"].split(os.pathsep) == ["there", "mine"]
    assert environment(None, devices=False)["PYTHONPATH"] == "mine"
    monkeypatch.delenv("PYTHONPATH")
    assert environment(Path("there"), devices=False)["PYTHONPATH"] == "there"
    here = environment(Path("there"), devices=True)
    assert here["JAX_PLATFORMS"] == "cuda"
    assert "PYTHONPATH" not in here
