import collections
from typing import cast

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.model.cache import init_cache
from mimo_jax.model.moe import MoE
from mimo_jax.model.taps import Taps

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 7)), jnp.int32)
AT = jnp.broadcast_to(jnp.arange(7), (2, 7))
MODEL = golden.build(golden.tiny(sliding_window=3))
LAYER = MODEL.layers[1]
EXPERTS = cast(MoE, LAYER.mlp)
ALL = ("hidden.0", "hidden.1", "router.1", "attention.0", "attention.1")


@jax.jit
def with_all(model, tokens):
    return model(tokens, taps=ALL)


def test_shapes_and_dtypes():
    logits, cache, taps = with_all(MODEL, TOKENS)
    assert cache is None
    assert logits.shape == (2, 7, 64)
    assert {name: value.shape for name, value in taps.items()} == {
        "hidden.0": (2, 7, 32),
        "hidden.1": (2, 7, 32),
        "router.1": (2, 7, 8),
        "attention.0": (2, 4, 7, 7),
        "attention.1": (2, 4, 7, 7),
    }
    assert {value.dtype for value in taps.values()} == {jnp.dtype("float32")}


def test_hidden_states_are_the_residual_stream():
    """After the last layer: before the final norm, from which the logits follow."""
    logits, _, taps = with_all(MODEL, TOKENS)
    np.testing.assert_allclose(MODEL.logits(taps["hidden.1"]), logits, atol=1e-4)
    hidden, _, _ = MODEL.hidden_states(TOKENS)
    np.testing.assert_allclose(taps["hidden.1"], hidden, atol=1e-4)
    x = taps["hidden.0"]
    x, _ = LAYER.self_attn(x, LAYER.input_layernorm, AT, None, Taps())
    x = EXPERTS(x, LAYER.post_attention_layernorm, Taps())
    np.testing.assert_allclose(x, taps["hidden.1"], atol=1e-4)


def test_router_scores_are_unbiased_sigmoids():
    _, _, taps = with_all(MODEL, TOKENS)
    x = taps["hidden.0"]
    x, _ = LAYER.self_attn(x, LAYER.input_layernorm, AT, None, Taps())
    logits = np.asarray(LAYER.post_attention_layernorm(x)) @ np.asarray(EXPERTS.gate[...]).T
    np.testing.assert_allclose(taps["router.1"], 1 / (1 + np.exp(-logits)), atol=1e-4)
    assert np.abs(EXPERTS.e_score_correction_bias[...]).max() > 0.01


def test_attention_weights():
    """Causal, in the window, rows that sum to one without a sink and to less with one."""
    _, _, taps = with_all(MODEL, TOKENS)
    distance = np.arange(7)[:, None] - np.arange(7)
    full, sliding = (np.asarray(taps[f"attention.{i}"]) for i in (0, 1))
    assert ((full > 0) == (distance >= 0)).all()
    assert ((sliding > 0) == ((distance >= 0) & (distance < 3))).all()
    np.testing.assert_allclose(full.sum(-1), 1, rtol=1e-5)
    assert (sliding.sum(-1) < 1).all()


def test_attention_weights_with_a_cache_cover_its_slots():
    cache = init_cache(MODEL.config, 2, 9, slack=2)
    _, _, taps = jax.jit(lambda c: MODEL(TOKENS[:, :3], AT[:, :3], c, taps=ALL[3:]))(cache)
    assert taps["attention.0"].shape == (2, 4, 3, 9)
    assert taps["attention.1"].shape == (2, 4, 3, 5)


def test_long_prompts_give_the_same_with_and_without_attention_weights():
    """Asked for its weights, a layer does not attend in blocks."""
    tokens = jnp.zeros((1, 300), jnp.int32).at[0, ::7].set(5)
    logits, _, taps = jax.jit(lambda t: MODEL(t, taps=["attention.1"]))(tokens)
    assert taps["attention.1"].shape == (1, 4, 300, 300)
    np.testing.assert_allclose(logits, jax.jit(lambda t: MODEL(t))(tokens)[0], atol=1e-4)


def test_only_what_was_asked_for_is_returned():
    _, _, taps = jax.eval_shape(lambda t: MODEL(t, taps=["router.1"]), TOKENS)
    assert list(taps) == ["router.1"]


def test_taps_do_not_change_the_logits():
    plain, _ = golden.step(MODEL, TOKENS, AT, None)
    np.testing.assert_allclose(with_all(MODEL, TOKENS)[0], plain, atol=1e-4)


def test_taps_are_free_when_off():
    """The program without taps is the program with them, but for what it returns."""

    def program(taps):
        closed = jax.make_jaxpr(lambda t, p: MODEL(t, p, taps=taps))(TOKENS, AT)
        return closed.jaxpr

    off, on = program(()), program(ALL)
    extra = collections.Counter(str(e.primitive) for e in on.eqns)
    extra.subtract(str(e.primitive) for e in off.eqns)
    # Attention weights, [B, K, G, T, S] inside, are returned by query head.
    assert +extra == {"reshape": sum(name.startswith("attention") for name in ALL)}
    assert not -extra
    assert len(off.outvars) == 1
    assert len(on.outvars) == 1 + len(ALL)
    assert str(off) == str(program([]))


@pytest.mark.parametrize("name", ["hidden.2", "router.0", "attention.9", "hidden", "hiden.0"])
def test_unknown_tap(name):
    with pytest.raises(ValueError, match=rf"unknown taps \['{name}'\]: use hidden\.i"):
        jax.eval_shape(lambda t: MODEL(t, taps=["hidden.0", name]), TOKENS)
