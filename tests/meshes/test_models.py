"""What runs on one device runs on a mesh and gives the same numbers, however the mesh splits it."""

import dataclasses
import functools
import itertools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.decoding.autoregressive import Decoder
from mimo_jax.decoding.sampling import SamplingParams
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.cache import init_cache
from mimo_jax.model.parameters import Format, ParamSpec, parameters
from mimo_jax.model.placement import Placement
from sharding.mesh import make_mesh
from sharding.rules import PRESETS, ShardingError
from sharding.types import put, replicated

VOCAB, ROWS, PROMPT, LENGTH = 64, 8, 16, 26
# Eight query heads on two KV heads (a full layer) and four (a sliding one); eight experts.
CASE = golden.tiny(
    sliding_window=5,
    max_position_embeddings=1024,
    num_attention_heads=8,
    swa_num_attention_heads=8,
    num_key_value_heads=2,
    swa_num_key_value_heads=4,
    n_routed_experts=8,
)
SHAPES = [s for s in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(s) == 8]


@functools.cache
def model() -> MiMo:
    return golden.build(CASE)


@functools.cache
def placement(mesh: str, rules: str) -> Placement:
    held: list[tuple[ParamSpec, Format]] = [(p.spec, "plain") for _, p in parameters(model())]
    return Placement.fit(make_mesh(mesh), rules, held)


def layouts() -> list:
    """Every mesh shape of eight devices with every preset that does something else on it."""
    found, params = set(), []
    for shape, rules in itertools.product(SHAPES, PRESETS):
        mesh = ",".join(f"{a}={n}" for a, n in zip(("data", "expert", "tensor"), shape) if n > 1)
        fitted = placement(mesh, rules).rules
        if rules != "single" and (mesh, fitted) not in found:
            found.add((mesh, fitted))
            params.append(pytest.param(mesh, rules, id=f"{mesh}-{rules}"))
    return params


@functools.cache
def tokens() -> np.ndarray:
    ids = np.random.default_rng(0).integers(0, VOCAB, (ROWS, PROMPT), np.int32)
    return np.asarray(ids)


def rows(where: Placement | None, array: np.ndarray) -> jax.Array:
    """An array of a batch's rows, split as the rules say."""
    if where is None:
        return jnp.asarray(array)
    return put(array, where.mesh, *where.rules.spec(["batch"]))


def greedy(m: MiMo, where: Placement | None) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, LENGTH, V] and the tokens [B, LENGTH + 1] of a cached greedy run."""
    cache = init_cache(m.config, ROWS, 32, placement=where)
    ids, logits = [tokens()], []
    for start in (0, *range(PROMPT, LENGTH)):
        new = ids[-1]
        at = np.broadcast_to(start + np.arange(new.shape[1], dtype=np.int32), new.shape)
        out, cache = golden.step(m, rows(where, new), rows(where, at), cache)
        logits.append(np.asarray(out))
        ids.append(logits[-1][:, -1:].argmax(-1).astype(np.int32))
    return np.concatenate(logits, 1), np.concatenate(ids, 1)


@functools.cache
def on_one_device() -> tuple[np.ndarray, np.ndarray]:
    return greedy(model(), None)


def assert_same(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize(("mesh", "rules"), layouts())
def test_logits_and_tokens_equal_those_of_one_device(mesh, rules):
    """Prefill and ten cached steps, ring and full cache, every row at once.

    Without a cache on meshes with all three axes, for each of the presets: attention differs there,
    and it is split by heads and rows alone.
    """
    where = placement(mesh, rules)
    logits, ids = on_one_device()
    m = where.place(model())
    with jax.set_mesh(where.mesh):
        got_logits, got_ids = greedy(m, where)
        if mesh.count("=") == 3:
            full = golden.step(m, rows(where, ids[:, :LENGTH]), None, None)[0]
            assert_same(np.asarray(full), logits)
    assert_same(got_logits, logits)
    np.testing.assert_array_equal(got_ids, ids)


@pytest.mark.parametrize(
    ("mesh", "rules"),
    [("tensor=2", "latency"), ("data=2,expert=2,tensor=2", "throughput"), ("expert=8", "latency")],
)
def test_weights_are_split_and_logits_stay_so(mesh, rules):
    where = placement(mesh, rules)
    m = where.place(model())
    ways = {
        spec.name: len({s.index for s in p[...].addressable_shards})
        for _, p in parameters(m)
        for spec in [p.spec]
    }
    split = {name for name, n in ways.items() if n > 1}
    assert any("experts" in name for name in split)
    assert not any("norm" in name for name in split)
    with jax.set_mesh(where.mesh):
        cache = init_cache(m.config, ROWS, 32, placement=where)
        step = jax.eval_shape(m, rows(where, tokens()), None, cache)
    assert step[0].sharding.spec[2] == where.rules.spec(["vocab"])[0]
    assert step[1].layers[0].k.sharding.spec == where.rules.spec(["batch", None, "kv_heads", None])


SAMPLED = [
    SamplingParams(max_tokens=20, temperature=0.0),
    SamplingParams(max_tokens=20, temperature=0.8, top_p=0.9),
    SamplingParams(max_tokens=20, temperature=1.0, top_k=5, min_p=0.01),
]


def drawn(m: MiMo, where: Placement | None, top: int | None):
    use = Decoder(m, valid_vocabulary=60, eos_ids=(3,), placement=where)
    params = [dataclasses.replace(p, logprobs=top) for p in SAMPLED]
    prompts = [[1, 2, 3, 4, 5], [7, 8], [9] * 40]
    blocks = list(use.blocks(prompts, params, [1, 2, 3]))
    logprobs = [b.logprobs.chosen[:3] for b in blocks if b.logprobs is not None]
    return np.concatenate([b.tokens for b in blocks], 1), logprobs


@functools.cache
def drawn_on_one_device():
    return drawn(model(), None, 2)


@pytest.mark.parametrize(
    ("mesh", "rules"), [("tensor=4", "latency"), ("data=2,expert=2,tensor=2", "throughput")]
)
def test_sampled_tokens_and_logprobs_equal_those_of_one_device(mesh, rules):
    """Three rows on a mesh whose batch is split in up to four: greedy, top-p and top-k rows."""
    where = placement(mesh, rules)
    tokens, logprobs = drawn_on_one_device()
    got, got_logprobs = drawn(where.place(model()), where, 2)
    np.testing.assert_array_equal(got, tokens)
    for a, b in zip(got_logprobs, logprobs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_greedy_decoding_never_brings_the_vocabulary_together():
    """No array of a decoding step has all logits of a row, but for those of drawing at random."""
    where = placement("tensor=4", "latency")
    m = where.place(model())
    with jax.set_mesh(where.mesh):
        best = jax.jit(lambda h: replicated(jnp.argmax(m.logits(h), -1)))
        text = best.lower(put(np.zeros((1, 32), np.float32), where.mesh)).compile().as_text() or ""
    assert f"f32[1,{VOCAB}]" not in text
    assert f"f32[1,{VOCAB // 4}]" in text


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(ShardingError, match="cache: batch has 3 indivisible parts, which data=8"):
        init_cache(model().config, 3, 32, placement=placement("data=8", "latency"))


def test_placing_leaves_the_given_module_alone():
    where = placement("tensor=2", "latency")
    m = model()
    placed = where.place(m)
    assert len(m.lm_head[...].sharding.device_set) == 1
    assert len(placed.lm_head[...].sharding.device_set) == 2
