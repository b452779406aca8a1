"""The DFlash drafter, and drafting with it, against MODEL_SPEC 4 written out in float64."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding.speculating import DRAFTER
from goldens import recipe

from mimo_jax.decoding.drafters import DFlashDrafter, Rows
from mimo_jax.model.cache import RING_SLACK
from mimo_jax.model.dflash import DFlash
from mimo_jax.model.taps import Taps

# The vocabulary is not the backbone's, and the backbone's theta is not the drafter's.
CONFIG = dataclasses.replace(DRAFTER, vocab_size=48, backbone_rotary_base=5e6)
LAYERS, VOCAB, D, MLP_WIDTH, BLOCK, WINDOW = 2, 64, 32, 48, 8, 24
HEADS, KV_HEADS, HEAD, ROTARY, THETA, VALUE_SCALE, EPS = 4, 2, 16, 8, 1e4, 0.612, 1e-6
TAPS = ("hidden.0", "hidden.1")
DONE = -1
# The first two are longer than the window, and the rounds of the first cross the end of its ring.
LENGTHS = (WINDOW + RING_SLACK - 6, 30, 9, 1)
# Proposals that are kept of each row in successive rounds; the last row ends before the others.
ROUNDS = (
    (0, 7, 3, 1),
    (7, 0, 0, 2),
    (0, 0, 7, 4),
    (7, 5, 6, 0),
    (6, 2, 7, DONE),
    (7, 0, 1, DONE),
)


# -- MODEL_SPEC 4.1 and 4.2, a position at a time -------------------------------------------------


@functools.cache
def weights() -> dict[str, np.ndarray]:
    """The tensors of MODEL_SPEC 4.3 and the mask's vector; norms and sinks are random too."""
    rng = np.random.default_rng(4)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return gain / np.sqrt(columns) * rng.standard_normal((rows, columns))

    def norm(width: int = D, gain: float = 1.0) -> np.ndarray:
        return gain * rng.uniform(0.5, 1.5, width)

    tensors = {
        "fc.weight": matrix(D, len(TAPS) * D),
        "hidden_norm.weight": norm(),
        "norm.weight": norm(),
        "mask_embedding.pt": 0.3 * rng.standard_normal(D),  # little, so that drafts are diverse
    }
    for layer in range(LAYERS):
        tensors_of = {
            "input_layernorm.weight": norm(),
            "post_attention_layernorm.weight": norm(),
            "self_attn.q_proj.weight": matrix(HEADS * HEAD, D),
            "self_attn.k_proj.weight": matrix(KV_HEADS * HEAD, D),
            "self_attn.v_proj.weight": matrix(KV_HEADS * HEAD, D),
            "self_attn.o_proj.weight": matrix(D, HEADS * HEAD, 3.0),
            "self_attn.q_norm.weight": norm(HEAD, 2.0),
            "self_attn.k_norm.weight": norm(HEAD),
            "self_attn.attention_sink_bias": 1.5 * rng.standard_normal(HEADS),
            "mlp.gate_proj.weight": matrix(MLP_WIDTH, D),
            "mlp.up_proj.weight": matrix(MLP_WIDTH, D),
            "mlp.down_proj.weight": matrix(D, MLP_WIDTH),
        }
        tensors |= {f"layers.{layer}.{name}": value for name, value in tensors_of.items()}
    return {name: value.astype(np.float32).astype(float) for name, value in tensors.items()}


@functools.cache
def of_layer(layer: int) -> dict[str, np.ndarray]:
    """A layer's tensors by the part of the name that tells them apart."""
    prefix = f"layers.{layer}."
    of = {name: a for name, a in weights().items() if name.startswith(prefix)}
    return {name.removesuffix(".weight").split(".")[-1]: a for name, a in of.items()}


@functools.cache
def tables() -> tuple[np.ndarray, np.ndarray]:
    """The backbone's embedding and head."""
    w = recipe.make_weights(golden.tiny())
    return w["model.embed_tokens.weight"].astype(float), w["lm_head.weight"].astype(float)


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x) + EPS) * weight


def rotated(head: np.ndarray, position: int, rotary: int, theta: float) -> np.ndarray:
    """Dimensions i and i + rotary / 2 are a complex number, which is turned."""
    half = rotary // 2
    angles = position * theta ** (-2 * np.arange(half) / rotary)
    turned = (head[:half] + 1j * head[half:rotary]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag, head[rotary:]])


def features(taps: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Context features of positions whose residual streams [target layer, D] are given."""
    fc, norm = weights()["fc.weight"], weights()["hidden_norm.weight"]
    return [rms(fc @ streams.reshape(-1), norm) for streams in taps]


def block_logits(
    context: Iterable[tuple[int, np.ndarray]],
    anchor: int,
    start: int,
    *,
    mask: np.ndarray | None = None,
    causal: bool = False,
    window: int = WINDOW,
    sinks: bool = True,
    value_scale: float = VALUE_SCALE,
    rotary: int = ROTARY,
    context_theta: float = THETA,
    context_normed: bool = False,
) -> np.ndarray:
    """Logits [8, V] of a block at positions `start` and on, after positions and their features.

    Other `mask`s than the mask embedding, and other values of what follows it, are wrong.
    """
    (table, head), context = tables(), list(context)
    mask = weights()["mask_embedding.pt"] if mask is None else mask
    block = [table[anchor]] + [mask] * (BLOCK - 1)
    for layer in range(LAYERS):
        w = of_layer(layer)
        before = [
            (at, rms(c, w["input_layernorm"]) if context_normed else c, context_theta)
            for at, c in context
        ]
        own = [(start + r, rms(x, w["input_layernorm"]), THETA) for r, x in enumerate(block)]
        held = []
        for at, n, theta in before + own:
            keys = [rms(key, w["k_norm"]) for key in (w["k_proj"] @ n).reshape(KV_HEADS, HEAD)]
            values = value_scale * (w["v_proj"] @ n).reshape(KV_HEADS, HEAD)
            held.append((at, [rotated(key, at, rotary, theta) for key in keys], values))
        for row, (at, n, _) in enumerate(own):
            seen = [a for a in held if at - a[0] < window and not (causal and a[0] > at)]
            heads = []
            for i, query in enumerate((w["q_proj"] @ n).reshape(HEADS, HEAD)):
                query = rotated(rms(query, w["q_norm"]), at, rotary, THETA)
                kv = i // (HEADS // KV_HEADS)
                shares = np.exp(np.stack([keys[kv] for _, keys, _ in seen]) @ query / np.sqrt(HEAD))
                sink = np.exp(w["attention_sink_bias"][i]) if sinks else 0.0
                value = shares @ np.stack([values[kv] for _, _, values in seen])
                heads.append(value / (shares.sum() + sink))
            x = block[row] + w["o_proj"] @ np.concatenate(heads)
            n = rms(x, w["post_attention_layernorm"])
            gate = w["gate_proj"] @ n
            block[row] = x + w["down_proj"] @ (gate / (1 + np.exp(-gate)) * (w["up_proj"] @ n))
    return np.stack([head @ rms(x, weights()["norm.weight"]) for x in block])


# -- the code -------------------------------------------------------------------------------------


class Fewer(DFlashDrafter):
    """Proposes three tokens of a block."""

    @property
    def tokens(self) -> int:
        return 3


@functools.cache
def backbone() -> Any:
    return golden.build(golden.tiny())


@functools.cache
def drafter(kind: type[DFlashDrafter] = DFlashDrafter) -> DFlashDrafter:
    used = set[str]()
    module = DFlash(CONFIG, golden.make_from(weights(), "float32", used))
    assert used == set(weights())
    return kind(module)


@functools.cache
def compiled(kind: type[DFlashDrafter] = DFlashDrafter) -> Any:
    """`draft` with the most probable tokens, and the logits and positions that they came from."""
    use = drafter(kind)

    def draft(module, model, state, rows):
        seen = []

        def greedy(logits, positions):
            seen.append((logits, positions))
            return logits.argmax(-1).astype(jnp.int32)

        drafts, state = use.draft(module, model, state, rows, greedy)
        logits, positions = (jnp.concatenate(each, axis=1) for each in zip(*seen, strict=True))
        return drafts, logits, positions, state

    return functools.partial(jax.jit(draft), use.module, backbone())


@dataclasses.dataclass
class Drafted:
    """A call of `draft`: what was known of each row, how much of that was new, what it was given,
    and what it made."""

    known: list[tuple[list[int], np.ndarray]]
    kept: list[int]
    rows: Rows
    drafts: np.ndarray
    logits: np.ndarray
    positions: np.ndarray

    def context(self, b: int) -> list[tuple[int, np.ndarray]]:
        return list(enumerate(features(self.known[b][1])))

    def expected(self, b: int, context: Any = None, start: int = 0, **changes: Any) -> np.ndarray:
        """Logits [8, V] of row b; with a context or a start other than its own if given."""
        tokens, taps = self.known[b]
        context = self.context(b) if context is None else context
        return block_logits(context, tokens[-1], start or len(taps), **changes)


def batch(known: Any, kept: Sequence[int], width: int, *, padded: bool, rubbish: Any) -> Rows:
    """The newest `kept` of the known rows; after them padding, or rows that were rejected."""
    positions = np.full((len(known), width), -1, np.int32)
    taps = rubbish.standard_normal((len(known), width, len(TAPS), D))
    following = rubbish.integers(VOCAB, size=(len(known), width))
    for b, ((tokens, streams), n) in enumerate(zip(known, kept, strict=True)):
        ran = n if padded or n == 0 else width
        positions[b, :ran] = len(streams) - n + np.arange(ran)
        taps[b, :n] = streams[len(streams) - n :]
        following[b, :n] = tokens[len(tokens) - n :]
    last = jnp.asarray(np.maximum(np.array(kept) - 1, 0), jnp.int32)
    named = {name: jnp.asarray(taps[:, :, i], jnp.float32) for i, name in enumerate(TAPS)}
    hidden = jnp.asarray(rubbish.standard_normal((len(known), width, D)), jnp.float32)
    return Rows(jnp.asarray(positions), hidden, named, jnp.asarray(following, jnp.int32), last)


def drafting(lengths: Sequence[int], rubbish: int = 0) -> list[Drafted]:
    """Drafts after prompts and after each round; `rubbish` seeds what stands at invalid rows."""
    rng, noise = np.random.default_rng(1), np.random.default_rng(rubbish)

    def streams(n: int) -> np.ndarray:
        return rng.standard_normal((n, len(TAPS), D)).astype(np.float32)

    known = [(rng.integers(VOCAB, size=n + 1).tolist(), streams(n)) for n in lengths]
    kept, state, calls = list(lengths), drafter().init(len(lengths), "float32", None), []
    for accepted in ((), *ROUNDS):
        if accepted:
            kept = [a + 1 for a in accepted]
            for b, n in enumerate(kept):
                if n:
                    new = [*calls[-1].drafts[b, : n - 1].tolist(), int(rng.integers(VOCAB))]
                    known[b] = (known[b][0] + new, np.concatenate([known[b][1], streams(n)]))
        width = BLOCK if accepted else max(lengths)
        rows = batch(known, kept, width, padded=not accepted, rubbish=noise)
        drafts, logits, positions, state = compiled()(state, rows)
        arrays = (np.asarray(a) for a in (drafts, logits, positions))
        calls.append(Drafted(list(known), kept, rows, *arrays))
    return calls


@functools.cache
def long_prompts() -> list[Drafted]:
    return drafting(LENGTHS)


def close(got: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def differ(got: Any, expected: np.ndarray) -> bool:
    """By a thousand times what `close` allows."""
    return bool(np.abs(got - expected).max() > 1e-2 * np.abs(expected).max())


def assert_not(*calls: Drafted, **changes: Any) -> None:
    """The first row's logits are those of MODEL_SPEC, and with the changes they would be others."""
    for call in calls:
        close(call.logits[0], call.expected(0)[1:])
        assert differ(call.logits[0], call.expected(0, **changes)[1:])


# -- tests ----------------------------------------------------------------------------------------


def assert_drafts(calls: list[Drafted]) -> None:
    assert len(calls) == 1 + len(ROUNDS)
    for call in calls:
        for b, n in enumerate(call.kept):
            if n:
                expected = call.expected(b)[1:]
                close(call.logits[b], expected)
                assert call.drafts[b].tolist() == expected.argmax(-1).tolist()
                first = len(call.known[b][0])  # after the anchor
                assert call.positions[b].tolist() == list(range(first, first + BLOCK - 1))
    assert len(np.unique(calls[0].drafts)) > 3  # a constant would agree with much


def test_drafts_after_prompts_longer_than_the_window():
    assert_drafts(long_prompts())
    ends = [len(call.known[0][1]) for call in long_prompts()]
    assert ends[0] < WINDOW + RING_SLACK < ends[-1] - WINDOW


def test_drafts_after_prompts_shorter_than_the_window():
    assert_drafts(drafting((20, 7, 2, 1)))


@pytest.mark.parametrize(
    "change",
    # Features go straight to a layer's key and value projections (4.1); context rotates as blocks
    # do (4.2.1); of it a row sees one position less than the window has (4.2.4).
    [{"context_normed": True}, {"context_theta": 5e6}, {"window": 23}, {"window": 25}],
    ids=str,
)
def test_what_is_said_of_the_context_counts(change):
    assert_not(*long_prompts()[:2], **change)


def test_trap_19_mask_embedding_stands_for_masked_positions():
    """Not the backbone's row of the mask token (4.2.5)."""
    assert_not(*long_prompts()[:2], mask=tables()[0][CONFIG.mask_token_id])


@pytest.mark.parametrize(
    "change", [{"sinks": False}, {"value_scale": 1.0}, {"rotary": HEAD}, {"rotary": 0}], ids=str
)
def test_trap_20_sinks_value_scale_and_partial_rotary_count(change):
    assert_not(*long_prompts()[:2], **change)


def test_trap_21_head_is_the_backbones_though_the_vocabularies_differ():
    """Logits and proposals are of all its tokens (4.2.7)."""
    assert CONFIG.vocab_size is not None
    assert CONFIG.vocab_size < VOCAB
    call = long_prompts()[0]
    assert call.logits.shape == (len(LENGTHS), BLOCK - 1, VOCAB)
    for b in range(len(LENGTHS)):
        close(call.logits[b], call.expected(b)[1:])
    assert (call.drafts >= CONFIG.vocab_size).any()


def test_trap_22_taps_are_residual_streams_after_the_target_layers():
    """Not before them, and without the final norm after the last (4.2.6)."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(VOCAB, size=(1, 12)), jnp.int32)
    at = jnp.arange(12, dtype=jnp.int32)[None]
    assert drafter().taps == TAPS

    @jax.jit
    def run(model):
        hidden, _, taps = model.hidden_states(tokens, at, taps=drafter().taps)
        before = model.embed(tokens)
        first, _ = model.layers[0](before, at, None, Taps())
        second, _ = model.layers[1](first, at, None, Taps())
        return hidden, taps, (before, first, second, model.norm(second))

    hidden, taps, streams = run(backbone())
    last = jnp.full(1, 11, jnp.int32)
    rows = Rows(at, hidden, taps, jnp.roll(tokens, -1, axis=1), last)
    _, logits, _, _ = compiled()(drafter().init(1, "float32", None), rows)

    def expected(*taps: jax.Array) -> np.ndarray:
        h = np.stack([np.asarray(a[0], float) for a in taps], axis=1)
        return block_logits(enumerate(features(h)), int(tokens[0, 0]), 12)[1:]

    before, first, second, normed = streams
    close(logits[0], expected(first, second))
    for wrong in ((before, first), (first, normed), (second, first)):
        assert differ(logits[0], expected(*wrong))


def test_trap_23_a_block_sees_all_of_itself():
    """The window has one side only: it cuts off old context and no later rows (4.2.4)."""
    assert_not(*long_prompts()[:2], causal=True)


def test_trap_24_rejected_rows_do_not_matter():
    for call, other in zip(long_prompts(), drafting(LENGTHS, rubbish=1), strict=True):
        there = np.array(call.kept) > 0
        np.testing.assert_array_equal(call.logits[there], other.logits[there])


def test_trap_24_features_of_rejected_rows_are_not_committed():
    call = long_prompts()[1]
    taps = [np.asarray(call.rows.taps[name][0, call.kept[0] :], float) for name in TAPS]
    rejected = features(np.stack(taps, axis=1))
    assert len(rejected) == BLOCK - 1
    assert_not(call, context=[*call.context(0), *enumerate(rejected, len(call.context(0)))])


def test_trap_24_positions_are_those_of_the_sequence():
    """A block starts right after what is committed, not after all rows that were run or a position
    off; and context is not counted from where the window begins."""
    call = long_prompts()[1]
    for off in (-1, 1, BLOCK - call.kept[0]):
        assert_not(call, start=len(call.known[0][1]) + off)
    left = [c for _, c in call.context(0)][-WINDOW:]
    assert_not(call, context=list(enumerate(left)))


def test_trap_25_drafts_are_the_first_rows_after_the_anchors():
    """Also if fewer are drawn than a block has; and row r is of position r, not of the next."""
    call, use = long_prompts()[0], drafter(Fewer)
    drafts, logits, _, _ = compiled(Fewer)(use.init(4, "float32", None), call.rows)
    assert drafts.shape == (4, use.tokens)
    for b in range(4):
        block = call.expected(b)
        close(logits[b], block[1:4])
        assert drafts[b].tolist() == block[1:4].argmax(-1).tolist()
        assert differ(logits[b], block[-3:])
        assert differ(logits[b], block[:3])
