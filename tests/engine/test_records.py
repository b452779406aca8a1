"""The form of results, in both conventions."""

import json
import math

from engine.outcomes import done, failed, failure, output, request

from mimo_jax.decoding.outputs import TokenLogprob
from mimo_jax.engine.records import (
    completion_record,
    failure_record,
    first_choice,
    is_failure,
    is_record,
    record_id,
)
from mimo_jax.engine.requests import Failure

LOGPROBS = [
    TokenLogprob(1, -0.5, {1: -0.5, 2: -1.5}),
    TokenLogprob(3, -2.5, {1: -math.inf, 2: math.nan}),
]
TEXTS = {1: "é", 2: "\ufffd", 3: "\ufffd"}


def openai(field: str, **fields):
    prompt = [{"role": "user", "content": "hi"}] if field == "messages" else "hi"
    asked = request(4, prompt, field, convention="openai", **fields)
    given = output("a", "b", logprobs=LOGPROBS if "logprobs" in fields else None)
    return asked, completion_record(asked, given, "mimo-tiny", TEXTS.__getitem__)


def test_a_plain_completion():
    asked = request(4, stop=["x"])
    assert completion_record(asked, output("a")) == {
        "line": 4,
        "id": "id-4",
        "fingerprint": asked.fingerprint,
        "prompt": "ä\n",
        "params": {
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "max_tokens": 256,
            "stop": ["x"],
            "seed": 1,
            "n": 1,
            "logprobs": None,
            "ignore_eos": False,
        },
        "text": "a",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
        "metrics": {
            "ttft_s": 0.25,
            "tpot_s": 0.5,
            "tokens_per_round": 1.5,
            "acceptance_by_position": [0.5, 0.0],
        },
    }


def test_plain_logprobs_are_json():
    record = completion_record(request(1, logprobs=2), output("a", logprobs=LOGPROBS))
    tokens = json.loads(json.dumps(record, allow_nan=False))["completions"][0]["logprobs"]
    assert tokens[0] == {"token_id": 1, "logprob": -0.5, "top": {"1": -0.5, "2": -1.5}}
    assert tokens[1]["top"] == {"1": -9999.0, "2": None}


def test_a_chat_completion_in_openai_form():
    asked, record = openai("messages", logprobs=2)
    unique = f"4-{asked.fingerprint.replace('-', '')}"
    assert [record[k] for k in ("line", "custom_id", "error")] == [4, "id-4", None]
    assert record["id"] == f"batch_req-{unique}"
    assert record["metrics"]["tokens_per_round"] == 1.5
    response = record["response"]
    assert (response["status_code"], response["request_id"]) == (200, f"req-{unique}")
    body = response["body"]
    assert list(body) == ["id", "object", "created", "model", "choices", "usage"]
    assert (body["object"], body["model"]) == ("chat.completion", "mimo-tiny")
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert [c["index"] for c in body["choices"]] == [0, 1]
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "a", "refusal": None}
    assert choice["finish_reason"] == "stop"
    first, second = choice["logprobs"]["content"]
    assert first == {
        "token": "é",
        "logprob": -0.5,
        "bytes": [195, 169],
        "top_logprobs": [
            {"token": "é", "logprob": -0.5, "bytes": [195, 169]},
            {"token": "\ufffd", "logprob": -1.5, "bytes": None},
        ],
    }
    assert [t["logprob"] for t in second["top_logprobs"]] == [-9999.0, None]
    json.dumps(record, allow_nan=False)


def test_a_text_completion_in_openai_form():
    body = openai("prompt", logprobs=2)[1]["response"]["body"]
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert [c["text"] for c in body["choices"]] == ["a", "b"]
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["é", "\ufffd"],
        "token_logprobs": [-0.5, -2.5],
        # Two tokens with the same text keep apart.
        "top_logprobs": [
            {"é": -0.5, "\ufffd": -1.5},
            {"é": -9999.0, "\ufffd": None, "token_id:3": -2.5},
        ],
        "text_offset": [0, 1],
    }
    assert openai("prompt")[1]["response"]["body"]["choices"][0]["logprobs"] is None


def test_tokens_without_a_tokenizer():
    asked = request(1, convention="openai", logprobs=1)
    record = completion_record(asked, output("", logprobs=LOGPROBS[:1]))
    found = record["response"]["body"]["choices"][0]["logprobs"]
    assert found["tokens"] == ["token_id:1"]


def test_failures():
    assert failed(3) == {
        "line": 3,
        "id": None,
        "fingerprint": "no-0",
        "error": {"type": "invalid_request", "message": "no"},
    }
    refused = Failure.of(request(3, convention="openai"), "invalid_prompt", 900 * "long ")
    record = failure_record(refused)
    assert (record["custom_id"], record["response"]) == ("id-3", None)
    assert record["fingerprint"] == request(3, convention="openai").fingerprint
    assert record["error"]["code"] == "invalid_prompt"
    assert len(record["error"]["message"]) < 600


def test_what_is_a_record():
    chat = openai("messages")[1]
    text = openai("prompt")[1]
    refused = failure_record(Failure.of(request(3, convention="openai"), "x", "y"))
    for record in (done(1), chat, text, failed(2), refused):
        assert is_record(json.loads(json.dumps(record)))
    assert [is_failure(r) for r in (done(1), chat, failed(2), refused)] == [
        False,
        False,
        True,
        True,
    ]
    assert [record_id(r) for r in (done(1), chat, failed(2))] == ["id-1", "id-4", None]
    assert [first_choice(r) for r in (done(1), chat, text)] == [
        ("ö\n", "stop"),
        ("a", "stop"),
        ("a", "stop"),
    ]
    for wrong in (
        *(None, 3, [], {}, {"line": 1, "id": "a", "text": "x"}),
        {**done(1), "line": "1"},
        {**done(1), "line": True},
        {**done(1), "line": 0},
        {**done(1), "id": 3},
        {**done(1), "error": {}},
        {**failed(1), "error": None},
        {**chat, "response": None},
    ):
        assert not is_record(wrong), wrong


def test_the_ids_of_two_equal_bad_lines_differ():
    a, b = (failure_record(Failure(i, None, "x", "y", "openai", "z-0")) for i in (1, 2))
    assert a["id"] != b["id"]
    assert failure(1).fingerprint == failure(2).fingerprint
