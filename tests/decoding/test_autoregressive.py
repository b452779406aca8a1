"""The decoding loop on the device, on small random models; text is tested in test_api.py."""

from __future__ import annotations

import dataclasses
import functools
import itertools
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
from mimo_jax.decoding.autoregressive import STEPS, Block, Decoder, bucket, expanded
from mimo_jax.decoding.sampling import SamplingParams
from mimo_jax.model.cache import RING_SLACK, init_cache
from mimo_jax.quant import QuantizedArray

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SAMPLED = dataclasses.replace(GREEDY, temperature=1.0)
# Rows of different lengths; the first is longer than a block of queries, the second's completion
# crosses the end of the sliding layers' ring.
RING = 8 + RING_SLACK
LENGTHS = (290, RING - 10, 1)


@functools.cache
def model() -> Any:
    """Two layers, full and sliding, with a window of 8 and a vocabulary of 64."""
    return golden.build(golden.tiny())


@functools.cache
def decoder(valid_vocabulary: int = 64, eos_ids: tuple[int, ...] = ()) -> Decoder:
    return Decoder(model(), valid_vocabulary=valid_vocabulary, eos_ids=eos_ids)


@functools.cache
def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(64, size=length).tolist()


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
    for row in joined:  # nothing comes after the end
        assert not (np.diff(row < 0) & (row[1:] >= 0)).any()
    return [row[row >= 0].tolist() for row in joined]


@functools.cache
def full_logits(tokens: tuple[int, ...], width: int = 512) -> np.ndarray:
    """Logits of a sequence without a cache, [T, V]."""
    padded = np.zeros((1, width), np.int32)
    padded[0, : len(tokens)] = tokens
    positions = np.where(np.arange(width) < len(tokens), np.arange(width), -1)[None]
    logits, _ = golden.step(model(), jnp.asarray(padded), jnp.asarray(positions, jnp.int32), None)
    return np.asarray(logits)[0, : len(tokens)]


def predicted(prompt: list[int], completion: list[int]) -> np.ndarray:
    """Logits [n, V] from which each token of a completion was to be chosen.

    That each is the argmax here means that repeated full forwards would have given it.
    """
    return full_logits(tuple(prompt + completion))[len(prompt) - 1 : -1]


@functools.cache
def ragged() -> list[list[int]]:
    return generated([prompt(n) for n in LENGTHS])


@pytest.mark.parametrize("row", range(len(LENGTHS)))
def test_greedy_is_the_argmax_of_full_forwards(row):
    assert LENGTHS[1] < RING < LENGTHS[1] + GREEDY.max_tokens
    completion = ragged()[row]
    assert len(completion) == GREEDY.max_tokens
    logits = predicted(prompt(LENGTHS[row]), completion)
    assert completion == logits.argmax(-1).tolist()
    assert len(set(completion)) > 3  # a constant would agree with much


@pytest.mark.parametrize("row", range(len(LENGTHS)))
def test_a_row_alone_gives_the_same(row):
    assert generated([prompt(LENGTHS[row])]) == [ragged()[row]]


def test_a_seed_gives_the_same_tokens_in_any_row_of_any_batch():
    alone = generated([prompt(7)], SAMPLED, [123])
    others = [prompt(n) for n in (3, 30, 1, 12)]
    batch = generated([*others[:3], prompt(7), others[3]], SAMPLED, [1, 2, 3, 123, 4])
    assert batch[3] == alone[0]
    assert generated([prompt(7)], SAMPLED, [124]) != alone
    mixed = [GREEDY, dataclasses.replace(SAMPLED, top_k=5), GREEDY, SAMPLED, GREEDY]
    assert generated([*others[:3], prompt(7), others[3]], mixed, [1, 2, 3, 123, 4])[3] == alone[0]


def test_sampled_tokens_are_sampled_from_the_full_forward():
    (completion,) = generated([prompt(7)], SAMPLED, [123])
    logits = jnp.asarray(predicted(prompt(7), completion))
    rows = sampling.row_params([SAMPLED] * len(completion), [123] * len(completion))
    positions = 7 + jnp.arange(len(completion), dtype=jnp.int32)
    assert sampling.sample(logits, rows, positions).tolist() == completion


@pytest.mark.parametrize("n", [1, 2, STEPS, STEPS + 1, STEPS + 2])
def test_max_tokens(n):
    params = dataclasses.replace(GREEDY, max_tokens=n)
    assert generated([prompt(1)], params) == [ragged()[2][:n]]


def test_max_tokens_of_each_row():
    limits = [1, STEPS + 1, 5]
    params = [dataclasses.replace(GREEDY, max_tokens=n) for n in limits]
    expected = [tokens[:n] for tokens, n in zip(ragged(), limits, strict=True)]
    assert generated([prompt(n) for n in LENGTHS], params) == expected


def test_each_eos_id_ends_a_row_and_is_its_last_token():
    ends = [next(t for i, t in enumerate(row) if i > 1 and t not in row[:i]) for row in ragged()]
    assert len(set(ends)) > 1
    use = Decoder(model(), valid_vocabulary=64, eos_ids=ends)
    params = dataclasses.replace(GREEDY, ignore_eos=False)
    expected = [[*itertools.takewhile(lambda t: t not in ends, row)] for row in ragged()]
    expected = [row[: len(cut) + 1] for row, cut in zip(ragged(), expected, strict=True)]
    assert generated([prompt(n) for n in LENGTHS], params, use=use) == expected
    mixed = [params, GREEDY, params]
    expected[1] = ragged()[1]
    assert generated([prompt(n) for n in LENGTHS], mixed, use=use) == expected


def test_an_eos_as_first_token():
    use = Decoder(model(), valid_vocabulary=64, eos_ids=[ragged()[2][0]])
    params = dataclasses.replace(GREEDY, ignore_eos=False)
    assert generated([prompt(1)], params, use=use) == [ragged()[2][:1]]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_ids_beyond_the_tokenizer_are_never_produced(params):
    prompts = [prompt(n) for n in (7, 12)]
    best = [full_logits(tuple(p))[-1].argmax() for p in prompts]
    valid = max(best)  # unmasked, one of the prompts would go on with this id
    assert valid > 20
    use = decoder(valid_vocabulary=int(valid))
    for block in blocks(prompts, dataclasses.replace(params, logprobs=30), use=use):
        assert block.tokens.max() < valid
        assert block.logprobs is not None
        finite = np.isfinite(np.asarray(block.logprobs.top))
        assert np.asarray(block.logprobs.top_ids)[finite].max() < valid


def test_logprobs_are_those_of_the_full_forward():
    params = [dataclasses.replace(GREEDY, logprobs=n) for n in (2, 0)]
    params.append(dataclasses.replace(SAMPLED, logprobs=4, temperature=3.0, top_k=30))
    prompts = [prompt(n) for n in (7, 12, 1)]
    parts = blocks(prompts, params)
    for row in range(3):
        tokens = [t for b in parts for t in b.tokens[row].tolist() if t >= 0]
        expected = np.asarray(jax.nn.log_softmax(jnp.asarray(predicted(prompts[row], tokens))))
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


def test_the_caller_can_end_a_row():
    stopped: set[int] = set()
    running = decoder().blocks(
        [prompt(n) for n in LENGTHS],
        [dataclasses.replace(GREEDY, max_tokens=3 * STEPS)] * 3,
        range(3),
        stopped=stopped,
    )
    found = []
    for i, block in enumerate(running):
        found.append(block.tokens)
        if i == 1:
            stopped.update((0, 2))
    assert [f.shape[1] for f in found] == [1, STEPS, STEPS, STEPS]
    after = np.concatenate(found[2:], axis=1)
    assert (after[[0, 2]] == -1).all()
    assert (after[1, : 2 * STEPS - 1] >= 0).all()
    assert np.concatenate(found, axis=1)[1, : GREEDY.max_tokens].tolist() == ragged()[1]


def test_generation_ends_where_the_cache_does():
    assert generated([prompt(1)], max_len=9) == [ragged()[2][:8]]
    longest = golden.tiny().config["max_position_embeddings"]
    (tokens,) = generated([prompt(longest - 3)])
    assert len(tokens) == 3
    assert tokens == predicted(prompt(longest - 3), tokens).argmax(-1).tolist()


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


def test_buckets():
    assert [bucket(n, 1000) for n in (1, 32, 33, 512, 513, 1000)] == [32, 32, 64, 512, 1000, 1000]
    assert [bucket(n, 1 << 30, 1) for n in (1, 2, 3, 5, 8)] == [1, 2, 4, 8, 8]


def test_lengths_of_a_bucket_share_what_is_compiled():
    use = Decoder(model(), valid_vocabulary=64, eos_ids=())
    for length in (1, 20, 32):
        blocks([prompt(length)], use=use)
    blocks([prompt(5)] * 3, use=use)
    blocks([prompt(6)] * 4, dataclasses.replace(SAMPLED, top_p=0.5), use=use)
    assert use._prefill._cache_size() == 2
    assert use._decode._cache_size() == 2


def decode_arguments(use: Decoder, max_len: int) -> tuple[Any, ...]:
    """Arguments of a decoding dispatch of one row, and the bytes of its cache."""
    cache = init_cache(use.config, 1, max_len)
    one = jnp.ones(1, jnp.int32)
    state = autoregressive.DecodeState(cache, one, one, 10 * one)
    rows = sampling.row_params([GREEDY], [0])
    return use._leaves, state, rows, jnp.ones(1, bool)


def test_the_cache_is_donated():
    use = decoder()
    arguments = decode_arguments(use, 256)
    before = jax.tree.leaves(arguments[1].cache)
    state, _, _ = use._decode(*arguments, steps=STEPS, top_logprobs=None)
    assert all(a.is_deleted() for a in before)
    assert not any(a.is_deleted() for a in jax.tree.leaves(state))

    cache = init_cache(use.config, 1, 256)
    tokens = jnp.ones((1, 32), jnp.int32)
    positions = jnp.arange(32, dtype=jnp.int32)[None]
    use._prefill(
        use._leaves, tokens, positions, cache, arguments[2], arguments[3], jnp.ones(1, jnp.int32),
        top_logprobs=None,
    )  # fmt: skip
    assert all(a.is_deleted() for a in jax.tree.leaves(cache))


def test_a_decoding_dispatch_does_not_copy_the_cache():
    """Its results are the cache's own buffers, and its temporary memory could not hold a copy."""
    long = golden.build(golden.tiny(max_position_embeddings=1 << 16))
    use = Decoder(long, valid_vocabulary=64, eos_ids=())
    arguments = decode_arguments(use, 1 << 16)
    compiled = use._decode.lower(*arguments, steps=STEPS, top_logprobs=None).compile()
    memory = compiled.memory_analysis()
    sizes = [a.nbytes for a in jax.tree.leaves(arguments[1].cache)]
    assert memory.alias_size_in_bytes >= sum(sizes)
    assert memory.temp_size_in_bytes < max(sizes)


@functools.cache
def quantized(folder: str) -> Any:
    return checkpoint.load(folder, dtype="float32").model


def test_a_model_too_large_to_be_dense_generates_the_same(tmp_path, monkeypatch):
    loaded = checkpoint.load(make_release().write(tmp_path), dtype="float32")
    use = Decoder(loaded.model, valid_vocabulary=40, eos_ids=())
    count = sum(isinstance(w, QuantizedArray) for w in use._leaves)
    assert count > 3
    tokens = [t % 40 for t in prompt(20)]
    dense = generated([tokens], use=use)
    assert not any(isinstance(w, QuantizedArray) for w in expanded(use._leaves, jnp.float32))

    monkeypatch.setattr(autoregressive, "EXPAND_BYTES", 0)
    kept = expanded(use._leaves, jnp.dtype("float32"))
    assert all(a is b for a, b in zip(kept, use._leaves, strict=True))
    assert use._decode._cache_size() == 1
    assert generated([tokens], use=use) == dense
    assert use._decode._cache_size() == 2  # it was compiled for quantised weights
    assert len(set(dense[0])) > 3
