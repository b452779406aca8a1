import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import exact

import mimo_jax as mj
from mimo_jax import explore
from mimo_jax.model.taps import Taps

IDS = [exact().encode("import os\n\n\ndef read(path):\n    return open(path).read()\n")]


def logits(lm):
    return np.asarray(lm.logits(IDS))


def test_no_change_is_the_same_model_with_the_same_weights():
    lm = exact()
    same = explore.changed(lm)
    # Compiled as the changed one is, and not optimised as `exact` is.
    np.testing.assert_array_equal(logits(same), logits(mj.LanguageModel(lm.loaded)))
    ours, theirs = (jax.tree.leaves(m.model) for m in (same, lm))
    assert all(a is b for a, b in zip(ours, theirs, strict=True))


def test_the_first_model_stays_as_it_is():
    lm = exact()
    before = logits(lm)
    changes = (
        explore.top_k(1),
        explore.window(2),
        explore.without_heads(0, 1),
        explore.without_experts(1, 0),
    )
    other = explore.changed(lm, *changes)
    assert np.abs(logits(other) - before).max() > 1
    np.testing.assert_array_equal(logits(lm), before)
    assert (lm.config.num_experts_per_tok, lm.config.sliding_window) == (4, 128)
    assert (other.config.num_experts_per_tok, other.config.sliding_window) == (1, 2)


def test_top_k():
    other = explore.changed(exact(), explore.top_k(2))
    seen = explore.taps(other, IDS, "router.*", "experts.*")
    stats = explore.router_stats(other, seen)
    assert stats.chosen.shape[2] == 2
    np.testing.assert_allclose(stats.weights.sum(-1), 1, rtol=1e-5)
    with pytest.raises(ValueError, match=r"top_k\(33\): the model has 32"):
        explore.changed(exact(), explore.top_k(33))


def test_window():
    other = explore.changed(exact(), explore.window(3))
    maps = explore.attention_maps(other, explore.taps(other, IDS, "attention.*"))
    T = len(IDS[0])
    distance = np.arange(T)[:, None] - np.arange(T)
    for found in maps.values():
        reach = 3 if found.layer.kind == "sliding" else T
        there = (distance >= 0) & (distance < reach)
        assert ((found.weights.values[0] > 0) == there).all()
    with pytest.raises(ValueError, match="itself at least"):
        explore.window(0)


def test_a_changed_model_generates_what_its_logits_say():
    """With a cache, whose rings follow the window, as without."""
    other = explore.changed(exact(), explore.window(3), explore.top_k(2))
    ids = IDS[0][:8]
    out = other.generate([ids], mj.SamplingParams(max_tokens=6, temperature=0.0))[0]
    for token in out.token_ids:
        assert int(np.asarray(other.logits([ids]))[0, -1, :4080].argmax()) == token
        ids = [*ids, token]


def test_without_heads_is_without_their_part_of_the_output():
    lm = exact()
    none = explore.changed(lm, explore.without_heads(0, *range(8)))
    seen = explore.taps(none, IDS, "hidden.0")
    layer = lm.model.layers[0]
    x = lm.model.embed(jnp.asarray(IDS))
    y = x + layer.mlp(layer.post_attention_layernorm(x))  # type: ignore[call-arg]
    np.testing.assert_allclose(seen["hidden.0"], y, atol=1e-4)
    # What two heads contribute is the sum of what each does.
    positions = jnp.arange(len(IDS[0]))[None]

    def attended(model):
        layer = model.layers[3]
        return np.asarray(layer.self_attn(x, layer.input_layernorm, positions, None, Taps())[0])

    whole = attended(lm.model)
    gone = [
        whole - attended(explore.changed(lm, explore.without_heads(3, *heads)).model)
        for heads in ((2,), (5,), (2, 5))
    ]
    np.testing.assert_allclose(gone[0] + gone[1], gone[2], atol=1e-4)
    assert np.abs(gone[0]).max() > 1e-3
    with pytest.raises(ValueError, match="no head 8; give 0 to 7"):
        explore.changed(lm, explore.without_heads(3, 8))
    with pytest.raises(ValueError, match="no layer 8"):
        explore.changed(lm, explore.without_heads(8, 0))


def test_without_experts_tokens_go_to_the_next_best():
    lm = exact()
    before = explore.taps(lm, IDS, "router.1", "experts.1")
    chosen = before["experts.1"].values
    busiest = int(np.bincount(chosen.ravel(), minlength=32).argmax())
    other = explore.changed(lm, explore.without_experts(1, busiest))
    after = explore.taps(other, IDS, "router.1", "experts.1")
    np.testing.assert_allclose(after["router.1"], before["router.1"], atol=1e-6)
    bias = np.asarray(lm.model.layers[1].mlp.e_score_correction_bias[...])  # type: ignore[union-attr]
    biased = before["router.1"].values + bias
    biased[..., busiest] = -np.inf
    best = np.sort(np.argsort(-biased, axis=-1)[..., :4], axis=-1)
    np.testing.assert_array_equal(np.sort(after["experts.1"].values, axis=-1), best)
    assert (chosen == busiest).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (explore.without_experts(0, 1), "layer 0 is not a mixture"),
        (explore.without_experts(2, 32), "no expert 32; give 0 to 31"),
        (explore.without_experts(2, *range(29)), "3 experts are left; a token uses 4"),
    ],
)
def test_what_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        explore.changed(exact(), change)
