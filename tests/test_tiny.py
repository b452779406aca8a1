"""mimo-tiny is what the documentation says: small, in the release's format, and it knows Python."""

from __future__ import annotations

import lzma
import sysconfig
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import tiny

from mimo_jax import checkpoint
from mimo_jax.quant import FP8Array, MXFP4Array

FOLDER = checkpoint.bundled()["mimo-tiny"]


def held_out_files() -> list[str]:
    """A short held-out module that the running interpreter has, by the corpus's rule."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = (p.relative_to(root).as_posix() for p in sorted(root.glob("*.py")))
    held_out = [n for n in names if zlib.crc32(n.encode()) % 20 == 0]
    short = [n for n in held_out if 2_000 < (root / n).stat().st_size < 8_000]
    return sorted(short, key=lambda n: (root / n).stat().st_size)[:1]


@pytest.mark.parametrize("name", held_out_files())
def test_it_predicts_held_out_files_better_than_xz(name):
    lm = tiny()
    raw = (Path(sysconfig.get_paths()["stdlib"]) / name).read_bytes()
    eot = lm.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ids = [eot, *lm.encode(raw.decode()), eot]
    logits = lm.logits(np.asarray([ids]))[0, :-1]
    logprobs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    bits = -logprobs[np.arange(len(ids) - 1), ids[1:]].sum() / np.log(2)
    assert bits < 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))


def test_there_are_held_out_files():
    assert held_out_files()


def test_it_is_stored_as_the_releases_are():
    lm = tiny()
    report = str(checkpoint.inspect(FOLDER))
    assert "no problems found" in report
    layout = lm.loaded.layout
    assert (layout.qkv, layout.chunks) == ("interleaved", 2)
    assert (layout.linear_format, layout.expert_format) == ("fp8", "mxfp4")
    qkv = lm.model.layers[0].self_attn.qkv_proj.get_value()
    assert isinstance(qkv, FP8Array)
    assert qkv.shape[1] % 128  # the last scale block of a chunk is a partial one (quirk B)
    assert isinstance(lm.model.layers[1].mlp.gate_proj.get_value(), MXFP4Array)
    assert all(
        np.asarray(layer.self_attn.sink.get_value()).any()
        for layer in lm.model.layers
        if layer.self_attn.sink is not None
    )
    assert [layer.self_attn.sink is not None for layer in lm.model.layers] == [
        s.kind == "sliding" for s in lm.config.layers
    ]
    assert {s.num_kv_heads for s in lm.config.layers} == {2, 4}


def test_it_has_drafters_and_is_small():
    lm = tiny()
    assert lm.drafters == ("mtp", "dflash")
    assert [lm._drafter(name).tokens for name in lm.drafters] == [3, 7]
    assert sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()) < 25e6


def test_its_tokenizer_has_mimos_special_tokens_and_spare_ids():
    lm = tiny()
    for token in ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>"):
        assert lm.tokenizer.decode(lm.encode(token)) == token
        assert len(lm.encode(token)) == 1
    ends = lm.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert set(lm.eos_ids) == set(ends)
    assert len(lm.encode("2026")) == 4  # single digits
    assert lm.decoder.valid_vocabulary == 4080 < lm.config.vocab_size


def test_every_expert_is_used():
    lm = tiny()
    moe_layers = [s.index for s in lm.config.layers if s.moe]
    source = Path(sysconfig.get_paths()["stdlib"]) / "shutil.py"
    ids = lm.encode(source.read_text())[:1024]
    names = [f"experts.{i}" for i in moe_layers]
    run = jax.jit(lambda model, tokens: model(tokens, taps=names)[2])
    taps = run(lm.model, jax.numpy.asarray([ids]))
    for name in names:
        counts = np.bincount(np.asarray(taps[name]).ravel(), minlength=32)
        assert counts.min() > 0
        assert counts.max() < 5 * counts.mean()
