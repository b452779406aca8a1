"""From generated tokens to text: stop strings, ends, streaming, and prompts of every kind.

Mostly with mimo-tiny's tokenizer and a decoder that produces given tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import exact, tiny

from mimo_jax.decoding.autoregressive import Decoder
from mimo_jax.decoding.sampling import SamplingParams
from mimo_jax.decoding.state import Block, Seen
from mimo_jax.language_model import LanguageModel

GREEDY = SamplingParams(temperature=0.0, max_tokens=20)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=20, seed=7)
CODE = "import os\n\n\ndef "
REPLACEMENT = "\ufffd"


class Scripted(Decoder):
    """A decoder whose rows produce given tokens, three at a time, until they end.

    `blocks_made` counts what it produced.
    """

    def __init__(self, *rows: list[int]):
        self.rows, self.blocks_made = rows, 0
        self.placement, self.config = None, tiny().config
        self.ways = 1

    def blocks(self, prompts: Any, params: Any, seeds: Any, *, stopped: Any) -> Any:
        for begin in range(0, max(map(len, self.rows)), 3):
            self.blocks_made += 1
            yield Block(self.following(begin, [0 not in stopped]), None)

    @property
    def least(self) -> int:
        """A script may be over before its row is."""
        return 0

    def following(self, begin: int, active: list[bool]) -> np.ndarray:
        tokens = np.full((len(active), 3), -1, np.int32)
        for i, row in enumerate(self.rows):
            part = row[begin : begin + 3] if active[i] else []
            tokens[i, : len(part)] = part
        return tokens

    def begin(self, rows: int) -> None:
        self.made = 0

    def weights(self) -> list[Any]:
        return []

    def empty(self, rows: int, max_len: int) -> Any:
        return jnp.zeros((rows, 1)), None

    def read(self, leaves: Any, tokens: Any, positions: Any, following: Any, held: Any) -> Any:
        return held

    def decode(self, leaves: Any, state: Any, rows: Any, top: Any) -> Any:
        left = np.asarray(state.remaining)
        tokens = self.following(3 * self.made, (left > 0).tolist())
        tokens[np.arange(3) >= left[:, None]] = -1
        self.made += 1
        self.blocks_made += 1
        ended = [3 * self.made >= len(row) for row in self.rows]
        ended += [True] * (len(left) - len(ended))
        left = np.where(ended, 0, left - (tokens >= 0).sum(axis=1)).astype(np.int32)
        seen = Seen(jnp.asarray(tokens), None, jnp.asarray(left))
        return dataclasses.replace(state, remaining=jnp.asarray(left)), seen


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LanguageModel]:
    """Makes mimo-tiny produce given texts or tokens."""

    def use(*rows: str | list[int]) -> LanguageModel:
        lm = tiny()
        tokens = [lm.tokenizer.encode(r) if isinstance(r, str) else r for r in rows]
        monkeypatch.setattr(lm, "decoder", Scripted(*tokens))
        return lm

    return use


def test_a_stop_string_cuts_the_text(script):
    text = "first line\nsecond line\nthird"
    params = dataclasses.replace(GREEDY, stop=["\nsecond", "third"])
    lm = script(text + " line of many" * 9)
    (out,) = lm.generate("x", params)
    assert (out.text, out.finish_reason) == ("first line", "stop")
    # No more than it takes, and one that was on its way.
    assert lm.decoder.blocks_made <= 1 + -(-len(out.token_ids) // 3)
    ids = tiny().tokenizer.encode(text)
    assert out.token_ids == ids[: len(out.token_ids)]
    assert tiny().tokenizer.decode(out.token_ids).startswith("first line\nsecond")
    assert len(out.token_ids) < len(ids)


def test_text_that_only_begins_a_stop_string_stays(script):
    (out,) = script("a line\nsec").generate("x", dataclasses.replace(GREEDY, stop="\nsecond"))
    assert (out.text, out.finish_reason) == ("a line\nsec", "length")


def test_a_stopped_row_leaves_the_others_alone(script):
    lm = script("one STOP more", "two and some more words")
    outs = lm.generate(["x", "y"], dataclasses.replace(GREEDY, stop="STOP"))
    assert [o.text for o in outs] == ["one ", "two and some more words"]
    assert [o.finish_reason for o in outs] == ["stop", "length"]


def test_an_eos_token_is_reported_but_not_part_of_the_text(script):
    lm = tiny()
    for eos in lm.eos_ids:
        ids = [*lm.tokenizer.encode("done"), eos, *lm.tokenizer.encode("more")]
        (out,) = script(ids).generate("x", GREEDY)
        assert (out.text, out.finish_reason, out.token_ids[-1]) == ("done", "stop", eos)
        (out,) = script(ids).generate("x", dataclasses.replace(GREEDY, ignore_eos=True))
        assert (out.text, out.finish_reason) == ("donemore", "length")


def test_streamed_text_has_no_half_characters(script):
    text = "naïve 数字 🎉 “x” done"
    ids = tiny().tokenizer.encode(text)
    assert any(REPLACEMENT in tiny().tokenizer.decode(ids[:i]) for i in range(len(ids)))
    params = dataclasses.replace(GREEDY, max_tokens=1000)
    pieces = list(script(text).stream("x", params))
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert not any(REPLACEMENT in piece for piece in pieces)
    # One that is never completed is shown as such, at the end.
    cut = next(i for i in range(1, len(ids)) if tiny().tokenizer.decode(ids[:i])[-1] == REPLACEMENT)
    pieces = list(script(ids[:cut]).stream("x", params))
    assert pieces[-1].endswith(REPLACEMENT)
    assert not any(REPLACEMENT in piece for piece in pieces[:-1])


def test_a_stream_never_shows_the_beginning_of_a_stop_string(script):
    lm = script("some words, then the END of it")
    stream = lm.stream("x", dataclasses.replace(GREEDY, stop=" the END"))
    assert "".join(stream) == "some words, then"
    assert stream.output.finish_reason == "stop"


@pytest.mark.parametrize("params", [None, SAMPLED], ids=["default", "sampled"])
def test_a_stream_is_what_generate_returns(params):
    lm = exact()
    (expected,) = lm.generate(CODE, params)
    stream = lm.stream(CODE, params)
    pieces = list(stream)
    assert "".join(pieces) == expected.text == stream.output.text
    assert all(pieces)
    assert len(pieces) > 1
    assert stream.output.completions == expected.completions
    assert stream.output.metrics.ttft_s > 0


def test_a_streams_output_can_be_read_before_its_end(script):
    stream = script("some words that come one by one").stream("x", GREEDY)
    first = next(iter(stream))
    assert first
    assert stream.output.text == first
    assert 0 < len(stream.output.token_ids) <= 3


def test_a_stop_string_in_text_that_the_model_writes():
    lm = exact()
    full = lm.generate(CODE, SAMPLED)[0]
    stop = full.text[len(full.text) // 2 :][:4]
    params = dataclasses.replace(SAMPLED, stop=stop)
    (cut,) = lm.generate(CODE, params)
    assert (cut.text, cut.finish_reason) == (full.text[: full.text.index(stop)], "stop")
    assert cut.token_ids == full.token_ids[: len(cut.token_ids)]
    assert "".join(lm.stream(CODE, params)) == cut.text


def test_kinds_of_prompts(script):
    lm = script("a")
    text, messages = "def f(x):", [{"role": "user", "content": "Hello"}]
    ids = lm.tokenizer.encode(text)
    chat = lm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    # No line feed after <|im_end|> (MODEL_SPEC 6).
    assert chat == "<|im_start|>user\nHello<|im_end|><|im_start|>assistant\n"
    wanted = [ids, ids, ids, lm.tokenizer.encode(chat, add_special_tokens=False)]
    kinds = [text, ids, np.asarray(ids), messages]
    for prompt, expected in zip(kinds, wanted, strict=True):
        (out,) = lm.generate(prompt, GREEDY)
        assert out.prompt_token_ids == expected
    outs = script("a", "a", "a", "a").generate(kinds, GREEDY)
    assert [o.prompt_token_ids for o in outs] == wanted
    outs = script("a", "a").generate([messages, text], GREEDY)
    assert [o.prompt_token_ids for o in outs] == [wanted[3], ids]
