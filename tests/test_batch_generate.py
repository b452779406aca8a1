"""Batch generation: what is on the disk when, and going on after an interruption."""

import errno
import itertools
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import batch_generate
import pytest
from tiny import tiny
from typer.testing import CliRunner

import mimo_jax as mj
from mimo_jax import cli
from mimo_jax.cli import progress
from mimo_jax.decoding.slots import Slots
from mimo_jax.engine import results
from mimo_jax.engine.manifest import manifest_path

# Two completions at a time; bad lines stand in between.
MIXED = [
    {"id": "one", "prompt": "import os\n", "temperature": 1.0},
    '{"id": "broken", "prompt": ',
    {"token_ids": [5, 6, 7], "max_tokens": 3},
    {"id": "one", "prompt": "again"},
    {"id": "long", "prompt": 3000 * "a b "},
    {"id": "chat", "messages": [{"role": "user", "content": "hi"}], "n": 2},
    {"id": "unknown", "token_ids": [4095]},
    {"id": "two", "prompt": "class Größe:\n", "temperature": 1.0, "n": 2},
]


MANY = [{"token_ids": [5, 6, 7 + i], "max_tokens": 5 + i} for i in range(10)]


def write(path: Path, lines: list[Any]) -> Path:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def untimed(path: Path) -> list[dict[str, Any]]:
    """The records without what differs from run to run, in the order of the input."""
    found = [{k: v for k, v in r.items() if k != "metrics"} for r in records(path)]
    return sorted(found, key=lambda record: record["line"])


@pytest.fixture
def generate(monkeypatch, tmp_path):
    """Runs the program on lines with mimo-tiny, and returns its result and the output file."""
    monkeypatch.setattr(mj, "load", lambda *args, **options: tiny())
    out = tmp_path / "deep" / "out.jsonl"

    def run(lines: list[Any], *options: str):
        source = write(tmp_path / "in.jsonl", lines)
        args = [str(source), str(out), "--batch-size", "2", "--max-tokens", "6", *options]
        return CliRunner().invoke(batch_generate.app, args), out

    return run


# The program


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The output of MIXED, all of it run at once."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    source, out = write(folder / "in.jsonl", MIXED), folder / "out.jsonl"
    tiny()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mj, "load", lambda *args, **options: tiny())
        args = [str(source), str(out), "--batch-size", "2", "--max-tokens", "6"]
        done = CliRunner().invoke(batch_generate.app, args)
    assert done.exit_code == 1, done.stderr  # some lines have errors
    return out, done


def test_every_line_has_its_result(uninterrupted):
    out, _ = uninterrupted
    by_line = {record["line"]: record for record in records(out)}
    assert sorted(by_line) == list(range(1, 9))
    errors = {n: r["error"]["type"] for n, r in by_line.items() if "error" in r}
    assert errors == {
        2: "invalid_request",
        4: "invalid_request",
        5: "invalid_prompt",
        7: "invalid_prompt",
    }
    assert "shorten it" in by_line[5]["error"]["message"]
    assert by_line[3]["id"] == "line-3"
    assert by_line[3]["token_ids"] == [5, 6, 7]
    assert by_line[3]["usage"] == {"prompt_tokens": 3, "completion_tokens": 3}
    assert by_line[6]["messages"] == MIXED[5]["messages"]
    assert by_line[8]["prompt"] == "class Größe:\n"
    assert len(by_line[8]["completions"]) == 2
    assert by_line[8]["usage"]["completion_tokens"] <= 12
    for record in by_line.values():
        if "text" in record:
            assert record["finish_reason"] in ("stop", "length")
            assert record["metrics"]["ttft_s"] > 0


def test_a_result_is_what_generate_gives(uninterrupted):
    record = records(uninterrupted[0])[-1]
    params = mj.SamplingParams.from_dict(record["params"])
    again = tiny().generate(record["prompt"], params, batch_size=2)[0]
    assert [c["text"] for c in record["completions"]] == [c.text for c in again.completions]


def test_the_summary(uninterrupted):
    out, done = uninterrupted
    generated = sum(r["usage"]["completion_tokens"] for r in records(out) if "text" in r)
    rows = {
        cells[0].strip(): cells[1].strip()
        for line in done.stdout.splitlines()
        if len(cells := line.strip("│").split("│")) == 2
    }
    assert rows["requests completed"] == "4"
    assert rows["lines with errors"] == "4"
    assert rows["generated tokens"] == str(generated)
    assert float(rows["generated tokens/s, running"]) > 0
    assert "one: completion (" in done.stdout


def test_a_torn_file_is_continued_to_what_the_uninterrupted_run_wrote(generate, uninterrupted):
    expected = uninterrupted[0].read_bytes()
    _, out = generate([])
    shutil.copy(manifest_path(uninterrupted[0]), manifest_path(out))
    lines = expected.splitlines(keepends=True)
    for keep in (2, len(lines) - 1):  # in the first batch, and in the last line
        part = b"".join(lines[:keep]) + lines[keep][: len(lines[keep]) // 2]
        out.write_bytes(part)
        done, _ = generate(MIXED)
        assert done.exit_code == 1, done.stderr
        assert out.read_bytes().startswith(b"".join(lines[:keep]))
        assert untimed(out) == untimed(uninterrupted[0])


def interrupting(monkeypatch: pytest.MonkeyPatch, signals: dict[int, int]) -> None:
    """Sends this process signals at the given dispatches of steps."""
    real, count = Slots.decode, itertools.count()

    def decode(*args: Any) -> Any:
        seen = real(*args)
        if number := signals.get(next(count)):
            signal.raise_signal(number)
        return seen

    monkeypatch.setattr(Slots, "decode", decode)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_when_what_is_under_way_is_done(generate, monkeypatch, number):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        interrupting(patch, {0: number})
        done, out = generate(MANY)
    assert done.exit_code == 130
    assert "finishing the requests under way; once more to stop at once" in done.stderr
    kept = out.read_bytes()
    # Two in slots and two in lanes; and one or two may have begun in their place before.
    assert 4 <= len(records(out)) <= 8
    assert f"interrupted: {len(records(out))} lines are safe" in done.stderr
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    again, _ = generate(MANY)
    assert again.exit_code == 0, again.stderr
    assert out.read_bytes().startswith(kept)
    resumed = untimed(out)
    out.unlink()
    generate(MANY)
    assert untimed(out) == resumed


def test_a_second_signal_ends_the_run_at_once(generate, monkeypatch):
    interrupting(monkeypatch, {0: signal.SIGTERM, 1: signal.SIGINT})
    done, out = generate([{**line, "max_tokens": 60} for line in MANY], "--max-len", "100")
    assert done.exit_code == 130
    assert "interrupted: 0 lines are safe" in done.stderr
    assert records(out) == []


def test_metrics_a_profile_and_lines_of_progress(generate, monkeypatch, tmp_path):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    monkeypatch.setattr(progress, "METRICS_EVERY", 0.0)
    monkeypatch.setattr(progress, "PROFILE_AFTER", 2)
    monkeypatch.setattr(progress, "PROFILED", 2)
    metrics, profile = tmp_path / "metrics.jsonl", tmp_path / "profile"
    done, out = generate(
        MANY, "--metrics", str(metrics), "--profile", str(profile), "--speculative", "mtp"
    )
    assert done.exit_code == 0, done.stderr
    lines = records(metrics)
    assert [line["done"] for line in lines] == sorted(line["done"] for line in lines)
    last = lines[-1]
    assert (last["done"], last["total"], last["running"], last["waiting"]) == (10, 10, 0, 0)
    assert last["prompt_tokens"] == 30
    assert last["generated_tokens"] == sum(r["usage"]["completion_tokens"] for r in records(out))
    assert last["tokens_per_round"] > 1
    assert max(line["cache_used"] for line in lines) > 0
    assert max(line["generated_tokens_s"] for line in lines) > 0
    assert list(profile.rglob("*.xplane.pb"))
    assert f"a profile of 2 dispatches is in {profile}" in done.stderr
    assert "10 of 10 requests done" in done.stderr
    assert re.search(r"\d+ of 10 requests done; \d+ tokens/s out, \d+ in; 2 running, ", done.stderr)
    assert "tokens a round" in done.stderr


def test_a_terminal_has_a_bar_that_goes_away(generate, monkeypatch):
    monkeypatch.setattr(progress, "BAR_EVERY", 0.0)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "160"}.items():
        monkeypatch.setenv(name, value)
    done, _ = generate(MANY, "--speculative", "mtp")
    assert done.exit_code == 0, done.stderr
    # The console's codes: a line is erased (2K) before it is written again.
    frames = re.sub(r"\x1b\[(?!2K)[0-9;?]*[a-zA-Z]", "", done.stderr).split("\x1b[2K")
    assert any("━" in frame and " 0/10 " in frame for frame in frames)
    state = r" 10/10 \d+:\d\d:\d\d \d+ tokens/s out, \d+ in; 0 running, 0 waiting; cache "
    assert any(re.search(state, frame) and "tokens a round" in frame for frame in frames)
    assert "━" not in frames[-1].split("10 of 10 requests done")[0]
    assert "requests done; " not in done.stderr  # which lines of a log have


def test_metrics_end_with_a_full_disk_and_the_run_does_not(generate, monkeypatch):
    monkeypatch.setattr(progress, "METRICS_EVERY", 0.0)
    done, out = generate(MANY[:3], "--metrics", "/dev/full")
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("no more metrics: writing /dev/full failed") == 1
    assert len(records(out)) == 3


def test_the_length_of_the_cache_decides_what_fits(generate):
    lines = [{"token_ids": [5] * n, "max_tokens": 50} for n in (9, 40, 31)]
    done, out = generate(lines, "--max-len", "40")
    assert done.exit_code == 1
    by_line = {r["line"]: r for r in records(out)}
    assert "leaves no room to generate within 40 positions" in by_line[2]["error"]["message"]
    assert by_line[3]["usage"] == {"prompt_tokens": 31, "completion_tokens": 9}
    refused, _ = generate(lines, "--max-len", "64")
    assert refused.exit_code == 1
    assert "decoding.max_len: 40 -> 64" in refused.stderr


def test_shards_are_merged_into_what_one_run_writes(generate, tmp_path, uninterrupted):
    parts = []
    for i in (1, 2, 3):
        done, out = generate(MIXED, "--shard", f"{i}/3")
        assert done.exit_code in (0, 1), done.stderr
        for file in (out, manifest_path(out)):
            file.rename(out.with_name(file.name.replace("out", f"part{i}")))
        parts.append(str(out.with_name(f"part{i}.jsonl")))
    whole = tmp_path / "whole.jsonl"
    done = CliRunner().invoke(cli.app, ["merge", *parts, "--out", str(whole)])
    assert done.exit_code == 0, done.stderr
    assert [r["line"] for r in records(whole)] == list(range(1, 9))
    # Batches of other lines round differently, so only what was asked for is the same.
    asked = [{k: r[k] for k in ("id", "fingerprint")} for r in untimed(uninterrupted[0])]
    assert [{k: r[k] for k in ("id", "fingerprint")} for r in records(whole)] == asked
    again = CliRunner().invoke(cli.app, ["merge", *parts, "--out", str(whole)])
    assert again.exit_code == 1
    assert "is there already" in again.stderr


def test_a_full_disk_stops_the_run_and_names_the_file(generate, monkeypatch):
    _, out = generate([])

    def fsync(file: int) -> None:
        if out.exists() and len(records(out)) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(results.os, "fsync", fsync)
    done, out = generate(MIXED)
    assert done.exit_code == 1
    message = "".join(done.stderr.split("\n"))
    assert f"writing {out} failed" in message
    assert "the 2 lines in it are safe" in message
    assert len(records(out)) == 2


def test_a_finished_run_loads_no_model(generate, monkeypatch):
    lines = [{"prompt": "import os\n"}]
    first, out = generate(lines)
    assert first.exit_code == 0, first.stderr
    content = out.read_bytes()
    monkeypatch.delattr(mj, "load")
    again, _ = generate(lines)
    assert again.exit_code == 0, again.stderr
    assert out.read_bytes() == content


def test_lines_of_openai_s_batch_api(generate, monkeypatch):
    def line(name: str, url: str, **body: Any) -> dict[str, Any]:
        return {"custom_id": name, "method": "POST", "url": f"/v1/{url}", "body": body}

    messages = [{"role": "user", "content": "hi"}]
    lines = [
        line("a", "chat/completions", messages=messages, logprobs=True, top_logprobs=2),
        line("b", "completions", prompt="import os\n", temperature=0, logprobs=1),
        line("c", "completions", prompt="x", suffix="y"),
        line("d", "completions", prompt=3000 * "a b "),
    ]
    done, out = generate(lines)
    assert done.exit_code == 1, done.stderr
    assert "b: completion (" in done.stdout
    found = {r["custom_id"]: r for r in records(out)}
    assert [found[k]["error"] and found[k]["error"]["code"] for k in "abcd"] == [
        *(None, None, "invalid_request", "invalid_prompt")
    ]
    chat, text = (found[k]["response"]["body"] for k in "ab")
    assert chat["model"] == "mimo-tiny"
    assert chat["choices"][0]["message"]["role"] == "assistant"
    assert len(chat["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 2
    again = tiny().generate("import os\n", mj.SamplingParams(temperature=0.0, max_tokens=6))[0]
    assert text["choices"][0]["text"] == again.text
    assert "".join(text["choices"][0]["logprobs"]["tokens"]).startswith(again.text)
    content = out.read_bytes()
    monkeypatch.delattr(mj, "load")  # what failed isn't tried again
    assert generate(lines)[0].exit_code == 1
    assert out.read_bytes() == content


def test_a_corrected_line_is_completed(generate):
    first, out = generate([{"prompt": "import os\n"}, {"prompt": 3}])
    assert first.exit_code == 1
    corrected = [{"prompt": "import os\n"}, {"prompt": "import re\n"}]
    refused, _ = generate(corrected)
    assert refused.exit_code == 1
    assert "input.sha256" in refused.stderr
    again, _ = generate(corrected, "--force")
    assert again.exit_code == 0, again.stderr
    assert [(r["line"], "text" in r) for r in records(out)] == [(1, True), (2, True)]


def test_going_on_with_other_settings_is_refused(generate):
    lines = [{"id": "a", "prompt": "import os\n"}]
    _, out = generate(lines)
    content = out.read_bytes()
    other, _ = generate(lines, "--temperature", "0.5")
    assert other.exit_code == 1
    assert "sampling.temperature: (nothing) -> 0.5" in other.stderr
    changed, _ = generate([{"id": "a", "prompt": "import re\n"}], "--force")
    assert changed.exit_code == 1
    assert "'a' with other prompt" in changed.stderr
    assert out.read_bytes() == content


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--temperature", "-1"], "temperature is -1.0"), (["--batch-size", "0"], "Invalid value")],
)
def test_wrong_options_write_nothing(generate, options, message):
    done, out = generate([{"prompt": "x"}], *options)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not out.exists()


def test_an_input_that_is_not_there(tmp_path):
    args = [str(tmp_path / "none.jsonl"), str(tmp_path / "out.jsonl")]
    done = CliRunner().invoke(batch_generate.app, args)
    assert done.exit_code == 2
    assert "none.jsonl" in done.stderr
    assert not (tmp_path / "out.jsonl").exists()
