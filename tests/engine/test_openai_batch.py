"""Lines of OpenAI's batch API: what they become, and what is refused by name."""

import pytest
from engine.request_lines import batch_line, chat, read, text

MESSAGES = [{"role": "user", "content": "hi"}]


def test_what_a_line_becomes(tmp_path):
    lines = [
        chat("a", model="m", temperature=0.5, max_completion_tokens=7, logprobs=True),
        chat("b", logprobs=True, top_logprobs=3, stop="x", seed=5, n=2, user="me"),
        text("c", max_tokens=9, logprobs=2, top_k=4, min_p=0.1, ignore_eos=True, best_of=1),
        text("d", prompt=[1, 2], temperature=None, logprobs=None),
    ]
    requests, failures = read(tmp_path, *lines, temperature=0.25)
    assert failures == []
    assert [r.id for r in requests] == ["a", "b", "c", "d"]
    assert {r.convention for r in requests} == {"openai"}
    assert [r.field for r in requests] == ["messages", "messages", "prompt", "token_ids"]
    assert [r.prompt for r in requests] == [MESSAGES, MESSAGES, "import os\n", [1, 2]]
    a, b, c, d = (r.params for r in requests)
    assert (a.temperature, a.max_tokens, a.logprobs) == (0.5, 7, 0)
    assert (b.logprobs, b.stop, b.seed, b.n) == (3, ("x",), 5, 2)
    assert (c.max_tokens, c.logprobs, c.top_k, c.min_p, c.ignore_eos) == (9, 2, 4, 0.1, True)
    assert (d.temperature, d.logprobs) == (0.25, None)  # null is as if it weren't there


def test_neutral_values_are_accepted(tmp_path):
    neutral = {
        "stream": False,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "echo": False,
        "suffix": None,
        "best_of": 2,
        "n": 2,
    }
    requests, failures = read(tmp_path, text(**neutral), chat(**neutral, logprobs=False))
    assert failures == []
    assert requests[1].params.logprobs is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (chat(tools=[{"type": "function"}]), "tools is [{"),
        (chat(response_format={"type": "json_object"}), 'or give {"type": "text"}'),
        (chat(stream=True), "stream is true, which this engine doesn't support: leave it out"),
        (chat(logit_bias={"5": 1}), "logit_bias is"),
        (text(echo=True), "echo is true"),
        (text(suffix="x"), "suffix is"),
        (text(best_of=2), "best_of is 2"),
        (chat(presence_penalty=0.5), "presence_penalty is 0.5"),
        (chat(presence_penalty=False), "presence_penalty is false"),
        (chat(frequency_penalty=-1), "frequency_penalty is -1"),
        (chat(reasoning_effort="low"), "reasoning_effort is"),
        (chat(temprature=1), "did you mean temperature?"),
        (chat(xyzzy=1), 'unknown field "xyzzy"; leave it out'),
        (chat(model=3), "model is 3; it must be a non-empty string"),
        (chat(max_tokens=3, max_completion_tokens=4), "max_tokens is 3 and max_completion_tokens"),
        (text(max_completion_tokens=4), "max_completion_tokens is for chat"),
        (chat(logprobs=3), "logprobs is 3; for chat completions it is true or false"),
        (chat(top_logprobs=3), "top_logprobs is 3 without logprobs"),
        (chat(logprobs=True, top_logprobs=21), "logprobs is 21; in a batch it is at most 20"),
        (chat(logprobs=True, top_logprobs="x"), "logprobs is 'x'"),
        (text(top_logprobs=3), "top_logprobs is for chat"),
        (text(logprobs=True), "logprobs is True"),
        (text(n=0), "n is 0"),
        (text(temperature="hot"), "temperature is 'hot'"),
        (text(prompt=["a", "b"]), "give each a line of its own"),
        (text(prompt=[[1], [2]]), "give each a line of its own"),
        (text(prompt=[]), "token_ids is []"),
        (text(prompt=None), "prompt is null"),
        (text(messages=MESSAGES), "body has messages"),
        (chat(prompt="x"), "body has prompt"),
        (chat(messages=[]), "messages is []"),
        (chat(messages="hi"), 'messages is "hi"'),
        (chat(messages=[{"role": "tool", "content": "x"}]), 'role of message 0 is "tool"'),
        (chat(messages=[{"role": ["user"], "content": "x"}]), "role of message 0 is ["),
        (
            chat(messages=[{"role": "user", "content": "x", "reasoning_content": "y"}]),
            'has "reasoning_content"',
        ),
        (chat(messages=[{"content": "x"}]), "role of message 0 is null"),
        (chat(messages=[{"role": "user"}]), "content of message 0 is null"),
        (chat(messages=[{"role": "user", "content": "x", "name": "y"}]), 'of the user, has "name"'),
        (
            chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
            "parts must be text",
        ),
        (batch_line("c", "/v1/embeddings", {}), "url is"),
        (batch_line("c", "/v1/completions", []), "body is []"),
        ({**chat(), "method": "GET"}, 'method is "GET"; it must be "POST"'),
        ({**chat(), "temperature": 1}, "and nothing else; found temperature"),
    ],
)
def test_what_can_not_be_done_is_refused_by_name(tmp_path, line, message):
    requests, failures = read(tmp_path, line)
    assert requests == []
    assert [(f.id, f.convention) for f in failures] == [(line["custom_id"], "openai")]
    assert message in failures[0].message


@pytest.mark.parametrize("wrong", [None, "", 3])
def test_a_custom_id_is_needed(tmp_path, wrong):
    failures = read(tmp_path, chat(wrong))[1]
    assert failures[0].id is None
    assert "custom_id is" in failures[0].message


def test_what_can_not_be_read_is_answered_as_the_lines_around_it(tmp_path):
    lines = "{", chat("a"), "[", {"prompt": "x"}, "}"
    failures = read(tmp_path, *lines)[1]
    assert [f.convention for f in failures] == ["openai", "openai", "plain"]
    assert [f.convention for f in read(tmp_path, "{", "")[1]] == ["plain"]
