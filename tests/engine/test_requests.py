"""Reading requests: what a line may be, and that a bad one spoils no other."""

import gzip
import hashlib
import io
import sys
import tracemalloc
from pathlib import Path

import hypothesis.strategies as st
import pytest
from engine.request_lines import chat, read, text, write
from hypothesis import given

import mimo_jax as mj
from mimo_jax.engine.requests import Shard, read_requests

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "prompts.jsonl"
DIGITS = 400 * "9"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON: Expecting property name"),
        ("[1]", "a line is a JSON object; found list"),
        (200_000 * "[", "nested deeper than 32 levels"),
        (
            '{"messages": [{"content": ' + 40 * "[" + 40 * "]" + "}]}",
            "nested deeper than 32 levels",
        ),
        ({"promt": "x"}, "one of prompt, messages, token_ids; found none of them, but promt"),
        ({}, "found none of them, but nothing"),
        ({"prompt": "x", "token_ids": [1]}, "found prompt and token_ids"),
        ({"prompt": ""}, "it must be a string, and not empty"),
        ({"prompt": 3}, "prompt is 3; it must be a string"),
        ({"prompt": "x", "id": 3}, "id is 3; it must be a non-empty string"),
        ({"prompt": "x", "id": ""}, "it must be a non-empty string"),
        ({"prompt": "\ud800"}, "half of a surrogate pair"),
        ({"prompt": "x", "id": "\udc00"}, "half of a surrogate pair"),
        ({"messages": []}, "messages is []; it must be a list of chat messages"),
        ({"messages": ["hi"]}, "it must be a list of chat messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "must be text"),
        ({"messages": [{"role": "user", "contents": "x"}]}, 'the unknown field "contents"'),
        ({"token_ids": [1, True]}, "it must be a list of integers"),
        ({"token_ids": "12"}, "it must be a list of integers"),
        ({"token_ids": [1, -1]}, "token_ids has -1; ids are from 0"),
        ({"token_ids": [2**31]}, "token_ids has 2147483648"),
        ({"prompt": "x", "temprature": 1}, "did you mean temperature?"),
        ({"prompt": "x", "temperature": -1}, "temperature is -1; it must be"),
        ({"prompt": "x", "top_p": float("nan")}, "NaN is no JSON number"),
        ({"prompt": "x", "top_p": float("-inf")}, "-Infinity is no JSON number"),
        ('{"prompt": "x", "top_p": 1e999}', "1e999 is beyond the range"),
        (f'{{"prompt": "x", "temperature": {DIGITS}}}', "temperature is 999"),
        (f'{{"prompt": "x", "seed": {20 * DIGITS}}}', "integer of thousands of digits"),
        ('{"prompt": "x", "prompt": "y"}', "the key 'prompt' twice"),
        ('{"messages": [{"role": "a", "role": "b"}]}', "the key 'role' twice"),
        ('{"prompt": "x", "\\ud800": 1, "\\ud800": 2}', "twice"),
        ({"prompt": "x", "n": 10**6}, "n is 1000000; in a batch it is at most 128"),
        ({"prompt": "x", "logprobs": 21}, "logprobs is 21; in a batch it is at most 20"),
        ({"prompt": "x", "stop": 3000 * [""]}, "it must be a non-empty string"),
    ],
)
def test_a_malformed_line_is_a_failure_and_spoils_no_other(tmp_path, line, message):
    requests, failures = read(tmp_path, {"prompt": "a"}, line, "", {"prompt": "b"})
    assert [(r.line, r.id) for r in requests] == [(1, "line-1"), (4, "line-4")]
    assert [(f.line, f.type, f.convention) for f in failures] == [(2, "invalid_request", "plain")]
    assert message in failures[0].message
    assert len(failures[0].message) < 600


def test_a_failure_has_the_id_if_that_can_be_read(tmp_path):
    lines = {"id": "a", "prompt": ""}, {"prompt": ""}, {"id": 3, "prompt": "x"}, "{"
    assert [f.id for f in read(tmp_path, *lines)[1]] == ["a", "line-2", None, None]


def test_bytes_that_are_not_utf_8(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "\xff"}')
    found = read_requests(tmp_path / "in.jsonl", {}, 0)
    assert [r.prompt for r in found.requests] == ["a"]
    assert [f.line for f in found.failures] == [2]
    assert "byte 13 of the line is 0xff, which is not UTF-8" in found.failures[0].message


@given(st.lists(st.binary(max_size=30).filter(lambda b: b"\n" not in b), max_size=5))
def test_every_line_that_is_not_empty_has_one_outcome(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("any") / "in.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = read_requests(path, {}, 0)
    outcomes = sorted([r.line for r in found.requests] + [f.line for f in found.failures])
    if not path.read_bytes().startswith(b"\x1f\x8b\x08"):
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
        assert outcomes == [i for i, line in enumerate(content, 1) if line.strip()]
    assert found.lines == len(outcomes)


def test_a_later_line_with_the_same_id_is_a_failure(tmp_path):
    lines = {"id": "line-3", "prompt": "a"}, {"id": "x", "prompt": "a"}, {"prompt": "b"}
    requests, failures = read(tmp_path, *lines, {"id": "x", "prompt": "c"}, chat("x"))
    assert [r.id for r in requests] == ["line-3", "x"]
    assert [(f.line, f.id) for f in failures] == [(3, "line-3"), (4, "x"), (5, "x")]
    assert "ids are unique" in failures[0].message


def test_a_bad_line_takes_no_id(tmp_path):
    requests, failures = read(tmp_path, {"id": "x", "prompt": 3}, {"id": "x", "prompt": "a"})
    assert [r.line for r in requests] == [2]
    assert [f.line for f in failures] == [1]


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
    with_option = read_requests(write(tmp_path / "in.jsonl", [one]), {}, 1).requests
    assert with_option[0].params.seed != seeds["one"]
    assert read(tmp_path, {"prompt": "a", "seed": 3})[0][0].params.seed == 3


def test_text_parts_become_one_string(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}]
    for line in ({"messages": messages}, chat(messages=messages)):
        assert read(tmp_path, line)[0][0].prompt == [{"role": "user", "content": "ab"}]


def test_a_fingerprint_changes_with_the_request(tmp_path):
    def of(**fields):
        return read(tmp_path, {"id": "a", "prompt": "x", **fields})[0][0].fingerprint.split("-")

    same = of()
    assert of() == same
    for fields in ({"prompt": "y"}, {"id": "b"}):
        assert of(**fields)[0] != same[0]
    changed = of(temperature=0.5)
    assert changed[0] == same[0]
    assert changed[1] != same[1]


def test_the_examples_are_well_formed():
    found = read_requests(EXAMPLES, {}, 0)
    assert found.failures == []
    assert len(found.requests) >= 12


# Where lines come from


def test_a_compressed_file_and_the_standard_input(tmp_path, monkeypatch):
    lines = [{"prompt": "a"}, "{", text("b")]
    plain = read_requests(write(tmp_path / "in.jsonl", lines), {}, 0)
    packed = write(tmp_path / "in.jsonl.gz", lines, pack=True)
    two_members = packed.read_bytes() + gzip.compress(b'{"prompt": "more"}') + 3 * b"\0"
    for content in (packed.read_bytes(), (tmp_path / "in.jsonl").read_bytes(), two_members):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        found = read_requests("-", {}, 0)
        assert found.requests[:2] == plain.requests
        assert found.failures == plain.failures
        assert found.sha256 == hashlib.sha256(content).hexdigest()
    assert found.requests[2].prompt == "more"
    assert read_requests(packed, {}, 0).requests == plain.requests


def test_compressed_data_that_ends_early(tmp_path):
    lines = [{"id": f"r{i}", "prompt": f"number {i * i}"} for i in range(200)]
    path = write(tmp_path / "in.jsonl.gz", lines, pack=True)
    whole = path.read_bytes()
    seen = set()
    for end in (*range(0, 12), *range(12, len(whole), 97), len(whole) - 1):
        path.write_bytes(whole[:end])
        found = read_requests(path, {}, 0)
        count = len(found.requests)
        assert [r.prompt for r in found.requests] == [x["prompt"] for x in lines[:count]]
        assert [f.line for f in found.failures] == [count + 1]
        assert "the gzip data ends" in found.failures[0].message
        assert found.sha256 == hashlib.sha256(whole[:end]).hexdigest()
        seen.add(count)
    assert len(seen) > 5
    assert max(seen) == 200


def test_compressed_data_that_is_damaged(tmp_path):
    lines = [{"id": f"r{i}", "prompt": hashlib.sha256(b"%d" % i).hexdigest()} for i in range(2000)]
    path = write(tmp_path / "in.gz", lines, pack=True)
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])
    found = read_requests(path, {}, 0)
    good = [r.prompt for r in found.requests if r.prompt == lines[r.line - 1]["prompt"]]
    assert len(good) > 900
    assert "the gzip data is damaged here" in found.failures[-1].message
    path.write_bytes(whole + b"garbage")
    found = read_requests(path, {}, 0)
    assert len(found.requests) == 2000
    assert [f.line for f in found.failures] == [2001]


def test_a_file_that_is_named_gz_and_is_not(tmp_path):
    found = read_requests(write(tmp_path / "in.gz", [{"prompt": "a"}]), {}, 0)
    assert found.requests == []
    assert "incorrect header check" in found.failures[0].message


def test_a_line_that_is_too_long_is_passed_over(tmp_path):
    long = {"prompt": 3_000_000 * "x"}
    path = write(tmp_path / "in.jsonl", [{"prompt": "a"}, long, {"prompt": "b"}, long])
    found = read_requests(path, {}, 0, max_line=2_000_000)
    assert [r.line for r in found.requests] == [1, 3]
    assert [f.line for f in found.failures] == [2, 4]
    assert "has 3000014 bytes; it may have 2000000" in found.failures[0].message
    assert len(read_requests(path, {}, 0).requests) == 4


def test_a_line_without_end_is_not_held(tmp_path):
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\n' + bytes(100_000_000), 1))
    tracemalloc.start()
    found = read_requests(path, {}, 0, max_line=1_000_000)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
    assert [r.line for r in found.requests] == [1]
    assert "has 100000000 bytes" in found.failures[0].message


def test_what_can_not_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(OSError, match=path.name):
            read_requests(path, {}, 0)


# Shards


@given(st.integers(1, 7), st.integers(0, 30))
def test_shards_cover_every_line_once(count, lines):
    shards = [Shard.parse(f"{i}/{count}") for i in range(1, count + 1)]
    for line in range(1, lines + 1):
        assert sum(shard.has(line) for shard in shards) == 1


@pytest.mark.parametrize("wrong", ["", "1", "0/2", "3/2", "1/0", "-1/2", "a/b", "1/2/3", " 1/2"])
def test_what_is_no_shard(wrong):
    with pytest.raises(ValueError, match="it must be i/n"):
        Shard.parse(wrong)


def test_shards_of_a_file_agree(tmp_path):
    lines = [{"id": "a", "prompt": "x"}, "{", "", {"id": "a", "prompt": "y"}, text("b"), chat("c")]
    path = write(tmp_path / "in.jsonl", lines)
    whole = read_requests(path, {}, 0)
    parts = [read_requests(path, {}, 0, Shard(i, 2)) for i in (1, 2)]
    requests = sorted((r for p in parts for r in p.requests), key=lambda r: r.line)
    failures = sorted((f for p in parts for f in p.failures), key=lambda f: f.line)
    assert (requests, failures) == (whole.requests, whole.failures)
    assert [p.lines for p in parts] == [5, 5]
    assert str(Shard.parse("2/3")) == "2/3"
