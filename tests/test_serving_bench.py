"""`mimo-jax bench`: what it measures, writes and refuses."""

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny import two_layers
from typer.testing import CliRunner

import mimo_jax as mj
from mimo_jax import cli
from mimo_jax.cli.bench_report import title, write_plot
from mimo_jax.decoding.outputs import Completion, GenerationOutput, Metrics
from mimo_jax.engine import serving
from mimo_jax.engine.machine import peak_memory
from mimo_jax.engine.serving import Served, measure, percentiles, serve, summary
from mimo_jax.engine.workload import Lengths, Workload
from sharding.memory import NotEnoughMemoryError

# Prompts of up to one chunk, so that few programs are compiled, for one row and for three.
SIZES = ("--prompt-len", "1-12", "--output-len", "3-40", "--requests", "6")
SMALL = (*SIZES, "--concurrency", "3,1")
WORKLOAD = Workload(Lengths.parse("1-12"), Lengths.parse("3-40"), 6)
LATENCIES = ("ttft_s", "tpot_s", "e2e_s")


@functools.cache
def model() -> mj.LanguageModel:
    """What is measured."""
    return two_layers()


def run(*args: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mj, "load", lambda *args, **options: model())
        return CliRunner().invoke(cli.app, ["bench", *args])


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[Any, dict[str, Any]]:
    """The command's output, and the file that it wrote."""
    model.cache_clear()  # so that all there is to compile is compiled in it
    out = tmp_path_factory.mktemp("bench") / "deep" / "result.json"
    done = run(*SMALL, "--out", str(out))
    assert done.exit_code == 0, done.stderr
    return done, json.loads(out.read_text())


def test_the_file_says_what_was_measured_where(measured):
    result = measured[1]
    assert result["benchmark"] == "serving"
    assert (result["model"], result["layers"], result["mesh"]) == ("mimo-tiny", 2, None)
    assert (result["device"], result["devices"]) == ("cpu", 1)
    assert {*result["versions"]} == {"jax", "jaxlib", "flax", "numpy", "mimo_jax"}
    assert result["workload"] == {
        "prompt_tokens": "1-12",
        "output_tokens": "3-40",
        "arrival": "all at once",
        "requests_per_s": None,
        "seed": 0,
    }
    assert result["arguments"]["concurrency"] == [1, 3]
    assert result["arguments"]["rules"] == "latency"
    assert result["left_out"] == []


def test_every_request_is_served_whole(measured):
    prompts, outputs = WORKLOAD.lengths()
    rows = measured[1]["rows"]
    assert [(row["concurrency"], row["slots"]) for row in rows] == [(1, 1), (3, 3)]
    for row in rows:
        assert row["requests"] == 6
        assert row["prompt_tokens"] == prompts.sum()
        assert row["output_tokens"] == outputs.sum()
        assert row["tpot_requests"] == (outputs > 16).sum()
        assert row["tokens_per_round"] is None
        assert row["max_len"] == 256


def test_nothing_is_compiled_while_it_measures(measured):
    for row in measured[1]["rows"]:
        assert row["compiling_s"] == 0
        assert 0 < row["warmup_compiling_s"] < row["warmup_s"]


def test_throughput_and_latency_agree_with_each_other(measured):
    for row in measured[1]["rows"]:
        seconds = row["seconds"]
        assert row["output_tokens_s"] == pytest.approx(row["output_tokens"] / seconds)
        assert row["requests_s"] == pytest.approx(6 / seconds)
        total = row["prompt_tokens"] + row["output_tokens"]
        assert row["total_tokens_s"] == pytest.approx(total / seconds)
        for name in LATENCIES:
            assert 0 < row[name]["p50"] <= row[name]["p90"] <= row[name]["p99"] <= seconds
        for p in ("p50", "p90", "p99"):
            assert row["e2e_s"][p] >= row["ttft_s"][p]


def test_memory(measured):
    one, three = measured[1]["rows"]
    assert one["peak_of"] == three["peak_of"] == "process"
    assert 2**20 < one["peak_bytes"] <= three["peak_bytes"]
    # A row and a lane for one request; for three, three of each.
    assert three["cache_bytes"] == 3 * one["cache_bytes"] > 0


def test_devices_that_tell_are_asked_for_their_peak():
    class Device:
        process_index = 0

        def __init__(self, peak: int):
            self.peak = peak

        def memory_stats(self) -> dict[str, int]:
            return {"peak_bytes_in_use": self.peak}

    assert peak_memory([Device(3), Device(7)]) == (7, "device")


def test_the_table_has_a_line_for_each_concurrency(measured):
    done, result = measured
    lines = [line.split() for line in done.stdout.splitlines()]
    for row in result["rows"]:
        expected = [str(row["concurrency"]), f"{row['output_tokens_s']:.1f}"]
        assert expected in [line[:2] for line in lines]
    assert "…" not in done.stdout
    assert "concurrency 3: " in done.stderr


def test_requests_do_not_begin_before_they_come(monkeypatch):
    workload = Workload(WORKLOAD.prompt, WORKLOAD.output, 6, rate=8.0)
    lm, taken = model(), []
    engine = lm.engine(batch_size=3, max_len=256)
    complete = engine.run

    def noting(works: Any) -> Any:
        for work in works:
            if work is not None and work.since is not None:
                taken.append((time.perf_counter(), work.since))
            yield work

    monkeypatch.setattr(engine, "run", lambda works: complete(noting(works)))
    row = measure(engine, lm.decoder, workload, [])
    assert [since - taken[0][1] for _, since in taken] == pytest.approx(workload.arrivals())
    assert all(at >= since for at, since in taken)
    assert row["seconds"] > workload.arrivals()[-1]
    assert row["output_tokens"] == workload.lengths()[1].sum()
    assert row["compiling_s"] == 0


def test_waiting_for_a_slot_counts():
    lm = model()
    works = Workload(Lengths.parse("4"), Lengths.parse("8"), 4).works(100)
    _, served = serve(lm.engine(batch_size=1, max_len=256), works)
    first = [one.output.metrics.ttft_s for one in served]
    assert first == sorted(first)
    assert first[-1] > 2 * first[0]


def output(tokens: int, ttft_s: float, tpot_s: float = 0.0) -> GenerationOutput:
    metrics = Metrics(ttft_s, tpot_s, 5, tokens)
    return GenerationOutput([1] * 5, (Completion("", [7] * tokens, "length"),), metrics)


def test_without_a_second_dispatch_there_is_no_time_of_a_token():
    row = summary(1.0, [Served(0.3, output(16, 0.3))])
    assert row["tpot_s"] == {"p50": None, "p90": None, "p99": None}
    assert row["tpot_requests"] == 0


def test_percentiles_are_between_the_two_nearest():
    found = percentiles([float(n) for n in range(101)])
    assert found == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert percentiles([1.0, 2.0])["p50"] == 1.5


def test_ctrl_c_keeps_what_was_measured(monkeypatch, tmp_path, measured):
    rows = iter(measured[1]["rows"])

    def once(*args: Any) -> dict[str, Any]:
        row = next(rows)
        if row["concurrency"] == 3:
            raise KeyboardInterrupt
        return row

    monkeypatch.setattr(serving, "measure", once)
    out = tmp_path / "result.json"
    done = run(*SMALL, "--out", str(out))
    assert done.exit_code == 130
    assert f"interrupted; 1 of 2 are in {out}" in done.stderr
    assert [row["concurrency"] for row in json.loads(out.read_text())["rows"]] == [1]


def test_what_does_not_fit_is_left_out(monkeypatch, tmp_path, measured):
    def engine(batch_size: int, **options: Any) -> None:
        if batch_size >= fits:
            raise NotEnoughMemoryError("caches need more than there is")

    monkeypatch.setattr(model(), "engine", engine)
    monkeypatch.setattr(serving, "measure", lambda *args: measured[1]["rows"][0])
    out, fits = tmp_path / "result.json", 3
    done = run(*SMALL, "--concurrency", "8", "--out", str(out))
    assert done.exit_code == 0, done.stderr
    assert "concurrency 3 and above are left out: caches need" in done.stderr
    assert json.loads(out.read_text())["left_out"] == [3, 8]
    fits = 1
    nothing = run(*SMALL)
    assert nothing.exit_code == 2
    assert "error: caches need" in nothing.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--concurrency", "0"), "--concurrency 0: expected numbers from 1 on"),
        (("--concurrency", "1,x"), "--concurrency 1,x: expected"),
        (("--prompt-len", "9-2"), "the smaller one first"),
        (("--output-len", "5000"), "the model has 4096 positions; shorten the lengths"),
        (("--rate", "-1"), "the rate is -1.0 requests/s"),
        (("--draft-width", "4"), "give --speculative too"),
        (("--plot", "x.gif"), "ends in .png or .svg"),
    ],
)
def test_wrong_options_measure_nothing(monkeypatch, options, message):
    monkeypatch.delattr(serving, "measure")
    done = run(*SIZES, *options)
    assert done.exit_code == 2
    assert message in done.stderr


def test_without_matplotlib_nothing_is_loaded(monkeypatch, tmp_path):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(serving, "measure", None)
    done = run(*SMALL, "--plot", str(tmp_path / "plot.png"))
    assert done.exit_code == 2
    assert "pip install 'mimo-jax[bench]'" in done.stderr


@pytest.fixture
def matplotlib(monkeypatch, tmp_path):
    """matplotlib, whose cache stays out of the home folder."""
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    return pytest.importorskip("matplotlib")


def test_the_command_writes_a_plot(matplotlib, monkeypatch, tmp_path, measured):
    monkeypatch.setattr(serving, "measure", lambda *args: measured[1]["rows"][1])
    plot = tmp_path / "deep" / "plot.png"
    done = run(*SIZES, "--concurrency", "3", "--plot", str(plot))
    assert done.exit_code == 0, done.stderr
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [path.name for path in plot.parent.iterdir()] == ["plot.png"]


def test_a_plot_names_model_device_workload_and_units(matplotlib, tmp_path, measured):
    result = json.loads(json.dumps(measured[1]))
    result["rows"][0]["tpot_s"] = dict.fromkeys(result["rows"][0]["tpot_s"])  # none to show
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        write_plot(result, tmp_path / "plot.svg")
    text = Path(tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert title(result).startswith("mimo-tiny, 2 layers, on 1 x cpu\nprompts 1-12, outputs 3-40")
    for part in (*title(result).split("\n"), "output tokens/s", "seconds", "concurrency (req"):
        assert part in text
