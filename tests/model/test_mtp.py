"""The MTP blocks, and drafting with them, against MODEL_SPEC 3 written out in float64."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import recipe

from mimo_jax.config import MiMoConfig
from mimo_jax.decoding.drafters import MTPDrafter, Rows
from mimo_jax.model.cache import RING_SLACK
from mimo_jax.model.mtp import MTP

BLOCKS, VOCAB, D, MLP_WIDTH = 3, 64, 32, 96
HEADS, KV_HEADS, HEAD, VALUE, ROTARY = 4, 2, 24, 16, 8
WINDOW, THETA, VALUE_SCALE, EPS = 8, 1e4, 0.707, 1e-5
DONE = -1
# The first is longer than the window, and the rounds cross the end of its ring.
LENGTHS = (WINDOW + RING_SLACK - 5, 9, 2, 1)
# Proposals that are kept of each row in successive rounds; the last row ends before the others.
ROUNDS = (
    (0, 3, 1, 2),
    (3, 0, 0, 1),
    (0, 0, 3, 3),
    (3, 3, 0, 0),
    (1, 3, 2, DONE),
    (2, 1, 3, DONE),
    (3, 0, 0, DONE),
)


# -- MODEL_SPEC 3, a row at a time ----------------------------------------------------------------


@functools.cache
def weights() -> dict[str, np.ndarray]:
    """The tensors of MODEL_SPEC 3.2 with the projections apart; norms and sinks are random too."""
    rng = np.random.default_rng(3)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return gain / np.sqrt(columns) * rng.standard_normal((rows, columns))

    tensors = {}
    for k in range(BLOCKS):
        block = {
            "eh_proj.weight": matrix(D, 2 * D),
            "self_attn.q_proj.weight": matrix(HEADS * HEAD, D, 1.5),
            "self_attn.k_proj.weight": matrix(KV_HEADS * HEAD, D, 1.5),
            "self_attn.v_proj.weight": matrix(KV_HEADS * VALUE, D),
            "self_attn.o_proj.weight": matrix(D, HEADS * VALUE),
            "self_attn.attention_sink_bias": 1.5 * rng.standard_normal(HEADS),
            "mlp.gate_proj.weight": matrix(MLP_WIDTH, D),
            "mlp.up_proj.weight": matrix(MLP_WIDTH, D),
            "mlp.down_proj.weight": matrix(D, MLP_WIDTH),
        }
        for norm in ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm"):
            block[f"{norm}.weight"] = rng.uniform(0.5, 1.5, D)
        tensors |= {f"model.mtp.layers.{k}.{name}": value for name, value in block.items()}
    return {name: value.astype(np.float32).astype(float) for name, value in tensors.items()}


@functools.cache
def tables() -> tuple[np.ndarray, np.ndarray]:
    """The backbone's embedding and head."""
    w = recipe.make_weights(golden.tiny())
    return w["model.embed_tokens.weight"].astype(float), w["lm_head.weight"].astype(float)


@functools.cache
def of_block(k: int) -> dict[str, np.ndarray]:
    """A block's tensors by the part of the name that tells them apart."""
    prefix = f"model.mtp.layers.{k}."
    of = {name: a for name, a in weights().items() if name.startswith(prefix)}
    return {name.removesuffix(".weight").split(".")[-1]: a for name, a in of.items()}


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x) + EPS) * weight


def rotated(head: np.ndarray, position: int, rotary: int) -> np.ndarray:
    """Dimensions i and i + rotary / 2 are a complex number, which is turned."""
    half = rotary // 2
    angles = position * THETA ** (-2 * np.arange(half) / rotary)
    turned = (head[:half] + 1j * head[half:rotary]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag, head[rotary:]])


def block_rows(
    k: int,
    hidden: np.ndarray,
    embedded: np.ndarray,
    *,
    window: int = WINDOW,
    hidden_first: bool = False,
    rotary: int = ROTARY,
    value_scale: float = VALUE_SCALE,
    sinks: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Block k over rows 0, 1, ...: what the head is given, and the stream before the last norm."""
    w = of_block(k)
    keys, values, streams = [], [], []
    for j, (h, e) in enumerate(zip(hidden, embedded, strict=True)):
        pair = [rms(e, w["enorm"]), rms(h, w["hnorm"])]
        x = w["eh_proj"] @ np.concatenate(pair[::-1] if hidden_first else pair)

        n = rms(x, w["input_layernorm"])
        queries = (w["q_proj"] @ n).reshape(HEADS, HEAD)
        projected = (w["k_proj"] @ n).reshape(KV_HEADS, HEAD)
        keys.append([rotated(head, j, rotary) for head in projected])
        values.append(value_scale * (w["v_proj"] @ n).reshape(KV_HEADS, VALUE))
        heads = []
        for i, query in enumerate(queries):
            kv, query = i // (HEADS // KV_HEADS), rotated(query, j, rotary)
            seen = range(max(0, j - window + 1), j + 1)
            shares = np.exp(np.stack([keys[row][kv] for row in seen]) @ query / np.sqrt(HEAD))
            sink = np.exp(w["attention_sink_bias"][i]) if sinks else 0.0
            value = shares @ np.stack([values[row][kv] for row in seen])
            heads.append(value / (shares.sum() + sink))
        x = x + w["o_proj"] @ np.concatenate(heads)

        n = rms(x, w["pre_mlp_layernorm"])
        gate = w["gate_proj"] @ n
        x = x + w["down_proj"] @ (gate / (1 + np.exp(-gate)) * (w["up_proj"] @ n))
        streams.append(x)
    return np.stack([rms(x, w["final_layernorm"]) for x in streams]), np.stack(streams)


def proposals(
    tokens: Sequence[int], hidden: np.ndarray, *, chained: str = "", **changes: Any
) -> tuple[np.ndarray, list[int]]:
    """Logits of, and tokens after, tokens 0..p+1 with hidden states 0..p (3.3, 3.4).

    `chained` is "stream" or "normed" for blocks that read what the one before them has made.
    """
    table, head = tables()
    known, logits = list(tokens), []
    for k in range(BLOCKS):
        embedded = np.stack([table[known[j + k + 1]] for j in range(len(hidden))])
        normed, streams = block_rows(k, hidden, embedded, **changes)
        logits.append(head @ normed[-1])
        known.append(int(logits[-1].argmax()))
        if chained:
            hidden = {"stream": streams, "normed": normed}[chained]
    return np.stack(logits), known[-BLOCKS:]


# -- the code -------------------------------------------------------------------------------------


@functools.cache
def drafter(window: int = WINDOW) -> MTPDrafter:
    config = MiMoConfig.from_dict({**golden.tiny(sliding_window=window).config, "dtype": "float32"})
    used = set[str]()
    module = MTP(config, BLOCKS, golden.make_from(weights(), "float32", used))
    assert used == set(weights())
    return MTPDrafter(module, config)


@functools.cache
def compiled(window: int) -> Any:
    """`draft` with the most probable tokens, and the logits and positions that they came from."""
    use, model = drafter(window), golden.build(golden.tiny())

    def draft(module, model, state, rows):
        seen = []

        def greedy(logits, positions):
            seen.append((logits, positions))
            return logits.argmax(-1).astype(jnp.int32)

        drafts, state = use.draft(module, model, state, rows, greedy)
        logits, positions = (jnp.concatenate(each, axis=1) for each in zip(*seen, strict=True))
        return drafts, logits, positions, state

    return functools.partial(jax.jit(draft), use.module, model)


def batch(known: Any, kept: Sequence[int], width: int, *, padded: bool, rubbish: Any) -> Rows:
    """The newest `kept` of the known rows; after them padding, or rows that were rejected."""
    positions = np.full((len(known), width), -1, np.int32)
    hidden = 100 * rubbish.standard_normal((len(known), width, D))
    following = rubbish.integers(VOCAB, size=(len(known), width))
    for b, ((tokens, states), n) in enumerate(zip(known, kept, strict=True)):
        ran = n if padded or n == 0 else width
        positions[b, :ran] = len(states) - n + np.arange(ran)
        hidden[b, :n] = states[len(states) - n :]
        following[b, :n] = tokens[len(tokens) - n :]
    last = jnp.asarray(np.maximum(np.array(kept) - 1, 0), jnp.int32)
    floats = jnp.asarray(hidden, jnp.float32)
    return Rows(jnp.asarray(positions), floats, {}, jnp.asarray(following, jnp.int32), last)


@dataclasses.dataclass
class Drafted:
    """A call of `draft`: what was known of each row, how much of it was new, what it made."""

    known: list[tuple[list[int], np.ndarray]]
    kept: list[int]
    drafts: np.ndarray
    logits: np.ndarray
    positions: np.ndarray


def drafting(
    lengths: Sequence[int], *, window: int, width: int = 4, rubbish: int = 0, forget: bool = False
) -> list[Drafted]:
    """Drafts after prompts and after each round of `width` rows.

    `rubbish` seeds what stands at invalid rows.  With `forget`, no rows are run again.
    """
    rng, noise = np.random.default_rng(1), np.random.default_rng(rubbish)

    def states(n: int) -> np.ndarray:
        return rng.standard_normal((n, D)).astype(np.float32)

    known = [(rng.integers(VOCAB, size=n + 1).tolist(), states(n)) for n in lengths]
    kept, state, calls = list(lengths), drafter(window).init(len(lengths), "float32", None), []
    for accepted in ((), *ROUNDS):
        if accepted:
            kept = [min(a + 1, width) for a in accepted]
            for b, n in enumerate(kept):
                if n:
                    new = [*calls[-1].drafts[b, : n - 1].tolist(), int(rng.integers(VOCAB))]
                    known[b] = (known[b][0] + new, np.concatenate([known[b][1], states(n)]))
        t = width if accepted else max(lengths)
        rows = batch(known, kept, t, padded=not accepted, rubbish=noise)
        if forget:
            state = dataclasses.replace(state, positions=jnp.full_like(state.positions, -1))
        drafts, logits, positions, state = compiled(window)(state, rows)
        arrays = (np.asarray(a) for a in (drafts, logits, positions))
        calls.append(Drafted(list(known), kept, *arrays))
    return calls


@functools.cache
def long_prompts() -> list[Drafted]:
    return drafting(LENGTHS, window=WINDOW)


def close(got: Any, expected: Any) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def differ(got: Any, expected: Any) -> bool:
    """By a thousand times what `close` allows."""
    return bool(np.abs(got - np.asarray(expected)).max() > 1e-2 * np.abs(expected).max())


# -- tests ----------------------------------------------------------------------------------------


@functools.cache
def block_inputs() -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.random.default_rng(0).standard_normal((2, 3, 30, D)).astype(np.float32))


@functools.cache
def block_outputs(k: int = 0) -> np.ndarray:
    """Of three rows of 30, 17 and 1 tokens, with padding on the right."""
    hidden, embedded = (jnp.asarray(a) for a in block_inputs())
    at = np.where(np.arange(30) < np.array([[30], [17], [1]]), np.arange(30), -1)
    run = jax.jit(lambda block, *rows: block(*rows, None))
    out, cache = run(drafter().module.layers[k], hidden, embedded, jnp.asarray(at, jnp.int32))
    assert cache is None
    return np.asarray(out)


@pytest.mark.parametrize("k", range(BLOCKS))
def test_block_over_whole_rows(k):
    for b, length in enumerate((30, 17, 1)):
        hidden, embedded = (a[b, :length] for a in block_inputs())
        close(block_outputs(k)[b, :length], block_rows(k, hidden, embedded)[0])


@pytest.mark.parametrize(
    "change",
    [{"rotary": HEAD}, {"value_scale": 1.0}, {"sinks": False}, {"window": 7}, {"window": 9}],
    ids=str,
)
def test_what_a_sliding_layer_has_counts(change):
    hidden, embedded = (a[0] for a in block_inputs())
    assert differ(block_outputs()[0], block_rows(0, hidden, embedded, **change)[0])


def test_embedding_comes_first_and_hidden_second():
    """In what eh_proj multiplies (3.3); and each has its own norm."""
    hidden, embedded = (a[0] for a in block_inputs())
    close(block_outputs()[0], block_rows(0, hidden, embedded)[0])
    assert differ(block_outputs()[0], block_rows(0, hidden, embedded, hidden_first=True)[0])
    assert differ(block_outputs()[0], block_rows(0, embedded, hidden, hidden_first=True)[0])


def assert_drafts(calls: list[Drafted], window: int) -> None:
    assert len(calls) == 1 + len(ROUNDS)
    for call in calls:
        for b, n in enumerate(call.kept):
            if n:
                logits, tokens = proposals(*call.known[b], window=window)
                close(call.logits[b], logits)
                assert call.drafts[b].tolist() == tokens
                first = len(call.known[b][0])
                assert call.positions[b].tolist() == [first, first + 1, first + 2]
    assert len(np.unique(calls[0].drafts)) > 3  # a constant would agree with much


def test_drafts_after_a_prompt_longer_than_the_window():
    assert_drafts(long_prompts(), WINDOW)
    ends = [len(call.known[0][1]) for call in long_prompts()]
    assert ends[0] < WINDOW + RING_SLACK < ends[-1] - WINDOW


@pytest.mark.parametrize(
    ("window", "lengths"),
    [(WINDOW, (5, 3, 2, 1)), (24, (20, 7, 1, 3)), (24, (40, 24, 23, 1))],
    ids=str,
)
def test_drafts_after_a_prompt(window, lengths):
    """Shorter than the window; with more rows than decoding looks at the ring with; longer."""
    assert_drafts(drafting(lengths, window=window), window)


def test_drafts_if_few_of_them_are_verified():
    """Rounds of two rows, fewer than the blocks have to run again."""
    assert_drafts(drafting((9, 5, 2, 1), window=WINDOW, width=2), WINDOW)


def test_rejected_rows_and_padding_do_not_matter():
    others = drafting(LENGTHS, window=WINDOW, rubbish=1)
    for call, other in zip(long_prompts(), others, strict=True):
        there = np.array(call.kept) > 0
        np.testing.assert_array_equal(call.logits[there], other.logits[there])


def test_rows_whose_token_was_a_proposal_are_run_again():
    """Block k reads the token k + 1 positions on: of its last k rows it changes (3.4)."""
    call = drafting(LENGTHS, window=WINDOW, forget=True)[1]
    assert call.kept[0] == 1
    logits, _ = proposals(*call.known[0])
    close(call.logits[0, 0], logits[0])
    assert differ(call.logits[0, 1], logits[1])
    assert differ(call.logits[0, 2], logits[2])


@pytest.mark.parametrize("chained", ["stream", "normed"])
def test_trap_18_every_block_gets_the_backbones_hidden_states(chained):
    """Not what the block before it has made, before or after its last norm (3.3)."""
    for call in long_prompts()[:2]:
        for b in range(len(call.known)):
            close(call.logits[b], proposals(*call.known[b])[0])
            logits, _ = proposals(*call.known[b], chained=chained)
            close(call.logits[b, 0], logits[0])
            assert differ(call.logits[b, 1:], logits[1:])
