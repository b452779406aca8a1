"""Mutated files of requests: never an exception, never a good line lost.

FUZZED_FILES=10000 in the environment reads so many; the usual run is a sample of them.
"""

import gzip
import json
import os
import random
import zlib

import pytest
from engine.request_lines import chat, text

from mimo_jax.engine.records import failure_record, is_record
from mimo_jax.engine.requests import RequestFile, read_requests

FILES = int(os.environ.get("FUZZED_FILES", "600"))

GOOD = [
    {"prompt": "import os\n"},
    {"id": "größe", "prompt": "class Größe:\n", "temperature": 0.5, "stop": ["\n\n"]},
    {"token_ids": [5, 6, 7], "max_tokens": 3},
    {"id": "chat", "messages": [{"role": "user", "content": "hi \U0001f600"}], "n": 2},
    chat("openai chat", max_tokens=4, logprobs=True),
    text("openai text", logprobs=2, seed=2**63),
]
# What breaks readers, whole or spliced into lines.
SPLICES = [
    *(
        b"\xff",
        b"\xed\xa0\x80",
        b"\xc3",
        b"\0",
        b"\xef\xbb\xbf",
        b"\x1f\x8b",
        b"\r",
        b"\n",
        b"\x85",
    ),
    *(b'"', b"\\", b"\\ud800", b"\\u", b"{", b"}", b"[", b"]", b",", b":", b"//", b"'"),
    *(b"NaN", b"-Infinity", b"1e999", b"null", b"true", b"-0", b"00", b"9" * 5000, b"[" * 3000),
    *(b'"prompt": 1,', b'"id": "x",', b'"tools": [{}],', b'"custom_id": {},', b'"body": 0,'),
    "\u2028".encode(),
]


def encoded(value: dict, rng: random.Random) -> bytes:
    return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode()


def mutated(raw: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 4)):
        at, end = sorted(rng.randint(0, len(raw)) for _ in range(2))
        end = min(end, at + rng.choice((1, 4, 1000)))
        piece = rng.choice(
            [
                b"",
                rng.choice(SPLICES),
                rng.randbytes(rng.randint(1, 8)),
                raw[at:end] * 2,
                bytes([(raw[at] if at < len(raw) else 0) ^ 1 << rng.randint(0, 7)]),
            ]
        )
        raw = raw[:at] + piece + raw[end:]
    return raw


def check(found: RequestFile) -> None:
    """Every outcome is sound and has a line of its own."""
    lines = [outcome.line for outcome in (*found.requests, *found.failures)]
    assert len(set(lines)) == len(lines) == found.lines
    assert len({r.id for r in found.requests}) == len(found.requests)
    for failure in found.failures:
        record = failure_record(failure)
        json.dumps(record, ensure_ascii=False).encode()
        assert is_record(record)
        assert failure.message


@pytest.mark.parametrize("seed", range(4))
def test_good_lines_come_through_between_mutated_ones(tmp_path, seed):
    rng, path = random.Random(seed), tmp_path / "in.jsonl"
    for _ in range(FILES // 4):
        content, number, expected = b"", 1, {}
        for i in range(rng.randint(1, 12)):
            value = rng.choice(GOOD)
            raw = encoded(value, rng)
            if rng.random() < 0.4:
                raw = mutated(raw, rng)
            else:
                name = "custom_id" if "body" in value else "id"
                raw = encoded({**value, name: f"good {i}"}, rng)
                expected[number] = f"good {i}"
            raw += rng.choice((b"\n", b"\r\n", b" \n"))
            number += raw.count(b"\n")
            content += raw
        content = b"\xef\xbb\xbf" * (rng.random() < 0.1) + content
        content = content[: len(content) - (rng.random() < 0.2)]
        path.write_bytes(gzip.compress(content, 1) if rng.random() < 0.2 else content)
        found = read_requests(path, {}, 0)
        check(found)
        ids = {r.line: r.id for r in found.requests}
        assert expected.items() <= ids.items(), content


@pytest.mark.parametrize("pack", [False, True])
def test_files_mutated_as_a_whole(tmp_path, pack):
    rng, path = random.Random(9), tmp_path / "in.jsonl"
    for _ in range(FILES // 8):
        content = b"\n".join(encoded(rng.choice(GOOD), rng) for _ in range(rng.randint(0, 30)))
        content = mutated(gzip.compress(content, 1) if pack else content, rng)
        path.write_bytes(content)
        check(read_requests(path, {}, 0))


def test_lines_before_damaged_compression_come_through(tmp_path):
    """Where the damage can be told from data; some of it only the checksum at the end tells."""
    rng, path = random.Random(5), tmp_path / "in.jsonl.gz"
    lines = [
        json.dumps({"id": f"r{i}", "prompt": rng.randbytes(20).hex()}).encode() for i in range(300)
    ]
    content = b"\n".join(lines) + b"\n"
    whole = gzip.compress(content, 6)
    for _ in range(FILES // 60):
        at = rng.randint(0, len(whole) - 1)
        path.write_bytes(whole[:at] + rng.randbytes(30))
        before = zlib.decompressobj(wbits=31).decompress(whole[:at]).count(b"\n")
        found = read_requests(path, {}, 0)
        check(found)
        assert found.failures
        ids = {r.line: r.id for r in found.requests}
        assert {i + 1: f"r{i}" for i in range(before)}.items() <= ids.items()
