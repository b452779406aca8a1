"""The decoding loop on the device, on small random models; text is tested in test_api.py."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint.release_format import make_release

from mimo_jax import checkpoint
from mimo_jax.decoding import autoregressive, sampling
from mimo_jax.decoding.autoregressive import STEPS, Decoder, expanded
from mimo_jax.decoding.sampling import SamplingParams
from mimo_jax.decoding.state import Block, DecodeState
from mimo_jax.decoding.static_batch import bucket
from mimo_jax.model.cache import RING_SLACK, init_cache
from mimo_jax.model.packing import abstract_packed
from mimo_jax.quant import QuantizedArray
from pallas_kernels.attention.reference import QUERY_BLOCK

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SAMPLED = dataclasses.replace(GREEDY, temperature=1.0)
NARROWED = dataclasses.replace(SAMPLED, top_p=0.5)
VOCAB = 64
# The sliding layers' ring; the first prompt is longer than it and than a block of queries, the
# second one's completion crosses its end.
RING = 8 + RING_SLACK
LENGTHS = (290, RING - 10, 1)


@functools.cache
def model() -> Any:
    """Two layers, full and sliding, with a window of 8."""
    return golden.build(golden.tiny())


@functools.cache
def decoder(valid_vocabulary: int = VOCAB, eos_ids: tuple[int, ...] = (), use: Any = None) -> Any:
    return Decoder(use or model(), valid_vocabulary=valid_vocabulary, eos_ids=eos_ids)


@functools.cache
def prompt(length: int) -> list[int]:
    return np.random.default_rng(length).integers(VOCAB, size=length).tolist()


def blocks(
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] = GREEDY,
    seeds: Sequence[int] | None = None,
    use: Decoder | None = None,
    **options: Any,
) -> list[Block]:
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    seeds = range(len(prompts)) if seeds is None else seeds
    return list((use or decoder()).blocks(prompts, each, seeds, **options))


def generated(*args: Any, **options: Any) -> list[list[int]]:
    """Tokens of each row."""
    joined = np.concatenate([b.tokens for b in blocks(*args, **options)], axis=1)
    rows = [list(itertools.takewhile(lambda t: t >= 0, row)) for row in joined.tolist()]
    assert sum(map(len, rows)) == (joined >= 0).sum()  # nothing comes after a row's end
    return rows


@functools.cache
def full_logits(tokens: tuple[int, ...], width: int = 512) -> np.ndarray:
    """Logits of a sequence without a cache, [T, V]."""
    padded = np.zeros((1, width), np.int32)
    padded[0, : len(tokens)] = tokens
    positions = np.where(np.arange(width) < len(tokens), np.arange(width), -1)[None]
    logits, _ = golden.step(model(), jnp.asarray(padded), jnp.asarray(positions, jnp.int32), None)
    return np.asarray(logits)[0, : len(tokens)]


def logits_of(prompt: list[int], completion: list[int]) -> np.ndarray:
    """Logits [n, V] from which each token of a completion was to be chosen.

    If each is the argmax here, then it is what repeated full forwards would have given.
    """
    return full_logits(tuple(prompt + completion))[len(prompt) - 1 : -1]


@functools.cache
def ragged() -> list[list[int]]:
    """Greedy completions of a batch of the three lengths."""
    return generated([prompt(n) for n in LENGTHS])


@pytest.mark.parametrize("row", range(len(LENGTHS)))
def test_greedy_is_the_argmax_of_full_forwards(row):
    assert LENGTHS[0] > QUERY_BLOCK > RING
    assert LENGTHS[1] < RING < LENGTHS[1] + GREEDY.max_tokens
    completion = ragged()[row]
    assert len(completion) == GREEDY.max_tokens
    assert completion == logits_of(prompt(LENGTHS[row]), completion).argmax(-1).tolist()
    assert len(set(completion)) > 3  # a constant would agree with much


@pytest.mark.parametrize("row", [0, 2])
def test_a_row_alone_gives_the_same(row):
    assert generated([prompt(LENGTHS[row])]) == [ragged()[row]]


def test_a_seed_gives_the_same_tokens_in_any_row_of_any_batch():
    alone = generated([prompt(7)], SAMPLED, [123])
    others = [prompt(n) for n in (3, 30, 1, 12)]
    rows = [*others[:3], prompt(7), others[3]]
    assert generated(rows, SAMPLED, [1, 2, 3, 123, 4])[3] == alone[0]
    mixed = [GREEDY, dataclasses.replace(SAMPLED, top_k=5), GREEDY, SAMPLED, GREEDY]
    assert generated(rows, mixed, [5, 6, 7, 123, 8])[3] == alone[0]
    assert generated([prompt(7)], SAMPLED, [124]) != alone


def test_tokens_are_sampled_from_the_full_forward():
    (completion,) = generated([prompt(7)], SAMPLED, [123])
    rows = sampling.row_params([SAMPLED] * len(completion), [123] * len(completion))
    rows = jax.device_put(rows)
    positions = 7 + jnp.arange(len(completion), dtype=jnp.int32)
    expected = sampling.sample(jnp.asarray(logits_of(prompt(7), completion)), rows, positions)
    assert completion == expected.tolist()


@pytest.mark.parametrize("n", [1, 2, STEPS, STEPS + 1, STEPS + 2])
def test_max_tokens(n):
    params = dataclasses.replace(GREEDY, max_tokens=n)
    assert generated([prompt(1)], params) == [ragged()[2][:n]]


def test_max_tokens_of_each_row():
    limits = [1, STEPS + 1, 5]
    params = [dataclasses.replace(GREEDY, max_tokens=n) for n in limits]
    expected = [tokens[:n] for tokens, n in zip(ragged(), limits, strict=True)]
    assert generated([prompt(n) for n in LENGTHS], params) == expected


def test_any_eos_id_ends_a_row_and_is_its_last_token():
    """Two rows end in the middle, by different ids, and one at its first token."""
    later = [next(t for i, t in enumerate(row) if i > 1 and t not in row[:i]) for row in ragged()]
    ends = (later[0], later[1], ragged()[2][0])
    assert len(set(ends)) == 3
    use = decoder(eos_ids=ends)
    stop = dataclasses.replace(GREEDY, ignore_eos=False)
    first = [next(i for i, t in enumerate(row) if t in ends) for row in ragged()]
    assert first[2] == 0 < min(first[:2])
    expected = [row[: i + 1] for row, i in zip(ragged(), first, strict=True)]
    prompts = [prompt(n) for n in LENGTHS]
    assert generated(prompts, stop, use=use) == expected
    expected[0] = ragged()[0]
    assert generated(prompts, [GREEDY, stop, stop], use=use) == expected


def test_logprobs_and_ids_beyond_the_tokenizer():
    """Log-probabilities are those of the full forward without the ids that are never produced."""
    prompts = [prompt(n) for n in (7, 12, 1)]
    valid = int(max(full_logits(tuple(p))[-1].argmax() for p in prompts))
    assert 20 < valid < VOCAB  # unmasked, a prompt would go on with this id
    params = [dataclasses.replace(GREEDY, logprobs=n) for n in (2, 0)]
    params.append(dataclasses.replace(SAMPLED, logprobs=4, temperature=3.0, top_k=30))
    parts = blocks(prompts, params, use=decoder(valid_vocabulary=valid))
    for row in range(3):
        tokens = [t for b in parts for t in b.tokens[row].tolist() if t >= 0]
        assert len(tokens) == GREEDY.max_tokens
        assert max(tokens) < valid
        logits = logits_of(prompts[row], tokens)[:, :valid]
        if params[row].greedy:
            assert tokens == logits.argmax(-1).tolist()
        expected = np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))
        best = np.argsort(-expected, axis=-1)[:, :4]
        for name, wanted in {
            "chosen": expected[np.arange(len(tokens)), tokens],
            "top_ids": best,
            "top": np.take_along_axis(expected, best, axis=-1),
        }.items():
            found = np.concatenate([np.asarray(getattr(b.logprobs, name))[row] for b in parts])
            np.testing.assert_allclose(found[: len(tokens)], wanted, atol=1e-4, err_msg=name)


def test_no_logprobs_unless_asked_for():
    assert all(block.logprobs is None for block in blocks([prompt(7)]))


@pytest.fixture
def one_ahead(monkeypatch):
    """As on GPUs: two dispatches are under way."""
    monkeypatch.setattr(decoder(), "depth", 2)


@pytest.mark.usefixtures("one_ahead")
class TestOneAhead:
    def test_the_blocks_are_the_same(self):
        assert generated([prompt(n) for n in LENGTHS]) == ragged()

    def test_nothing_is_sent_that_no_row_needs(self, monkeypatch):
        use, sent = decoder(), []
        send = use.decode
        monkeypatch.setattr(use, "decode", lambda *args: sent.append(0) or send(*args))
        for tokens, dispatches in ((1, 0), (STEPS, 1), (STEPS + 1, 1), (STEPS + 2, 2)):
            sent.clear()
            blocks([prompt(7)], dataclasses.replace(GREEDY, max_tokens=tokens))
            assert len(sent) == dispatches

    def test_a_row_that_is_ended_is_so_after_what_was_sent(self):
        stopped: set[int] = set()
        params = dataclasses.replace(GREEDY, max_tokens=5 * STEPS)
        ids = [prompt(n) for n in LENGTHS]
        found = []
        for i, block in enumerate(decoder().blocks(ids, [params] * 3, range(3), stopped=stopped)):
            found.append(block.tokens)
            if i == 1:
                stopped.update((0, 2))
        assert (found[2] >= 0).all()
        assert (found[3] >= 0).all()
        assert [(f[[0, 2]] == -1).all() for f in found[4:]] == [True, True]
        assert (np.concatenate(found, axis=1)[1] >= 0).sum() == 5 * STEPS


@pytest.mark.parametrize("depth", [1, 2])
def test_no_block_comes_when_the_caller_has_ended_all_rows(monkeypatch, depth):
    monkeypatch.setattr(decoder(), "depth", depth)
    stopped: set[int] = set()
    params = dataclasses.replace(GREEDY, max_tokens=9 * STEPS)
    seen = 0
    for i, _ in enumerate(decoder().blocks([prompt(7)], [params], [0], stopped=stopped)):
        seen += 1
        if i == 2:
            stopped.add(0)
    assert seen == 3


def test_the_caller_can_end_a_row():
    stopped: set[int] = set()
    params = dataclasses.replace(GREEDY, max_tokens=3 * STEPS)
    running = decoder().blocks(
        [prompt(n) for n in LENGTHS], [params] * 3, range(3), stopped=stopped
    )
    found = []
    for i, block in enumerate(running):
        found.append(block.tokens)
        if i == 1:
            stopped.update((0, 2))
    assert [f.shape for f in found] == [(3, 1), (3, STEPS), (3, STEPS), (3, STEPS)]
    # The block after the one that the caller saw was under way already.
    assert (found[2][[0, 2]] >= 0).all()
    assert (found[3][[0, 2]] == -1).all()
    assert (found[3][1] >= 0).sum() == STEPS - 1
    assert np.concatenate(found, axis=1)[1, : GREEDY.max_tokens].tolist() == ragged()[1]


def test_a_process_ends_though_something_is_on_its_way():
    code = """
import jax, jax.numpy as jnp
from mimo_jax.decoding.state import Seen
slow = jax.jit(lambda x: jax.lax.fori_loop(0, 3000, lambda _, x: jnp.tanh(x @ x), x))
tokens = slow(jnp.eye(300)).astype(jnp.int32)
seen = Seen(tokens, None, tokens[:, 0]).on_its_way()
"""
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_generation_ends_where_the_cache_does():
    endless = dataclasses.replace(GREEDY, max_tokens=1000)
    (tokens,) = generated([prompt(20)], endless, max_len=256)
    assert len(tokens) == 236
    assert tokens == logits_of(prompt(20), tokens).argmax(-1).tolist()
    (tokens,) = generated([prompt(500)], endless)  # the model has 512 positions
    assert len(tokens) == 12
    assert tokens == logits_of(prompt(500), tokens).argmax(-1).tolist()


@pytest.mark.parametrize(
    ("length", "max_len", "message"),
    [
        (512, None, "prompt 1 has 512 tokens.*model's max_position_embeddings of 512"),
        (513, 1000, "prompt 1 has 513 tokens.*model's max_position_embeddings of 512"),
        (20, 20, "prompt 1 has 20 tokens.*cache's max_len of 20"),
        (0, None, "prompt 1 has no tokens"),
    ],
)
def test_prompts_that_do_not_fit(length, max_len, message):
    with pytest.raises(ValueError, match=message):
        blocks([prompt(3), prompt(length)], max_len=max_len)


def test_what_was_compiled_is_not_timed(monkeypatch):
    use, seconds = Decoder(model(), valid_vocabulary=VOCAB, eos_ids=()), []
    monkeypatch.setattr(use, "learn", lambda _, taken: seconds.append(taken))
    for params in (GREEDY, SAMPLED):
        blocks([prompt(7)], params, use=use)
    assert [s is None for s in seconds] == [True, False, True, False]
    assert all(s > 0 for s in seconds if s is not None)


def test_buckets():
    assert [bucket(n, 1000) for n in (1, 32, 33, 512, 513, 1000)] == [32, 32, 64, 512, 1000, 1000]
    assert [bucket(n, 1 << 30, 1) for n in (1, 2, 3, 5, 8)] == [1, 2, 4, 8, 8]


def test_requests_of_a_bucket_share_what_is_compiled():
    use = decoder()

    def compiled() -> tuple[int, int]:
        return use._prefill._cache_size(), use._decode._cache_size()

    for params in (GREEDY, SAMPLED, NARROWED):
        blocks([prompt(7)], params)
    blocks([prompt(n) for n in LENGTHS])
    before = compiled()
    assert min(before) >= 4
    for length in (1, 20, 32):
        blocks([prompt(length)], dataclasses.replace(NARROWED, top_k=3, min_p=0.1, max_tokens=99))
        blocks([prompt(length)], dataclasses.replace(SAMPLED, min_p=0.1, temperature=2.0))
        blocks([prompt(length)], dataclasses.replace(GREEDY, top_p=0.5, top_k=3))
    blocks([prompt(n) for n in (257, 1, 1, 490)])
    assert compiled() == before


@pytest.mark.parametrize(("params", "conditions"), [(GREEDY, 0), (SAMPLED, 0), (NARROWED, 1)])
def test_steps_have_no_condition_for_what_no_row_asks_for(params, conditions):
    """A GPU waits for the host where its program has one.

    The one is for rows of which more tokens than the shortlist stay.
    """
    use = decoder()
    leaves, state, rows = decode_arguments(use, 256)
    rows = rows.for_requests([params])
    program = use._decode.lower(leaves, state, rows, steps=STEPS, top_logprobs=None).as_text()
    assert len(re.findall(r"stablehlo\.(?:case|if)\b", program)) == conditions


def decode_arguments(use: Decoder, max_len: int) -> tuple[Any, ...]:
    """Arguments of a decoding dispatch of one row."""
    newest = [jnp.full(1, value, jnp.int32) for value in (5, 0, 10)]
    state = DecodeState(init_cache(use.config, 1, max_len), *newest)
    return use._leaves, state, sampling.row_params([GREEDY], [0])


def test_the_cache_is_donated():
    use = decoder()
    arguments = decode_arguments(use, 256)
    before = jax.tree.leaves(arguments[1].cache)
    state, _ = use._decode(*arguments, steps=STEPS, top_logprobs=None)
    assert all(a.is_deleted() for a in before)
    assert not any(a.is_deleted() for a in jax.tree.leaves(state))

    cache = init_cache(use.config, 1, 256)
    tokens = jnp.ones((1, 32), jnp.int32)
    positions = jnp.arange(32, dtype=jnp.int32)[None]
    use._prefill(
        *(use._leaves, tokens, positions, (cache, None), *arguments[2:], 1 + tokens[:, 0]),
        top_logprobs=None,
    )
    assert all(a.is_deleted() for a in jax.tree.leaves(cache))


def test_a_decoding_dispatch_does_not_copy_the_cache():
    """Its results are the cache's own buffers; its temporary memory could not hold a second one.

    (It holds one layer's keys and values, in the order in which XLA's CPU backend multiplies.)
    """
    long = golden.tiny(
        hybrid_layer_pattern=[0, 0, 0],
        moe_layer_freq=[0, 0, 0],
        num_key_value_heads=2,
        max_position_embeddings=1 << 14,
    )
    use = Decoder(golden.build(long), valid_vocabulary=VOCAB, eos_ids=())
    arguments = decode_arguments(use, 1 << 14)
    compiled = use._decode.lower(*arguments, steps=STEPS, top_logprobs=None).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    cache_bytes = sum(a.nbytes for a in jax.tree.leaves(arguments[1].cache))
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 2


def test_a_model_too_large_to_be_dense_generates_the_same(tmp_path, monkeypatch):
    loaded = checkpoint.load(make_release().write(tmp_path), dtype="float32")
    use = decoder(valid_vocabulary=40, use=loaded.model)
    assert sum(isinstance(w, QuantizedArray) for w in use._leaves) > 3
    tokens = [t % 40 for t in prompt(20)]
    dense = generated([tokens], use=use)
    assert use._decode._cache_size() == 1
    dtype = jnp.dtype("float32")
    assert not any(isinstance(w, QuantizedArray) for w in expanded(use._leaves, dtype))

    monkeypatch.setattr(autoregressive, "EXPAND_BYTES", 0)
    kept = expanded(use._leaves, dtype)
    assert all(a is b for a, b in zip(kept, use._leaves, strict=True))
    assert generated([tokens], use=use) == dense
    assert use._decode._cache_size() == 2  # it was compiled for quantised weights
    assert len(set(dense[0])) > 3


def test_programs_are_lowered_from_shapes_alone():
    shapes = abstract_packed(model().config, ("reference",))
    of_shapes = Decoder(shapes, valid_vocabulary=VOCAB, eos_ids=())
    for program in of_shapes.lowered(2, 8, 32):
        memory = program.compile().memory_analysis()
        assert memory
        assert memory.alias_size_in_bytes > 0
