"""Speculative decoding on meshes: the tokens of one device, with MTP blocks and with a drafter."""

import dataclasses
import functools
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding.speculating import DRAFTER, generated

from mimo_jax.decoding.autoregressive import Decoder
from mimo_jax.decoding.drafters import DFlashDrafter, MTPDrafter, Rows
from mimo_jax.decoding.sampling import SamplingParams
from mimo_jax.decoding.slots import Piece, Slots
from mimo_jax.decoding.speculative import SpeculativeDecoder
from mimo_jax.decoding.state import Block
from mimo_jax.model.dflash import DFlash
from mimo_jax.model.mtp import MTP
from mimo_jax.model.parameters import Format, ParamSpec, parameters, random_init
from mimo_jax.model.placement import Placement
from sharding.mesh import make_mesh, use
from sharding.types import put, replicated

VOCAB = 6  # ids that may be produced, so that a few guesses are right
CASE = golden.tiny(
    sliding_window=5,
    num_attention_heads=8,
    swa_num_attention_heads=8,
    num_key_value_heads=2,
    swa_num_key_value_heads=4,
)
PROMPTS = [[1, 2, 3, 4, 5], [7, 8], [9] * 40, [60]]
PARAMS = [
    SamplingParams(max_tokens=18, temperature=0.0),
    SamplingParams(max_tokens=18, temperature=0.8, top_p=0.9),
    SamplingParams(max_tokens=7, temperature=1.0, top_k=5),
    SamplingParams(max_tokens=18, temperature=1.0),
]


@functools.cache
def modules() -> tuple[Any, Any, Any]:
    """Backbone, MTP blocks and drafter."""
    model, make = golden.build(CASE), random_init(jax.random.key(5), "float32")
    config = dataclasses.replace(DRAFTER, num_attention_heads=8, num_key_value_heads=2)
    return model, MTP(model.config, 3, make), DFlash(config, make)


@functools.cache
def on_one_device() -> list[list[int]]:
    """What plain decoding gives."""
    decoder = Decoder(modules()[0], valid_vocabulary=VOCAB, eos_ids=())
    return generated(decoder, PROMPTS, PARAMS)[0]


def proposals(name: str, where: Placement | None) -> tuple[np.ndarray, np.ndarray]:
    """Logits [n, B, V] and tokens of a drafter after a prompt of random hidden states."""
    model, drafter = drafted(name, where)
    rng = np.random.default_rng(1)
    batch, length = 4, 12
    last = np.array([11, 3, 0, 7], np.int32)
    positions = np.where(np.arange(length) <= last[:, None], np.arange(length), -1)
    hidden = [rng.standard_normal((batch, length, 32), np.float32) for _ in range(3)]
    run = Rows(
        jnp.asarray(positions, jnp.int32),
        jnp.asarray(hidden[0]),
        {n: jnp.asarray(a) for n, a in zip(drafter.taps, hidden[1:], strict=False)},
        jnp.asarray(rng.integers(64, size=(batch, length)), jnp.int32),
        jnp.asarray(last),
    )
    if where is not None:
        run = put(run, where.mesh, *where.rules.spec(["batch"]))
    state = drafter.init(batch, "float32", where)

    @jax.jit
    def draft(module: Any, model: Any, state: Any, run: Rows) -> Any:
        seen = []

        def choose(logits: Any, _: Any) -> Any:
            seen.append(replicated(logits))
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)

        drafts, _ = drafter.draft(module, model, state, run, choose)
        return jnp.concatenate(seen, axis=1), replicated(drafts)

    with use(where and where.mesh):
        logits, drafts = draft(drafter.module, model, state, run)
        return np.asarray(logits), np.asarray(drafts)


def drafted(name: str, where: Placement | None) -> tuple[Any, Any]:
    """The backbone and one of its drafters, on a mesh or one device."""
    model, mtp, dflash = (m if where is None else where.place(m) for m in modules())
    return model, MTPDrafter(mtp, model.config) if name == "mtp" else DFlashDrafter(dflash)


@pytest.mark.parametrize("name", ["mtp", "dflash"])
@pytest.mark.parametrize(
    ("mesh", "rules"),
    [
        ("tensor=4", "latency"),
        ("data=2,tensor=2", "latency"),
        ("data=2,expert=2,tensor=2", "throughput"),
    ],
)
def test_proposals_and_tokens_are_those_of_one_device(mesh, rules, name):
    held: list[tuple[ParamSpec, Format]] = [
        (p.spec, "plain") for m in modules() for _, p in parameters(m)
    ]
    where = Placement.fit(make_mesh(mesh), rules, held)
    logits, drafts = proposals(name, None)
    got_logits, got_drafts = proposals(name, where)
    np.testing.assert_allclose(got_logits, logits, atol=1e-5 * np.abs(logits).max())
    np.testing.assert_array_equal(got_drafts, drafts)

    model, drafter = drafted(name, where)
    decoder = SpeculativeDecoder(
        model, drafter, valid_vocabulary=VOCAB, eos_ids=(), placement=where
    )
    assert generated(decoder, PROMPTS, PARAMS)[0] == on_one_device()


@pytest.mark.parametrize("name", ["mtp", "dflash"])
@pytest.mark.parametrize(
    ("mesh", "rules"),
    [("tensor=4", "latency"), ("data=2,expert=2,tensor=2", "throughput")],
)
def test_rows_that_come_and_go_produce_what_they_do_on_one_device(mesh, rules, name):
    """Two at a time in four slots, so that rows that devices share out are taken again."""
    held: list[tuple[ParamSpec, Format]] = [
        (p.spec, "plain") for m in modules() for _, p in parameters(m)
    ]
    where = Placement.fit(make_mesh(mesh), rules, held)
    model, drafter = drafted(name, where)
    decoder = SpeculativeDecoder(
        model, drafter, valid_vocabulary=VOCAB, eos_ids=(), placement=where
    )
    batch = Slots(decoder, slots=4, lanes=4, max_len=64)
    tokens: list[list[int]] = []
    for first, places in ((0, (3, 0)), (2, (1, 3))):
        for i, place in zip((first, first + 1), places, strict=True):
            ids = PROMPTS[i]
            for begin in range(0, len(ids) - 1, 16):
                part = ids[begin : min(begin + 16, len(ids) - 1)]
                batch.read([Piece(place, begin, part, ids[begin + len(part)])], 16)
            batch.restore(1, batch.snapshot(place))
            budget = PARAMS[i].max_tokens
            batch.insert(place, 1, (ids[-1], len(ids) - 1), PARAMS[i], i, budget)
        found: dict[int, list[int]] = {place: [] for place in places}
        for _ in range(3):
            block = Block.of(jax.device_get(batch.decode()))
            for place in places:
                found[place] += [t for t in block.tokens[place].tolist() if t >= 0]
        tokens += found.values()
    assert tokens == on_one_device()
