"""`mimo-jax portability`: what it writes, its exit codes, and what it says of wrong options."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import study_samples as samples
from typer.testing import CliRunner

from mimo_jax import cli
from mimo_jax.portability import study
from mimo_jax.portability.results import Results
from mimo_jax.portability.study import Options

TINY = "tiny-transformers-test"


def run(*args: str):
    return CliRunner().invoke(cli.app, ["portability", *args], prog_name="mimo-jax")


NOTHING = ("--operations", "none", "--models", "none", "--targets", "cpu")


def written(folder: Path, *rows) -> str:
    Results((samples.RUN,), rows).write(folder)
    return str(folder)


@pytest.fixture
def finds(monkeypatch):
    """Has the study find given rows."""

    def use(*rows) -> None:
        found = Results((dataclasses.replace(samples.RUN, at="2026-09-01T00:00:00Z"),), rows)
        monkeypatch.setattr(study, "run_study", lambda *_: found)

    return use


def test_the_command_writes_a_report(tmp_path):
    result = run("--out", str(tmp_path / "new" / "out"), *NOTHING)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("0 rows: ")
    names = {path.name for path in (tmp_path / "new" / "out").iterdir()}
    assert {"results.json", "report.md", "report.html"} <= names
    assert {s.model for s in Results.read(tmp_path / "new" / "out").slices} == set()


def test_the_script_is_the_command(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, root / "scripts" / "portability.py", "--out", tmp_path, *NOTHING]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == []


def test_options_reach_the_study(monkeypatch, tmp_path):
    asked = []

    def run_study(options, command, done, keep):
        asked.append(options)
        return Results((samples.RUN,), ())

    monkeypatch.setattr(study, "run_study", run_study)
    compilers = tmp_path / "compilers"
    compilers.mkdir()
    result = run(
        *("--out", str(tmp_path), "--targets", "cpu, hopper:8", "--operations", "moe"),
        *("--models", TINY, "--steps", "decode,prefill", "--kernels", "auto,reference"),
        *("--layers", "2", "--no-slices", "--workers", "3", "--timeout", "7"),
        *("--compilers", str(compilers)),
    )
    assert result.exit_code == 0, result.output
    (options,) = asked
    assert options == Options(
        ("cpu", "hopper:8"),
        ("moe",),
        (TINY,),
        ("decode", "prefill"),
        ("auto", "reference"),
        2,
        False,
        compilers,
        3,
        7.0,
    )
    monkeypatch.chdir(tmp_path)
    run("--out", str(tmp_path))
    assert asked[1] == Options()
    (tmp_path / ".compilers").mkdir()
    run("--out", str(tmp_path))
    assert asked[2].compilers == tmp_path / ".compilers"


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--targets", "hoper"], 2, "there is no target 'hoper'; there are cpu, here, hopper"),
        (["--targets", "v5e:4"], 2, "write chips of a slice as v5e:4x4"),
        (["--operations", "moe,mole"], 2, "no operation 'mole'; there are moe, quantized_matmul"),
        (["--steps", "encode"], 2, "there is no step 'encode'; there are decode, verify, prefill"),
        (["--kernels", "cuda"], 2, "there is no backend 'cuda'; there are auto, reference"),
        (["--models", "MiMo-V9"], 2, "called 'MiMo-V9'; did you mean 'MiMo-V2.5'"),
        (["--models", TINY, "--layers", "3"], 2, "the model has 2"),
        (["--layers", "-1"], 2, "--layers"),
        (["--workers", "0"], 2, "--workers"),
        (["--compilers", "no/such/folder"], 2, "no folder no/such/folder with compilers"),
        (["--baseline", "no/such/file"], 2, "no/such/file can't be read"),
        (["--join", "no/such/file"], 2, "no/such/file can't be read"),
        (["--compare", "no/such/file", "nor/this"], 2, "no/such/file can't be read"),
        (["--compare", ".", ".", "--same", "h100"], 2, "can't be read"),
        (["--same", "h100=h200"], 2, "--same h100=h200 is of --compare; give that too"),
        (["--timeout", "0"], 2, "--timeout"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(args, code, said, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "run_jobs", lambda *_, **__: pytest.fail("it ran"))
    monkeypatch.chdir(tmp_path)
    result = run("--out", str(tmp_path / "out"), *args)
    assert result.exit_code == code, result.output
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_ctrl_c_says_where_the_rows_are(tmp_path, monkeypatch):
    def run_study(options, command, done, keep):
        keep(Results((samples.RUN,), (samples.row("moe", "pro 8"),)))
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "run_study", run_study)
    result = run("--out", str(tmp_path))
    assert result.exit_code == 130
    assert result.stderr == f"interrupted; the rows so far are in {tmp_path / 'results.json'}\n"
    assert len(Results.read(tmp_path).rows) == 1


def test_here_without_an_accelerator_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    result = run("--out", str(tmp_path), "--targets", "here")
    assert result.exit_code == 2
    assert "'here': jax finds no accelerator on this machine" in result.stderr


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        result = run("--out", str(out), *NOTHING)
        assert result.exit_code == 1, result.output
        assert str(tmp_path / "file") in result.stderr
        assert "Traceback" not in result.stderr
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_regression_from_the_baseline_is_named(tmp_path, finds):
    worse = samples.row("moe", "pro 8", stages=samples.stages("compile", "failed", "it broke"))
    before = written(tmp_path / "before", samples.row("moe", "pro 8"), samples.row("moe", "pro 1"))
    finds(worse, samples.row("moe", "pro 1"))
    out = tmp_path / "out"
    result = run("--out", str(out), "--baseline", before)
    assert result.exit_code == 1
    assert "pro 8" in result.stderr
    assert "it broke" in result.stderr
    assert (out / "report.html").exists()
    finds(samples.row("moe", "pro 8"), samples.row("moe", "pro 1"))
    result = run("--out", str(out), "--baseline", before)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "No regressions" in result.stdout


def test_two_reports_are_compared_and_nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "run_study", lambda *_: pytest.fail("it ran"))
    broken = samples.row("moe", "pro 8", "h200", stages=samples.stages("lower", "failed", "it"))
    a = written(tmp_path / "a", samples.row("moe", "pro 8", "h100"))
    b = written(tmp_path / "b", broken)
    result = run("--compare", a, b)
    assert result.exit_code == 0, result.output
    assert "Nothing could be compared" in result.stdout
    result = run("--compare", a, b, "--same", "h100=h200")
    assert result.exit_code == 0, result.output
    assert "1 regression" in result.stdout
    result = run("--compare", a, b, "--same", "h100")
    assert result.exit_code == 2
    assert "write it as h100=h200" in result.stderr


def test_reports_are_joined(tmp_path, finds):
    finds(samples.row("moe", "pro 8"))
    other = written(tmp_path / "a", samples.row("moe", "pro 1"))
    more = written(tmp_path / "b", samples.row("moe", "pro 64"), samples.measured(case="pro 8"))
    result = run("--out", str(tmp_path / "out"), "--join", other, "--join", more)
    assert result.exit_code == 0, result.output
    joined = Results.read(tmp_path / "out")
    assert {row.case for row in joined} == {"pro 1", "pro 8", "pro 64"}
    # What was run now counts, and not what it is joined with.
    eight = next(row for row in joined if row.case == "pro 8")
    assert eight.speed is None
    assert joined.runs[eight.run].at == "2026-09-01T00:00:00Z"
