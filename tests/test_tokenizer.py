import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from mimo_jax import tokenizer as tokenizer_module
from mimo_jax.config import MiMoConfig
from mimo_jax.tokenizer import (
    StopChecker,
    StreamDecoder,
    TokenizerError,
    encode_prompt,
    eos_ids,
    load_tokenizer,
    valid_vocabulary,
)

TEXTS = [
    "The quick brown fox jumps over the lazy dog. def add(a, b):\n    return a + b\n",
    "MiMo 模型 v2.6: 你好 世界。今天天气很好。",
    "emoji 😀 👩‍👩‍👧‍👦 🇨🇳 and accents: naïve café, Ελληνικά, עברית",
]
# Turns as in MODEL_SPEC 6: no newline after <|im_end|>.
TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('unknown role ' + message.role) -}}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.role == 'assistant' -%}{{- '<think></think>' -}}{%- endif -%}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}{{- part.text -}}{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONFIG = {
    # Present in released files; the class is not used and the code reference never followed.
    "tokenizer_class": "Qwen2Tokenizer",
    "auto_map": {"AutoTokenizer": ["elsewhere.Tokenizer", None]},
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": False,
    "model_max_length": 16,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "config.json").write_text('{"model_type": "mimo_v2"}')
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


# -- loading ---------------------------------------------------------------------------------------


def test_load_reads_special_tokens_and_template(tokenizer):
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.chat_template == TEMPLATE
    assert [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS] == TEXTS


def test_load_from_tokenizer_json_alone(folder, tmp_path, tokenizer):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    alone = load_tokenizer(str(tmp_path))
    assert alone.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
    assert alone.eos_token_id is None
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt(alone, [{"role": "user", "content": "x"}])


def test_use_is_silent_and_leaves_the_environment_alone(folder):
    # The prompt is longer than model_max_length, which transformers would remark on.
    code = (
        "import os, sys\n"
        "from mimo_jax.tokenizer import encode_prompt, load_tokenizer\n"
        "assert 'transformers' not in sys.modules\n"
        "before = dict(os.environ)\n"
        f"tokenizer = load_tokenizer({str(folder)!r})\n"
        "assert len(encode_prompt(tokenizer, 'word ' * 50)) > tokenizer.model_max_length\n"
        "assert before == dict(os.environ)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_load_keeps_a_user_s_advisory_setting(folder, monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", "mine")
    load_tokenizer(folder)
    assert os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] == "mine"


def test_missing_tokenizer_says_what_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json \(found: no such folder\)"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"found: \['vocab.json'\]"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_file_is_reported(folder, tmp_path, name):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    (tmp_path / name).write_text('{"model": {"type": "BPE"')
    with pytest.raises(TokenizerError, match="can't be read"):
        load_tokenizer(tmp_path)


def test_valid_vocabulary_counts_added_tokens(tokenizer):
    n = valid_vocabulary(tokenizer)
    assert tokenizer.convert_ids_to_tokens(n - 1) == "</think>"
    assert tokenizer.convert_ids_to_tokens(n) is None


# -- end of sequence -------------------------------------------------------------------------------


@pytest.fixture
def config() -> MiMoConfig:
    config = MiMoConfig.from_pretrained("MiMo-V2.5-Pro")
    return dataclasses.replace(config, eos_token_id=(151645,))


def test_eos_ids_come_from_everywhere(tokenizer, config, tmp_path):
    im_end = tokenizer.eos_token_id
    assert eos_ids(tmp_path, config, tokenizer) == (im_end, 151645)
    assert eos_ids(tmp_path, config, None) == (151645,)
    for listed, expected in (([7, 9], {7, 9}), (8, {8}), (None, set())):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
        assert eos_ids(tmp_path, config, tokenizer) == tuple(sorted({im_end, 151645} | expected))


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [-1]}'])
def test_damaged_generation_config_is_reported(config, tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(TokenizerError, match=r"generation_config\.json"):
        eos_ids(tmp_path, config, None)


# -- prompts ---------------------------------------------------------------------------------------


def test_string_prompt_gets_no_bos(tokenizer):
    assert tokenizer.decode(encode_prompt(tokenizer, "def add")) == "def add"


def test_token_ids_pass_through(tokenizer):
    ids = [5, 0, valid_vocabulary(tokenizer) - 1]
    for prompt in (ids, tuple(ids), np.asarray(ids), list(np.asarray(ids, np.int32))):
        out = encode_prompt(tokenizer, prompt)
        assert out == ids
        assert {type(i) for i in out} == {int}


def test_chat_has_no_newline_between_turns(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    ids = encode_prompt(tokenizer, messages)
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>"
        "<|im_start|>user\n你好<|im_end|>"
        "<|im_start|>assistant\n<think></think>Hi<|im_end|>"
        "<|im_start|>user\nab<|im_end|>"
        "<|im_start|>assistant\n"
    )
    im_start, im_end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (ids.count(im_start), ids.count(im_end)) == (5, 4)


def test_chat_makes_a_string_a_message(tokenizer):
    messages = [{"role": "user", "content": "hello"}]
    assert encode_prompt(tokenizer, "hello", chat=True) == encode_prompt(tokenizer, messages)
    assert encode_prompt(tokenizer, "hello", chat=True) != encode_prompt(tokenizer, "hello")


@pytest.mark.parametrize(
    ("prompt", "error", "match"),
    [
        (None, TypeError, "can't be of type NoneType"),
        (3, TypeError, "can't be of type int"),
        (b"ab", TypeError, "can't be of type bytes"),
        ({"role": "user", "content": "x"}, TypeError, "can't be of type dict"),
        (["a", "b"], TypeError, "holds 'a' of type str"),
        ([1, 2.0], TypeError, "holds 2.0 of type float"),
        ([True], TypeError, "holds True"),
        (np.zeros((2, 2), int), TypeError, "of type list"),
        ([1, -1], ValueError, r"doesn't have: \[-1\]"),
        ([1, 2**40, 151675], ValueError, r"doesn't have: \[151675, 1099511627776\]"),
        ("", ValueError, "empty"),
        ([], ValueError, "empty"),
        ("\ud800", ValueError, "not valid Unicode"),
        ([{"role": "user", "content": "x"}, 3], TypeError, "chat message 1 is 3"),
        ([{"content": "x"}], ValueError, "chat message 0 needs a 'role'"),
        ([{"role": 1, "content": "x"}], ValueError, "chat message 0 needs a 'role'"),
        ([{"role": "user"}], ValueError, "chat message 0 has no 'content'"),
        (
            [{"role": "user", "content": 5}],
            ValueError,
            "'content' of chat message 0 is of type int",
        ),
        ([{"role": "wizard", "content": "x"}], ValueError, "template can't .* unknown role wizard"),
        ([{"role": "user", "content": "\udfff"}], ValueError, "not valid Unicode"),
    ],
)
def test_malformed_prompts_are_refused(tokenizer, prompt, error, match):
    with pytest.raises(error, match=match):
        encode_prompt(tokenizer, prompt)


def test_template_runs_in_a_sandbox(folder, tmp_path):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(ValueError, match=r"template can't .*unsafe"):
        encode_prompt(load_tokenizer(tmp_path), "x", chat=True)


# -- streamed text ---------------------------------------------------------------------------------


def stream(decoder: StreamDecoder, ids: list[int], sizes: list[int]) -> list[str]:
    """What each push returned, with finish() last; `sizes` are repeated as needed."""
    pieces, at, turn = [], 0, 0
    while at < len(ids):
        size = sizes[turn % len(sizes)]
        pieces.append(decoder.push(ids[at : at + size]))
        at, turn = at + size, turn + 1
    return [*pieces, decoder.finish()]


pieces_of_text = st.one_of(
    st.text(max_size=8),
    st.sampled_from([*TEXTS, "👩‍👩‍👧‍👦", "模型", "<|im_end|>", "<think>"]),
)
splits = st.lists(st.integers(1, 12), min_size=1, max_size=5)


@given(texts=st.lists(pieces_of_text, max_size=6), sizes=splits, skip=st.booleans())
@example(texts=["😀" * 30], sizes=[1], skip=True)
def test_stream_equals_whole_text(tokenizer, texts, sizes, skip):
    ids = tokenizer.encode("".join(texts))
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    pieces = stream(StreamDecoder(tokenizer, skip), ids, sizes)
    assert "".join(pieces) == whole
    # A text that is valid is never held back beyond its last token.
    assert pieces[-1] == ("\ufffd" if whole.endswith("\ufffd") else "")


@given(data=st.data(), sizes=splits, skip=st.booleans())
def test_stream_of_arbitrary_tokens_equals_whole_text(tokenizer, data, sizes, skip):
    # Mostly byte tokens that are no valid UTF-8 together, with special tokens between them, and an
    # id that the tokenizer doesn't have.
    n = valid_vocabulary(tokenizer)
    byte_ids = tokenizer.convert_tokens_to_ids([*"ðŁĺĢäļâĤÃ"])
    special = list(range(n - 5, n + 1))
    token = st.one_of(st.sampled_from(byte_ids), st.sampled_from(special), st.integers(0, n - 1))
    ids = data.draw(st.lists(token, max_size=60))
    pieces = stream(StreamDecoder(tokenizer, skip), ids, sizes)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_stream_never_shows_half_a_character(tokenizer):
    emoji = tokenizer.convert_tokens_to_ids([*"ðŁĺĢ"])  # the bytes of U+1F600
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push([i]) for i in emoji] == ["", "", "", "😀"]
    # A special token in between is not text.
    assert [decoder.push([i]) for i in (*emoji[:2], tokenizer.eos_token_id)] == ["", "", ""]
    assert decoder.push(emoji[2:]) == "😀"


def test_stream_shows_bytes_that_are_no_character(tokenizer):
    lead, cont, _, _ = tokenizer.convert_tokens_to_ids([*"ðŁĺĢ"])
    (a,) = tokenizer.convert_tokens_to_ids(["a"])
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push([i]) for i in (lead, lead, cont, a)] == ["", "\ufffd", "", "\ufffda"]
    assert decoder.push([lead]) == ""
    assert decoder.finish() == "\ufffd"
    assert (decoder.push([a]), decoder.finish()) == ("a", "")  # ready for the next sequence


def test_stream_shows_a_real_replacement_character_with_the_next_token(tokenizer):
    ids = tokenizer.encode("\ufffd")
    decoder = StreamDecoder(tokenizer)
    assert "".join(decoder.push([i]) for i in ids) == ""
    assert decoder.push(tokenizer.encode("b")) == "\ufffdb"


@pytest.mark.parametrize("valid", [True, False])
def test_stream_decodes_a_bounded_number_of_tokens(tokenizer, monkeypatch, valid):
    decoder = StreamDecoder(tokenizer)
    decoded = []
    original = tokenizer.decode

    def counting(ids, **kwargs):
        decoded.append(len(ids))
        return original(ids, **kwargs)

    monkeypatch.setattr(tokenizer, "decode", counting)
    token = tokenizer.convert_tokens_to_ids("a" if valid else "ð")
    for _ in range(500):
        decoder.push([token])
    assert max(decoded) <= 2 * tokenizer_module.CONTEXT_TOKENS + 1
    assert len(decoded) <= 2 * 500


# -- stop strings ----------------------------------------------------------------------------------


def check(stop: list[str], pieces: list[str]) -> tuple[str, str | None]:
    checker = StopChecker(stop)
    text = "".join([*map(checker.push, pieces), checker.finish()])
    assert checker.stopped == (checker.matched is not None)
    return text, checker.matched


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces, turn = [], 0
    while text:
        size = sizes[turn % len(sizes)]
        pieces.append(text[:size])
        text, turn = text[size:], turn + 1
    return pieces


@given(
    text=st.text("ab", max_size=40),
    stop=st.text("ab", min_size=1, max_size=5),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
)
def test_one_stop_string_equals_find(text, stop, sizes):
    at = text.find(stop)
    expected = (text, None) if at < 0 else (text[:at], stop)
    assert check([stop], cut(text, sizes)) == expected


@given(
    text=st.text("abcd", max_size=40),
    stop=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4, unique=True),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
)
@example(text="xabcd", stop=["abcd", "bc"], sizes=[1])
@example(text="xabcd", stop=["abcd", "bc"], sizes=[5])
def test_several_stop_strings_act_when_the_first_is_complete(text, stop, sizes):
    ends = [(text.find(s) + len(s), -len(s), s) for s in stop if s in text]
    end, minus_length, matched = min(ends, default=(len(text), 0, None))
    assert check(stop, cut(text, sizes)) == (text[: end + minus_length], matched)


def test_only_what_may_begin_a_stop_string_is_held_back():
    checker = StopChecker(["\n\n", "END"])
    assert checker.push("one\n") == "one"
    assert checker.push("two E") == "\ntwo "
    assert checker.push("NE") == "EN"
    assert checker.push("ND and more") == ""
    assert checker.matched == "END"
    assert checker.push("ignored") == ""
    assert checker.finish() == ""


def test_text_held_back_comes_at_the_end():
    assert check(["END"], ["the EN"]) == ("the EN", None)
    assert check([], ["a", "b"]) == ("ab", None)
