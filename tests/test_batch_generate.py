"""Batch generation: bad lines, what is on the disk when, and going on after an interruption."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import batch_generate
import hypothesis.strategies as st
import pytest
from hypothesis import given
from tiny import tiny
from typer.testing import CliRunner

import mimo_jax as mj
from mimo_jax.engine import jsonl
from mimo_jax.engine.jsonl import Failure, Request, Results, ResultsError, read_requests

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "prompts.jsonl"

# Three batches of two completions each, which share a compiled shape; bad lines stand in between.
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


def read(tmp_path: Path, *lines: Any, **defaults: Any) -> tuple[list[Request], list[Failure]]:
    return read_requests(write(tmp_path / "in.jsonl", list(lines)), defaults, 0)


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


# What a line may be


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", "a line is a JSON object; found list"),
        (200_000 * "[", "recursion"),
        ({"promt": "x"}, "one of prompt, messages, token_ids; found none of them, but promt"),
        ({}, "found none of them, but nothing"),
        ({"prompt": "x", "token_ids": [1]}, "found prompt and token_ids"),
        ({"prompt": ""}, "it must be a string, and not empty"),
        ({"prompt": 3}, "prompt is 3; it must be a string"),
        ({"prompt": "x", "id": 3}, "id is 3; it must be a non-empty string"),
        ({"prompt": "x", "id": ""}, "it must be a non-empty string"),
        ({"prompt": "\ud800"}, "surrogates not allowed"),
        ({"messages": []}, "messages is []; it must be a list of chat messages"),
        ({"messages": ["hi"]}, "it must be a list of chat messages"),
        ({"token_ids": [1, True]}, "it must be a list of integers"),
        ({"token_ids": "12"}, "it must be a list of integers"),
        ({"prompt": "x", "temprature": 1}, "did you mean temperature?"),
        ({"prompt": "x", "temperature": -1}, "temperature is -1; it must be"),
        ({"prompt": "x", "top_p": float("nan")}, "top_p is nan; it must be"),
        ({"prompt": "x", "n": 10**6}, "n is 1000000; in a batch it is at most 128"),
        ({"prompt": "x", "logprobs": 21}, "logprobs is 21; in a batch it is at most 20"),
    ],
)
def test_a_malformed_line_is_a_failure_and_spoils_no_other(tmp_path, line, message):
    requests, failures = read(tmp_path, {"prompt": "a"}, line, "", {"prompt": "b"})
    assert [(r.line, r.id) for r in requests] == [(1, "line-1"), (4, "line-4")]
    assert [(f.line, f.type) for f in failures] == [(2, "invalid_request")]
    assert message in failures[0].message


def test_a_failure_has_the_id_if_that_can_be_read(tmp_path):
    lines = {"id": "a", "prompt": ""}, {"prompt": ""}, {"id": 3, "prompt": "x"}, "{"
    assert [f.id for f in read(tmp_path, *lines)[1]] == ["a", "line-2", None, None]


def test_bytes_that_are_not_utf_8(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "\xff"}')
    requests, failures = read_requests(tmp_path / "in.jsonl", {}, 0)
    assert [r.prompt for r in requests] == ["a"]
    assert [f.line for f in failures] == [2]


@given(st.lists(st.binary(max_size=30).filter(lambda b: b"\n" not in b), max_size=5))
def test_every_line_that_is_not_empty_has_one_outcome(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("any") / "in.jsonl"
    path.write_bytes(b"\n".join(lines))
    requests, failures = read_requests(path, {}, 0)
    outcomes = sorted([r.line for r in requests] + [f.line for f in failures])
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert outcomes == [i for i, line in enumerate(content, 1) if line.strip()]


def test_a_later_line_with_the_same_id_is_a_failure(tmp_path):
    lines = {"id": "line-3", "prompt": "a"}, {"id": "x", "prompt": "a"}, {"prompt": "b"}
    requests, failures = read(tmp_path, *lines, {"id": "x", "prompt": "c"})
    assert [r.id for r in requests] == ["line-3", "x"]
    assert [(f.line, f.id) for f in failures] == [(3, "line-3"), (4, "x")]
    assert "ids are unique" in failures[0].message


def test_a_line_overrides_the_options(tmp_path):
    lines = {"prompt": "a"}, {"prompt": "a", "temperature": 0, "stop": "x", "max_tokens": None}
    requests, _ = read(tmp_path, *lines, temperature=0.5, max_tokens=7, top_p=None)
    first, second = (r.params for r in requests)
    assert (first.temperature, first.max_tokens, first.stop, first.top_p) == (0.5, 7, (), 1.0)
    assert (second.temperature, second.stop) == (0.0, ("x",))
    assert second.max_tokens == mj.SamplingParams().max_tokens  # null is SamplingParams' default


def test_a_seed_depends_on_the_id_and_the_option_only(tmp_path):
    one, two = {"id": "one", "prompt": "a"}, {"id": "two", "prompt": "a"}
    seeds = {r.id: r.params.seed for r in read(tmp_path, one, two)[0]}
    other_order = {r.id: r.params.seed for r in read(tmp_path, {"prompt": "b"}, two, one)[0]}
    assert seeds["one"] != seeds["two"]
    assert {k: other_order[k] for k in seeds} == seeds
    with_option = read_requests(write(tmp_path / "in.jsonl", [one]), {}, 1)[0]
    assert with_option[0].params.seed != seeds["one"]
    assert read(tmp_path, {"prompt": "a", "seed": 3})[0][0].params.seed == 3


def test_the_examples_are_well_formed():
    requests, failures = read_requests(EXAMPLES, {}, 0)
    assert failures == []
    assert len(requests) >= 12


# The file of results


def result(line: int) -> dict[str, Any]:
    return {"line": line, "id": f"line-{line}", "text": "ä\n", "params": {}}


def test_half_a_line_at_the_end_is_cut_off_wherever_it_was_cut(tmp_path):
    path = tmp_path / "out.jsonl"
    Results(path).append(result(1))
    first = path.read_bytes()
    results = Results(path)
    results.append(result(2))
    whole = path.read_bytes()
    for end in range(len(first), len(whole)):
        path.write_bytes(whole[:end])
        assert Results(path).records == [result(1)]
        assert path.read_bytes() == first


@pytest.mark.parametrize(
    "content",
    [
        '{"prompt": "my input"}\n',
        '{"line": 1, "id": "a", "text": ""}\n{"id": "b", "prompt": "x"}\n',
        '{"id": "a", "prompt": "no line end"}',
        "notes",
        "\n",
    ],
)
def test_another_kind_of_file_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(ResultsError, match="is no result of a batch"):
        Results(path)
    assert path.read_text() == content


@pytest.mark.parametrize("failing", ["write", "fsync"])
def test_a_failed_write_leaves_whole_lines_and_says_so(tmp_path, monkeypatch, failing):
    path = tmp_path / "out.jsonl"
    results = Results(path)
    results.append(result(1))
    safe = path.read_bytes()
    real_write, full = os.write, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write_some(file: int, data: bytes) -> int:
        if len(data) < len(safe):  # the rest of what was written in part
            raise full
        return real_write(file, data[:7])

    def fsync(file: int) -> None:
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(jsonl.os, failing, write_some if failing == "write" else fsync)
        with pytest.raises(ResultsError, match=r"out.jsonl failed .*No space left.*the 1 lines"):
            results.append(result(2))
    assert path.read_bytes() == safe
    results.append(result(3))
    assert [r["line"] for r in Results(path).records] == [1, 3]


def test_what_can_not_be_a_file_of_results(tmp_path):
    with pytest.raises(ResultsError, match="is not a regular file"):
        Results(tmp_path)
    with pytest.raises(ResultsError, match="is not a regular file"):
        Results(Path("/dev/full"))
    (tmp_path / "file").touch()
    with pytest.raises(ResultsError, match="can't be written"):
        Results(tmp_path / "file" / "out.jsonl")


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
    lines = expected.splitlines(keepends=True)
    for keep in (2, len(lines) - 1):  # in the first batch, and in the last line
        part = b"".join(lines[:keep]) + lines[keep][: len(lines[keep]) // 2]
        out.write_bytes(part)
        done, _ = generate(MIXED)
        assert done.exit_code == 1, done.stderr
        assert out.read_bytes().startswith(b"".join(lines[:keep]))
        assert untimed(out) == untimed(uninterrupted[0])


def test_ctrl_c_keeps_finished_batches(generate, monkeypatch, uninterrupted):
    real = tiny().generate

    def once(*args: Any, **options: Any):
        monkeypatch.setattr(tiny(), "generate", interrupt)
        return real(*args, **options)

    def interrupt(*args: Any, **options: Any):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny(), "generate", once)
    done, out = generate(MIXED)
    assert done.exit_code == 130
    assert "interrupted: 5 lines are safe" in done.stderr
    assert [r["line"] for r in records(out)] == [2, 4, 1, 3, 5]
    monkeypatch.setattr(tiny(), "generate", real)
    generate(MIXED)
    assert untimed(out) == untimed(uninterrupted[0])


def test_a_full_disk_stops_the_run_and_names_the_file(generate, monkeypatch):
    calls = []

    def fsync(file: int) -> None:
        calls.append(file)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(jsonl.os, "fsync", fsync)
    done, out = generate(MIXED)
    assert done.exit_code == 1
    message = "".join(done.stderr.split("\n"))
    assert f"writing {out} failed" in message
    assert "the 3 lines in it are safe" in message
    assert len(records(out)) == 3


def test_a_finished_run_loads_no_model(generate, monkeypatch):
    lines = [{"prompt": "import os\n"}]
    first, out = generate(lines)
    assert first.exit_code == 0, first.stderr
    content = out.read_bytes()
    monkeypatch.delattr(mj, "load")
    again, _ = generate(lines)
    assert again.exit_code == 0, again.stderr
    assert out.read_bytes() == content


def test_a_corrected_line_is_completed(generate):
    first, out = generate([{"prompt": "import os\n"}, {"prompt": 3}])
    assert first.exit_code == 1
    again, _ = generate([{"prompt": "import os\n"}, {"prompt": "import re\n"}])
    assert again.exit_code == 0, again.stderr
    assert [(r["line"], "text" in r) for r in records(out)] == [(2, False), (1, True), (2, True)]


def test_going_on_with_other_settings_is_refused(generate):
    lines = [{"id": "a", "prompt": "import os\n"}]
    _, out = generate(lines)
    content = out.read_bytes()
    other, _ = generate(lines, "--temperature", "0.5")
    assert other.exit_code == 1
    assert "has 'a' with other params than asked for now" in other.stderr
    changed, _ = generate([{"id": "a", "prompt": "import re\n"}])
    assert "has 'a' with other prompt" in changed.stderr
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
