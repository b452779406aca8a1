"""The calls people make, on mimo-tiny; the decoding loop itself is tested in decoding/."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import tiny

import mimo_jax as mj
from mimo_jax import api

CODE = "import os\nimport sys\n\n\ndef main(argv):\n"
CHAT = [{"role": "user", "content": "def add(a, b):"}]
SHORT = mj.SamplingParams(temperature=0.8, seed=3, max_tokens=20)


def test_prompts_of_every_kind_mean_the_same():
    lm = tiny()
    ids = lm.encode(CODE)
    text = lm.generate(CODE, SHORT)
    tokens = lm.generate([ids], SHORT)
    as_array = lm.generate(np.asarray(ids), SHORT)
    assert text[0].token_ids == tokens[0].token_ids == as_array[0].token_ids
    assert text[0].prompt_token_ids == ids
    assert lm.tokenizer.decode(text[0].token_ids) == text[0].text


def test_chat_messages_go_through_the_template():
    lm = tiny()
    rendered = lm.tokenizer.decode(lm.encode(CHAT))
    assert rendered == (
        "<|im_start|>user\ndef add(a, b):<|im_end|><|im_start|>assistant\n"
    )  # no line feed after <|im_end|> (MODEL_SPEC 6)
    (alone,) = lm.generate(CHAT, SHORT)
    (listed,) = lm.generate([CHAT], SHORT)
    assert alone.token_ids == listed.token_ids


def test_results_come_in_order_whatever_the_batch_size():
    lm = tiny()
    prompts = [CODE, "class A:\n", "x = [", "try:\n", "def f(self, other):\n"]
    params = [
        mj.SamplingParams(temperature=0.8, seed=i, max_tokens=5 + i) for i in range(len(prompts))
    ]
    together = lm.generate(prompts, params)
    assert [len(o.token_ids) for o in together] == [5, 6, 7, 8, 9]
    in_twos = lm.generate(prompts, params, batch_size=2)
    assert [o.token_ids for o in in_twos] == [o.token_ids for o in together]
    assert [o.prompt_token_ids for o in together] == [lm.encode(p) for p in prompts]


def test_completions_of_one_prompt_differ_and_the_first_is_that_of_n_1():
    lm = tiny()
    params = mj.SamplingParams(temperature=1.0, seed=11, max_tokens=20, n=3)
    (three,) = lm.generate(CODE, params)
    other = mj.SamplingParams(temperature=1.0, seed=2, max_tokens=20)
    one = mj.SamplingParams(temperature=1.0, seed=11, max_tokens=20)
    *_, same = lm.generate(["x = 1", "import re\n", CODE], [other, other, one])
    assert three.completions[0].token_ids == same.token_ids
    assert len({tuple(c.token_ids) for c in three.completions}) == 3
    assert three.text == three.completions[0].text
    assert three.metrics.generated_tokens == 60


def test_without_a_seed_runs_differ_and_without_parameters_they_are_greedy():
    lm = tiny()
    free = mj.SamplingParams(temperature=1.5, max_tokens=20)
    assert lm.generate(CODE, free)[0].token_ids != lm.generate(CODE, free)[0].token_ids
    greedy = lm.generate(CODE, mj.SamplingParams(temperature=0.0, max_tokens=20))[0]
    assert lm.generate(CODE)[0].token_ids[:20] == greedy.token_ids


def test_a_stop_string_ends_and_cuts_the_text():
    lm = tiny()
    full = lm.generate(CODE, SHORT)[0]
    assert full.finish_reason == "length"
    stop = full.text[len(full.text) // 2 :][:4]
    params = mj.SamplingParams(temperature=0.8, seed=3, max_tokens=20, stop=stop)
    cut = lm.generate(CODE, params)[0]
    assert cut.finish_reason == "stop"
    assert cut.text == full.text[: full.text.index(stop)]
    assert cut.token_ids == full.token_ids[: len(cut.token_ids)]
    assert len(cut.token_ids) < len(full.token_ids)
    assert "".join(lm.stream(CODE, params)) == cut.text


def test_an_eos_token_ends_a_completion_unless_ignored(monkeypatch):
    lm = tiny()
    full = lm.generate(CODE, SHORT)[0].token_ids
    eos = next(t for t in full[1:] if t != full[0])
    first = full.index(eos)
    other = api.LanguageModel(lm.loaded)
    other.eos_ids = (eos,)
    other.decoder = api.Decoder(lm.model, valid_vocabulary=4080, eos_ids=(eos,))
    ended = other.generate(CODE, SHORT)[0]
    assert ended.finish_reason == "stop"
    assert ended.token_ids == full[: first + 1]
    ignoring = mj.SamplingParams(temperature=0.8, seed=3, max_tokens=20, ignore_eos=True)
    assert other.generate(CODE, ignoring)[0].token_ids == full


def test_a_stream_gives_the_text_of_generate_in_pieces():
    lm = tiny()
    params = mj.SamplingParams(temperature=0.8, seed=9, max_tokens=40)
    stream = lm.stream(CODE, params)
    pieces = list(stream)
    whole = lm.generate(CODE, params)[0]
    assert len(pieces) > 1
    assert "".join(pieces) == whole.text == stream.output.text
    assert stream.output.token_ids == whole.token_ids
    with pytest.raises(ValueError, match="n=2"):
        lm.stream(CODE, mj.SamplingParams(n=2))


def test_log_probabilities_are_those_of_the_full_forward():
    lm = tiny()
    params = mj.SamplingParams(temperature=0.8, seed=3, max_tokens=20, logprobs=2)
    out = lm.generate(CODE, params)[0]
    assert out.logprobs is not None
    ids = np.asarray([out.prompt_token_ids + out.token_ids])
    logits = np.asarray(lm.logits(ids))[0, len(out.prompt_token_ids) - 1 : -1, :4080]
    expected = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    for i, entry in enumerate(out.logprobs):
        assert entry.token_id == out.token_ids[i]
        # bfloat16 activations: the cached step and the full forward round differently.
        assert entry.logprob == pytest.approx(expected[i, entry.token_id], abs=0.7)
        assert len(entry.top) == 2
        assert max(entry.top.values()) == pytest.approx(expected[i].max(), abs=0.7)


def test_metrics_count_tokens_and_seconds():
    out = tiny().generate(CODE, SHORT)[0]
    assert out.metrics.prompt_tokens == len(out.prompt_token_ids)
    assert out.metrics.generated_tokens == len(out.token_ids) == 20
    assert out.metrics.ttft_s > 0
    assert out.metrics.tpot_s > 0
    assert out.metrics.acceptance_lengths == ()


def test_logits_do_not_depend_on_the_padding_to_a_bucket():
    lm = tiny()
    ids = np.asarray([lm.encode(CODE) * 4])
    assert 32 < ids.shape[1] < 64
    short = np.asarray(lm.logits(ids[:, :32]))
    long = np.asarray(lm.logits(ids))
    assert long.shape == (1, ids.shape[1], 4096)
    assert long.dtype == np.float32
    assert np.abs(short - long[:, :32]).mean() < 0.05 * np.abs(long).mean()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2], r"\[B, T\]"),
        ([[1.0, 2.0]], "integers"),
        ([[1, 5000]], "4095"),
        ([[1] * 5000], "4096 positions"),
    ],
)
def test_logits_refuses(ids, message):
    with pytest.raises(ValueError, match=message):
        tiny().logits(np.asarray(ids))


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "empty"),
        ([[1] * 5000], {}, "max_position_embeddings of 4096"),
        ([[1] * 50], {"max_len": 40}, "max_len of 40"),
        ([{"role": "user"}], {}, "content"),
        ([CODE, CODE], {"params": [SHORT]}, "2 prompts but 1"),
        ([[1, -3]], {}, "-3"),
    ],
)
def test_generate_refuses(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        tiny().generate(prompt, **options)


def test_an_unknown_name_names_its_neighbours():
    with pytest.raises(FileNotFoundError, match="mimo-tiny"):
        mj.load("mimo-tinny")


def test_saving_gives_back_every_byte(tmp_path):
    lm = tiny()
    mj.save_pretrained(lm, tmp_path)
    source = lm.loaded.folder

    def tensors(folder: Path) -> dict[str, bytes]:
        found = {}
        for file in folder.glob("*.safetensors"):
            raw = file.read_bytes()
            start = 8 + int.from_bytes(raw[:8], "little")
            for name, entry in json.loads(raw[8:start]).items():
                if name != "__metadata__":
                    begin, end = entry["data_offsets"]
                    shape = repr((entry["dtype"], entry["shape"])).encode()
                    found[name] = shape + raw[start + begin : start + end]
        return found

    assert tensors(tmp_path) == tensors(source)
    again = mj.load(tmp_path)
    assert again.config == lm.config
    assert again.generate(CODE, SHORT)[0].token_ids == lm.generate(CODE, SHORT)[0].token_ids


def test_the_compilation_cache_can_be_moved_and_disabled(tmp_path, monkeypatch, capsys):
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("MIMO_JAX_COMPILATION_CACHE", "off")
        assert api.enable_compilation_cache() is None
        assert jax.config.jax_compilation_cache_dir is None
        monkeypatch.setenv("MIMO_JAX_COMPILATION_CACHE", str(tmp_path / "cache"))
        assert api.enable_compilation_cache() == tmp_path / "cache"
        assert api.enable_compilation_cache() is None
        assert capsys.readouterr().err.count(str(tmp_path / "cache")) == 1
        assert (tmp_path / "cache").is_dir()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
