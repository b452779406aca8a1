"""What is found in mimo-tiny, against computations of its own."""

import collections
import dataclasses
import functools

import jax
import numpy as np
import pytest
from scipy.special import log_softmax
from tiny import exact

from mimo_jax import explore
from mimo_jax.api import load
from mimo_jax.quant import numpy_dequantize

TEXT = '''import csv


def read_rows(path):
    """All rows of a file."""
    with open(path) as f:
        rows = list(csv.reader(f))
    return [row for row in rows if row]
'''


@functools.cache
def seen():
    return explore.taps(exact(), TEXT, "*")


def attention_by_spec(lm, i, x):
    """Weights of layer i and the sink's share, as MODEL_SPEC 2.3 to 2.9 has them, in numpy."""
    layer, spec = lm.model.layers[i], lm.config.layers[i]
    N, K, H, V = spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.v_head_dim
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + lm.config.layernorm_epsilon)
    x = x * np.asarray(layer.input_layernorm.weight[...])
    rows = numpy_dequantize(layer.self_attn.qkv_proj.get_value())  # [C, R, D]: interleaved
    C, T = len(rows), len(x)
    q, k, _ = np.split(np.einsum("td,crd->tcr", x, rows), [N * H // C, (N + K) * H // C], axis=2)
    q, k = q.reshape(T, N, H), k.reshape(T, K, H).repeat(N // K, axis=1)
    assert rows.shape[1] == (N + K) // C * H + K // C * V
    half = spec.rotary_dim // 2
    angle = np.arange(T)[:, None] * spec.rope_theta ** -(np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def rotated(y):
        a, b = y[..., :half], y[..., half : 2 * half]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, y[..., 2 * half :]], -1)

    scores = np.einsum("tnh,snh->nts", rotated(q), rotated(k)) / np.sqrt(H)
    distance = np.arange(T)[:, None] - np.arange(T)
    visible = (distance >= 0) & (distance < (spec.window or T))
    scores = np.where(visible, scores, -np.inf)
    if spec.sink:
        sink = np.asarray(layer.self_attn.sink[...], np.float32).reshape(N, 1, 1)
        scores = np.concatenate([scores, np.broadcast_to(sink, (N, T, 1))], axis=2)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return weights[..., :T], weights[..., T:].sum(-1)


@pytest.mark.parametrize("i", [1, 4])
def test_attention_maps_are_the_softmax_of_the_specification(i):
    lm = exact()
    found = explore.attention_maps(lm, seen())[i]
    assert found.layer.kind == {1: "sliding", 4: "full"}[i]
    weights, sink = attention_by_spec(lm, i, seen()[f"hidden.{i - 1}"].values[0])
    np.testing.assert_allclose(found.weights.values[0], weights, atol=2e-5)
    np.testing.assert_allclose(found.sink.values[0], sink, atol=2e-5)


def test_rows_sum_to_what_the_sink_leaves():
    maps = explore.attention_maps(exact(), seen())
    assert list(maps) == list(range(8))
    for found in maps.values():
        np.testing.assert_allclose(
            found.weights.values.sum(-1), 1 - found.sink.values, atol=1e-5, rtol=0
        )
        assert (found.sink.values > 0).any() == found.layer.sink
        assert found.sink.axes == ("batch", "head", "query")


def test_distance_is_how_far_back_a_head_looks():
    found = explore.attention_maps(exact(), seen())[2]
    weights = found.weights.values[0]
    T = weights.shape[-1]
    expected = [
        np.mean(
            [sum(w * (t - s) for s, w in enumerate(row)) / row.sum() for t, row in enumerate(h)]
        )
        for h in weights
    ]
    np.testing.assert_allclose(found.distance.values[0], expected, rtol=1e-4)
    one = np.zeros((1, 1, T, T), np.float32)
    one[..., np.arange(T), np.maximum(np.arange(T) - 1, 0)] = 0.5  # the token before, and a sink
    back = dataclasses.replace(found, weights=explore.NamedArray(one, found.weights.axes)).distance
    np.testing.assert_allclose(back, [[(T - 1) / T]], rtol=1e-6)


def test_router_stats_are_counts():
    lm = exact()
    stats = explore.router_stats(lm, seen())
    assert stats.layers == (1, 2, 3, 4, 5, 6, 7)
    assert stats.counts.shape == (7, 32)
    for i, layer in enumerate(stats.layers):
        scores = seen()[f"router.{layer}"].values[0]
        mlp = lm.model.layers[layer].mlp
        biased = scores + np.asarray(mlp.e_score_correction_bias[...])  # type: ignore[union-attr]
        counts, shares = collections.Counter(), collections.Counter()
        for token in range(len(scores)):
            best = np.argsort(-biased[token], kind="stable")[:4]
            total = scores[token][best].sum()
            for e in best:
                counts[e] += 1
                shares[e] += scores[token][e] / total
        np.testing.assert_array_equal(stats.counts[i], [counts[e] for e in range(32)])
        np.testing.assert_allclose(stats.shares[i], [shares[e] for e in range(32)], atol=1e-4)
    np.testing.assert_allclose(stats.weights.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(stats.load.mean(axis=1), 1)
    assert stats.counts.sum() == 7 * 4 * len(stats.tokens)


def test_favourites_are_the_tokens_an_expert_gets_most_of():
    stats = explore.router_stats(exact(), seen())
    expert = int(stats.counts[2].argmax())
    found = stats.favourites(3, expert, least=2)
    assert found
    parts = [f.sent / f.seen for f in found]
    assert parts == sorted(parts, reverse=True)
    for f in found:
        there = stats.tokens == f.token
        assert f.seen == there.sum() >= 2
        assert f.sent == (stats.chosen[2][there] == expert).any(axis=1).sum() > 0
    with pytest.raises(ValueError, match="layer 0 is not among"):
        stats.favourites(0, 1)


def test_the_lens_of_the_last_layer_is_the_model():
    lm = exact()
    lens = explore.logit_lens(lm, seen(), top=3)
    ids = seen()["tokens"].values
    logprobs = log_softmax(np.asarray(lm.logits(ids)), axis=-1)
    assert lens.ids.shape == (8, *ids.shape, 3)
    np.testing.assert_array_equal(lens.ids[-1, ..., 0], logprobs.argmax(-1))
    np.testing.assert_allclose(lens.logprobs[-1], -np.sort(-logprobs, -1)[..., :3], atol=1e-4)
    of_next = np.take_along_axis(logprobs[:, :-1], ids[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(lens.next_logprobs[-1], of_next, atol=1e-4)
    np.testing.assert_allclose(lens.divergence[-1], 0, atol=1e-5)
    assert (lens.divergence[:-1].mean(axis=(1, 2)) > 0.01).all()
    read = explore.read_out(lm, seen()["hidden.7"])
    assert read.axes == ("batch", "position", "token")
    np.testing.assert_allclose(read, lm.logits(ids), atol=1e-4)


def test_the_lens_of_an_earlier_layer_is_its_stream_read_out():
    lm = exact()
    lens = explore.logit_lens(lm, seen())
    x = seen()["hidden.2"].values
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + lm.config.layernorm_epsilon)
    x = x * np.asarray(lm.model.norm.weight[...])
    own = log_softmax(x @ np.asarray(lm.model.lm_head[...], np.float32).T, axis=-1)
    np.testing.assert_allclose(lens.logprobs[2], -np.sort(-own, -1)[..., :5], atol=1e-3)
    final = log_softmax(seen()["logits"].values, axis=-1)
    expected = (np.exp(final) * (final - own)).sum(-1)
    np.testing.assert_allclose(lens.divergence[2], expected, atol=1e-3)


def test_losses_and_divergence():
    logits, ids = seen()["logits"], seen()["tokens"]
    losses = explore.token_losses(logits, ids)
    lens = explore.logit_lens(exact(), seen())
    np.testing.assert_allclose(losses, -lens.next_logprobs[-1], atol=1e-4)
    np.testing.assert_allclose(explore.divergence(logits, logits), 0, atol=1e-6)
    earlier = explore.read_out(exact(), seen()["hidden.5"])
    np.testing.assert_allclose(explore.divergence(logits, earlier), lens.divergence[5], atol=1e-3)


@pytest.mark.parametrize(
    ("find", "message"),
    [
        (explore.attention_maps, 'ask for "attention'),
        (explore.router_stats, 'ask for "router'),
        (explore.logit_lens, "hidden.7 is missing"),
    ],
)
def test_what_was_not_tapped_is_said(find, message):
    some = {k: v for k, v in seen().items() if k in ("tokens", "hidden.3", "router.2")}
    with pytest.raises(ValueError, match=message):
        find(exact(), some)


def test_on_a_mesh():
    lm = exact()
    split = load("mimo-tiny", dtype="float32", mesh="data=2,tensor=2", rules="throughput")
    assert jax.device_count() >= 4
    ids = [lm.encode(TEXT)[:20]]
    names = ("hidden.*", "attention.1", "router.*", "experts.*", "logits")
    found = explore.taps(split, ids, *names)
    for name, array in explore.taps(lm, ids, *names).items():
        np.testing.assert_allclose(found[name], array, atol=2e-3, err_msg=name)
    lens = explore.logit_lens(split, found)
    np.testing.assert_allclose(lens.divergence[-1], 0, atol=1e-5)
