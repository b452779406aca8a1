"""The public calls: `load`, `logits`, `generate`, `stream`, `save_pretrained`.

On mimo-tiny, and on a small random model without a tokenizer.  test_api_text.py has what becomes of
the generated tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import golden
import jax
import numpy as np
import pytest
from tiny import exact, tiny

import mimo_jax as mj
from mimo_jax import api, checkpoint
from mimo_jax.decoding.sampling import SamplingParams
from mimo_jax.language_model import LanguageModel
from pallas_kernels.attention.reference import QUERY_BLOCK
from sharding import memory
from sharding.memory import NotEnoughMemoryError

GREEDY = SamplingParams(temperature=0.0, max_tokens=20)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=20, seed=7)
PROMPTS = ([3, 1, 4], [1, 5, 9, 2, 6], [5])


def small_model(folder: Path, eos: list[int] | None = None) -> LanguageModel:
    """A random model without tokenizer."""
    if eos is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    model = golden.build(golden.tiny(eos_token_id=None))
    layout = checkpoint.Layout("split", model.config.qkv_chunks)
    return LanguageModel(checkpoint.Loaded(model.config, model, None, None, layout, folder))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return small_model(tmp_path_factory.mktemp("small"))


# Generation


def test_greedy_generation_is_the_argmax_of_full_forwards():
    """On prompts longer than the window and than a block of queries, and across the ring's end."""
    lm = exact()
    ids = lm.encode(Path(argparse.__file__).read_text(encoding="utf-8"))
    lengths, n = (QUERY_BLOCK + 44, 235, 3), 40
    assert lm.config.sliding_window == 128
    assert lengths[1] < 256 < lengths[1] + n
    prompts = [ids[length : 2 * length] for length in lengths]
    params = dataclasses.replace(GREEDY, max_tokens=n, ignore_eos=True)
    outs = lm.generate(prompts, params)
    whole = [p + o.token_ids for p, o in zip(prompts, outs, strict=True)]
    padded = np.asarray([w + [0] * (max(map(len, whole)) - len(w)) for w in whole])
    best = np.asarray(lm.logits(padded)).argmax(-1)
    for row, (length, out) in enumerate(zip(lengths, outs, strict=True)):
        assert out.token_ids == best[row, length - 1 : length - 1 + n].tolist()
        assert len(set(out.token_ids)) > 3
    # The padding of `logits` changes nothing either, and a prompt alone gives the same.
    alone = np.asarray(lm.logits([whole[2]]))[0]
    assert alone.argmax(-1)[2:-1].tolist() == outs[2].token_ids
    assert lm.generate(prompts[2], params)[0].token_ids == outs[2].token_ids


def test_it_writes_python():
    prompt = "import os\n\n\nclass Point:\n    def __init__(self, x, y):\n        self.x = x\n"
    (out,) = exact().generate(prompt, GREEDY)
    assert out.text.lstrip().startswith("self.y = y\n")


def test_outputs_are_in_order_whatever_the_batch_size(small):
    prompts = [*PROMPTS, [8, 8]]
    together = small.generate(prompts, SAMPLED)
    assert [o.prompt_token_ids for o in together] == prompts
    split = small.generate(prompts, SAMPLED, batch_size=2)
    assert [o.token_ids for o in split] == [o.token_ids for o in together]
    assert len({tuple(o.token_ids) for o in together}) == len(prompts)


def test_a_seed_gives_the_same_whatever_else_is_generated(small):
    (alone,) = small.generate(PROMPTS[0], SAMPLED)
    others = dataclasses.replace(SAMPLED, seed=None)
    rows = [PROMPTS[1], PROMPTS[2], PROMPTS[0], [9]]
    outs = small.generate(rows, [others, GREEDY, SAMPLED, others])
    assert outs[2].token_ids == alone.token_ids
    (other,) = small.generate(PROMPTS[0], dataclasses.replace(SAMPLED, seed=8))
    assert other.token_ids != alone.token_ids


def test_without_a_seed_every_call_differs(small):
    params = dataclasses.replace(SAMPLED, seed=None)
    first, second = (small.generate(PROMPTS[0], params)[0].token_ids for _ in range(2))
    assert first != second


def test_several_completions_of_a_prompt(small):
    several = dataclasses.replace(SAMPLED, n=3)
    (one,) = small.generate(PROMPTS[0], SAMPLED)
    (many,) = small.generate(PROMPTS[0], several)
    assert many.token_ids == many.completions[0].token_ids == one.token_ids
    assert len({tuple(c.token_ids) for c in many.completions}) == len(many.completions) == 3
    assert small.generate([[7], PROMPTS[0]], [GREEDY, several])[1].completions == many.completions
    assert many.metrics.generated_tokens == 3 * 20


def test_parameters_of_each_prompt(small):
    each = [dataclasses.replace(GREEDY, max_tokens=n) for n in (1, 20, 7)]
    outs = small.generate(PROMPTS, each)
    assert [len(o.token_ids) for o in outs] == [1, 20, 7]
    assert {o.finish_reason for o in outs} == {"length"}
    assert outs[2].token_ids == small.generate(PROMPTS[2], GREEDY)[0].token_ids[:7]


def test_every_eos_id_of_generation_config_ends_a_completion(small, tmp_path):
    free = [o.token_ids for o in small.generate(PROMPTS, GREEDY)]
    ends = [next(t for i, t in enumerate(row) if i > 1 and t not in row[:i]) for row in free[:2]]
    assert len(set(ends)) == 2
    lm = small_model(tmp_path, ends)
    assert lm.eos_ids == tuple(sorted(ends))
    outs = lm.generate(PROMPTS, GREEDY)
    for row, out in zip(free, outs, strict=True):
        at = next((i for i, t in enumerate(row) if t in ends), None)
        assert out.token_ids == (row if at is None else row[: at + 1])
        assert out.finish_reason == ("length" if at is None else "stop")
    assert [o.finish_reason for o in outs[:2]] == ["stop", "stop"]
    on = lm.generate(PROMPTS, dataclasses.replace(GREEDY, ignore_eos=True))
    assert [o.token_ids for o in on] == free
    assert {o.finish_reason for o in on} == {"length"}


def test_ids_beyond_the_tokenizer_are_masked():
    lm = tiny()
    entries = lm.tokenizer.get_vocab().values()
    assert lm.decoder.valid_vocabulary == max(entries) + 1 < lm.config.vocab_size


def test_logprobs(small):
    each = [dataclasses.replace(GREEDY, logprobs=n) for n in (3, 0)]
    outs = small.generate(PROMPTS, [*each, GREEDY])
    assert outs[2].logprobs is None
    for i, count in enumerate((3, 0)):
        whole = PROMPTS[i] + outs[i].token_ids
        expected = np.asarray(jax.nn.log_softmax(small.logits([whole])))[0, len(PROMPTS[i]) - 1 :]
        entries = outs[i].logprobs
        assert entries is not None
        assert [e.token_id for e in entries] == outs[i].token_ids
        for entry, row in zip(entries, expected, strict=False):
            assert entry.logprob == pytest.approx(row[entry.token_id], abs=1e-4)
            best = np.argsort(-row)[:count].tolist()
            assert list(entry.top) == best
            assert list(entry.top.values()) == pytest.approx(row[best].tolist(), abs=1e-4)


def test_the_caches_length_is_honoured_and_greedy_is_the_default(small):
    (out,) = small.generate(PROMPTS[0], max_len=256)
    assert len(out.token_ids) == 256 - len(PROMPTS[0]) < SamplingParams().max_tokens
    assert out.finish_reason == "length"
    assert out.token_ids[:20] == small.generate(PROMPTS[0], GREEDY)[0].token_ids


def test_metrics(small):
    params = [dataclasses.replace(GREEDY, max_tokens=1), GREEDY]
    first, second = small.generate(PROMPTS[:2], params)
    assert (first.metrics.prompt_tokens, first.metrics.generated_tokens) == (3, 1)
    assert (second.metrics.prompt_tokens, second.metrics.generated_tokens) == (5, 20)
    assert first.metrics.tpot_s == 0 < second.metrics.tpot_s
    assert min(first.metrics.ttft_s, second.metrics.ttft_s) > 0
    assert second.metrics.acceptance_lengths == ()


# Errors


@pytest.mark.parametrize("prompt", ["", [[]], [""], [[1], []]])
def test_empty_prompts(prompt):
    with pytest.raises(ValueError, match="empty"):
        tiny().generate(prompt)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([[1.5, 2.5]], "1.5"),
        ([[1, "x"]], "'x'"),
        ([[{"role": "user"}]], "content"),
        ([[{"content": "x"}]], "role"),
        ([[4095]], "4095"),
        ([[-1]], "-1"),
    ],
)
def test_malformed_prompts(prompt, message):
    with pytest.raises((TypeError, ValueError), match=message):
        tiny().generate(prompt)


def test_prompts_without_a_tokenizer(small):
    for prompt in ("text", [{"role": "user", "content": "x"}]):
        with pytest.raises(ValueError, match="no tokenizer"):
            small.generate(prompt)
    assert small.generate(PROMPTS[0], GREEDY)[0].text == ""
    with pytest.raises(ValueError, match=r"0\.\.63, found 1\.\.64"):
        small.generate([1, 64])


def test_prompts_that_do_not_fit(small):
    with pytest.raises(ValueError, match=r"512 tokens.*max_position_embeddings of 512"):
        small.generate([1] * 512)
    with pytest.raises(ValueError, match=r"12 tokens.*max_len of 12"):
        small.generate([1] * 12, max_len=12)
    with pytest.raises(ValueError, match=r"512 tokens.*max_position_embeddings of 512"):
        list(small.stream([1] * 512))


def test_a_stream_whose_cache_does_not_fit(small, monkeypatch):
    monkeypatch.setattr(small.decoder, "fitting", set())
    with monkeypatch.context() as little:
        little.setattr(memory, "host_memory", lambda: 2**15)
        with pytest.raises(NotEnoughMemoryError, match=r"1 rows of a cache of 256 .*max_tokens"):
            list(small.stream(PROMPTS[0], GREEDY))
    assert list(small.stream(PROMPTS[0], GREEDY)) == []  # it has no tokenizer


def test_as_many_parameters_as_prompts(small):
    with pytest.raises(ValueError, match="3 prompts but 2 SamplingParams"):
        small.generate(PROMPTS, [GREEDY, GREEDY])
    with pytest.raises(ValueError, match="n=2; use generate"):
        small.stream(PROMPTS[0], dataclasses.replace(GREEDY, n=2))


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_sizes(small, batch_size):
    with pytest.raises(ValueError, match="batch_size"):
        small.generate(PROMPTS, GREEDY, batch_size=batch_size)


def test_no_prompts(small):
    assert small.generate([]) == []


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2], r"\[B, T\]"),
        ([[1.0]], "float64"),
        (np.zeros((1, 0), int), r"\(1, 0\)"),
        ([[0, 64]], r"0\.\.63.*0\.\.64"),
        ([[-1, 3]], r"-1\.\.3"),
        (np.zeros((1, 513), int), "513 tokens.*512 positions"),
    ],
)
def test_bad_ids_for_logits(small, ids, message):
    with pytest.raises(ValueError, match=message):
        small.logits(ids)


def test_logits_are_float32_of_every_position(small):
    logits = small.logits([PROMPTS[0], [7, 7, 7]])
    assert (logits.shape, logits.dtype) == ((2, 3, 64), np.float32)
    model = small.model
    expected, _ = golden.step(model, np.asarray([PROMPTS[0]]), np.arange(3)[None], None)
    np.testing.assert_allclose(logits[0], expected[0], atol=1e-4)


def test_unknown_models():
    with pytest.raises(FileNotFoundError, match="mimo-tiny"):
        mj.load("mimo-tinny")


# Saving


def safetensors(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


def test_a_saved_model_has_the_same_bytes_and_loads_as_the_same(tmp_path):
    lm = tiny()
    api.save_pretrained(lm, tmp_path)
    before, after = safetensors(lm.loaded.folder), safetensors(tmp_path)
    assert contents(before) == contents(after)
    assert len(contents(before)) > 1000
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (lm.loaded.folder / name).read_bytes()
    again = LanguageModel(checkpoint.load(tmp_path))
    assert again.config == lm.config
    assert again.loaded.layout == lm.loaded.layout
    assert again.eos_ids == lm.eos_ids
    for got, expected in zip(*map(jax.tree.leaves, (again.model, lm.model)), strict=True):
        np.testing.assert_array_equal(got, expected)
    prompt = "import os\n\n\ndef "
    assert again.encode(prompt) == lm.encode(prompt)


def contents(files: dict[str, bytes]) -> dict[str, tuple[Any, ...]]:
    """dtype, shape and bytes of every tensor by name, whatever file it is in."""
    tensors = {}
    for data in files.values():
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            assert name not in tensors
            tensors[name] = (entry["dtype"], entry["shape"], data[begin:end])
    return tensors


def test_saving_over_the_folder_it_came_from(tmp_path):
    lm = tiny()
    api.save_pretrained(lm, tmp_path)
    again = LanguageModel(checkpoint.load(tmp_path))
    before = contents(safetensors(tmp_path))
    api.save_pretrained(again, tmp_path)
    assert contents(safetensors(tmp_path)) == before
    assert checkpoint.load(tmp_path).config == again.config


# The compilation cache


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No cache configured, by jax or by the environment; jax's configuration is put back after."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("MIMO_JAX_COMPILATION_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("no_cache")
def test_the_compilation_cache_is_on_and_says_where_once(tmp_path, capsys):
    folder = tmp_path / "xdg" / "mimo-jax" / "xla"
    assert api.enable_compilation_cache() == folder
    assert folder.is_dir()
    assert jax.config.jax_compilation_cache_dir == str(folder)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert str(folder) in captured.err
    assert api.enable_compilation_cache() is None
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("no_cache")
def test_the_compilation_cache_can_be_moved(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MIMO_JAX_COMPILATION_CACHE", str(tmp_path / "elsewhere"))
    assert api.enable_compilation_cache() == tmp_path / "elsewhere"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "elsewhere")
    assert str(tmp_path / "elsewhere") in capsys.readouterr().err


@pytest.mark.usefixtures("no_cache")
def test_the_compilation_cache_can_be_turned_off(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MIMO_JAX_COMPILATION_CACHE", "off")
    assert api.enable_compilation_cache() is None
    assert jax.config.jax_compilation_cache_dir is None
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "xdg").exists()


@pytest.mark.usefixtures("no_cache")
def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MIMO_JAX_COMPILATION_CACHE", str(tmp_path / "file" / "cache"))
    assert api.enable_compilation_cache() is None
    assert "no XLA compilation cache" in capsys.readouterr().err


@pytest.mark.usefixtures("no_cache")
def test_jaxs_own_setting_is_respected(tmp_path, capsys):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert api.enable_compilation_cache() is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    assert capsys.readouterr().err == ""
