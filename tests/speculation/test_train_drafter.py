"""Drafters are trained as they are run, and what is saved of them is a drafter of the backbone."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
from pathlib import Path

import drafter_forward
import drafter_weights
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import train_drafter
from drafter_forward import Scores, Seen, block_rows, context_rings, decoding_rows

import mimo_jax as mj
from mimo_jax import checkpoint
from mimo_jax.config import DFlashConfig, MiMoConfig
from mimo_jax.model.dflash import DFlash
from mimo_jax.model.mtp import MTP
from mimo_jax.model.parameters import parameters
from mimo_jax.quant import FP8Array

WINDOW, BLOCK, MTP_BLOCKS = 24, 4, 2
FIRST_OWN = 20  # of a batch's tokens the first that counts


@functools.cache
def backbone() -> mj.LanguageModel:
    """Two layers of mimo-tiny in float32."""
    return tiny.two_layers(dtype="float32")


def small_drafter() -> DFlashConfig:
    """A drafter of one layer, with a short window and a short block."""
    config = drafter_weights.drafter_config(backbone().config, 4080)
    return dataclasses.replace(config, block_size=BLOCK, sliding_window=WINDOW)


@functools.cache
def modules() -> tuple[MTP, DFlash]:
    """Drafters with float32 parameters, of which none is zero or one."""
    rng = np.random.default_rng(0)

    def make(spec):
        around = 1.0 if spec.init == "ones" else 0.0
        return jnp.asarray(around + 0.2 * rng.standard_normal(spec.shape), jnp.float32)

    return MTP(backbone().config, MTP_BLOCKS, make), DFlash(small_drafter(), make)


@functools.cache
def seen() -> Seen:
    """A batch of random tokens, and what the backbone made of it."""
    tokens = np.random.default_rng(0).integers(4064, size=(2, 60))
    mask = np.broadcast_to(np.arange(60) >= FIRST_OWN, tokens.shape)
    run = jax.jit(lambda m, t, k: drafter_forward.observe(m, t, k, (0, 1), jnp.float32))
    return run(backbone().model, tokens, mask)


@functools.cache
def decoded(anchor: int, slots: int) -> np.ndarray:
    """Logits of a block as decoding computes them."""

    def run(module, model, batch):
        return model.head(decoding_rows(module, model, batch.tokens, batch.taps, anchor, slots))

    return np.asarray(jax.jit(run)(modules()[1], backbone().model, seen()))


# -- the numbers of decoding ----------------------------------------------------------------------


def test_blocks_are_run_as_in_decoding():
    """Of anchors before, at and after the window's width, and with a ring that was overwritten."""
    anchors = jnp.array([[1, 23, 24, 25, 52], [52, 40, 3, 30, 24]])

    @jax.jit
    def run(module, model, batch):
        embedded = model.embed(jnp.take_along_axis(batch.tokens, anchors, axis=1))
        return model.head(block_rows(module, embedded, anchors, context_rings(module, batch.taps)))

    got = np.asarray(run(modules()[1], backbone().model, seen()))
    for anchor in (1, 24, 52):
        expected = decoded(anchor, WINDOW + BLOCK - 1)
        for b, a in np.argwhere(np.asarray(anchors) == anchor):
            np.testing.assert_allclose(got[b, a], expected[b], rtol=1e-4, atol=1e-4)
    assert np.abs(got[0, 0] - got[0, 1]).max() > 0.1


def test_the_loss_of_blocks_is_that_of_decoding():
    """Each block's tokens after its anchor, weighted, those beyond the end left out."""
    batch, gamma = seen(), 3.0

    def run(module, model, batch, key):
        options = {"distill": 0.0, "anchors": 2, "gamma": gamma, "group": 1}
        return drafter_forward.dflash_loss(module, model, batch, key, **options)

    tokens = np.asarray(batch.tokens)
    for seed in range(40):  # until the last anchor possible is among them
        key = jax.random.key(seed)
        anchors, valid = drafter_forward.sample_anchors(key, batch.mask, 2)
        if anchors.max() > 56:
            break
    assert anchors.max() > 56
    assert valid.all()
    loss, logged = jax.jit(run)(modules()[1], backbone().model, batch, key)
    nats, total = 0.0, 0.0
    for (b, _), anchor in np.ndenumerate(np.asarray(anchors)):
        logprobs = jax.nn.log_softmax(decoded(int(anchor), 128)[b])
        for k in range(1, min(BLOCK, 60 - anchor)):
            weight = np.exp(-(k - 1) / gamma)
            nats -= weight * float(logprobs[k, tokens[b, anchor + k]])
            total += weight
    np.testing.assert_allclose(float(loss), nats / total, rtol=1e-4)
    assert logged["match"].shape == (BLOCK - 1,)


def test_the_loss_of_mtp_blocks_is_that_of_decoding():
    """Block k at row j reads token j + k + 1, predicts the one after, and sees the rows before."""
    mtp, batch, model = modules()[0], seen(), backbone().model

    def run(module, model, batch):
        return drafter_forward.mtp_loss(module, model, batch, distill=0.0, group=20)

    loss, _ = jax.jit(run)(mtp, model, batch)
    tokens, nats = np.asarray(batch.tokens), []
    for k, block in enumerate(mtp.layers):
        rows = 60 - k - 2  # those whose token is known
        at = np.broadcast_to(np.arange(rows), (2, rows))
        embedded = model.embed(jnp.asarray(tokens[:, k + 1 : k + 1 + rows]))
        x, _ = jax.jit(lambda block, *a: block(*a, None))(
            block, batch.hidden[:, :rows], embedded, at
        )
        logprobs = np.asarray(jax.nn.log_softmax(model.head(x)))
        for b, j in np.ndindex(2, rows):
            if j + k + 2 >= FIRST_OWN:
                nats.append(-logprobs[b, j, tokens[b, j + k + 2]])
    np.testing.assert_allclose(float(loss), np.mean(nats), rtol=1e-4)


def test_the_backbone_does_not_diverge_from_itself():
    model, batch = backbone().model, seen()
    targets = jnp.roll(batch.tokens, -1, axis=1)
    scores = drafter_forward.score(
        model, model.norm(batch.hidden), batch.hidden, targets, teach=True
    )
    np.testing.assert_allclose(scores.divergence, 0, atol=1e-5)
    other = drafter_forward.score(
        model, -model.norm(batch.hidden), batch.hidden, targets, teach=True
    )
    assert (other.divergence > 0.1).all()
    logits = model.logits(batch.hidden)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    np.testing.assert_allclose(scores.nats, nats, rtol=1e-5)


# -- small parts ----------------------------------------------------------------------------------


def test_anchors_are_different_tokens_that_count_and_are_followed_by_one():
    mask = np.zeros((3, 40), bool)
    mask[0, 10:20] = mask[1, 30:] = mask[2, 7] = True
    drawn = drafter_forward.sample_anchors(jax.random.key(0), jnp.asarray(mask), 12)
    anchors, valid = map(np.asarray, drawn)
    assert valid.sum(axis=1).tolist() == [9, 9, 0]
    assert sorted(anchors[0][valid[0]]) == list(range(10, 19))
    assert sorted(anchors[1][valid[1]]) == list(range(30, 39))
    few, _ = drafter_forward.sample_anchors(jax.random.key(1), jnp.asarray(mask), 100)
    assert few.shape == (3, 40)


def test_groups_change_nothing():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 12, 3)))

    def f(x, y):
        return {"a": x.sum(axis=-1), "b": x * y[..., None]}

    for size in (1, 4, 5, 100):
        got = drafter_forward.in_groups(f, size, x, x[..., 0])
        jax.tree.map(np.testing.assert_allclose, got, f(x, x[..., 0]))


def test_what_is_logged():
    right = np.array([[[1, 1, 0], [0, 1, 1], [1, 0, 1], [1, 1, 1]]], bool)
    counted = np.array([[[1, 1, 1], [1, 1, 1], [1, 1, 0], [0, 0, 0]]], bool)
    nats = np.array([[[1.0, 2, 3], [1, 2, 3], [1, 2, 99], [99, 99, 99]]])
    weights = jnp.array([1, 0.5, 0.25])
    scores = Scores(*map(jnp.asarray, (nats, 2 * nats, right)))
    loss, logged = drafter_forward.summary(scores, jnp.asarray(counted), weights, 0.5)
    expected = (3 * 1 + 3 * 0.5 * 2 + 2 * 0.25 * 3) / (3 + 1.5 + 0.5)
    np.testing.assert_allclose(logged["nats"], expected)
    np.testing.assert_allclose(loss, 1.5 * expected)
    np.testing.assert_allclose(logged["match"], [2 / 3, 2 / 3, 1 / 2])
    np.testing.assert_allclose(logged["length"], 1 + (2 + 0) / 2)


@pytest.mark.parametrize(
    ("preset", "differs"),
    [
        ("MiMo-V2.6-Flash-RL", set()),
        ("MiMo-V2.6-Pro-RL", set()),
        (
            "MiMo-V2.5-Pro-FP4-DFlash",
            {"vocab_size", "max_position_embeddings", "backbone_rotary_base"},
        ),
    ],
)
def test_drafters_have_the_sizes_of_the_releases(preset, differs):
    published = DFlashConfig.from_pretrained(preset)
    config = MiMoConfig.from_pretrained(preset)
    derived = drafter_weights.drafter_config(config, published.mask_token_id)
    assert {
        f.name
        for f in dataclasses.fields(derived)
        if f.name != "extra" and getattr(derived, f.name) != getattr(published, f.name)
    } == differs


def test_a_drafter_config_of_another_backbone_is_refused(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**small_drafter().to_dict(), "hidden_size": 512}))
    with pytest.raises(ValueError, match=r"\(512, 2\); the backbone's are \(256, 2\)"):
        drafter_weights.dflash_part(backbone(), file)


def test_tokens_of_another_vocabulary_are_refused(tmp_path):
    np.save(tmp_path / "tokens.npy", np.full(100, 5000))
    with pytest.raises(ValueError, match="has token 5000, the model only 4096"):
        train_drafter.read_stream(tmp_path / "tokens.npy", backbone(), 10)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_optimizers_move_what_they_are_given(kind):
    part = drafter_weights.mtp_part(backbone(), 1)
    tx = drafter_weights.optimizer(kind, part.specs, 1e-3, 10, 0.1)
    weights = jax.eval_shape(part.initial, jax.random.key(0))

    def update(weights):
        return tx.update(weights, tx.init(weights), weights)[0]

    assert jax.tree.map(jnp.shape, jax.eval_shape(update, weights)) == jax.tree.map(
        jnp.shape, weights
    )


# -- from prompts to a checkpoint -----------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> types.SimpleNamespace:
    """Both drafters trained for a moment on two greedy continuations of a two-layer model."""
    at: Path = tmp_path_factory.mktemp("drafter")
    mj.save_pretrained(tiny.two_layers(), at / "backbone")
    checkpoint.copy_tokenizer(tiny.FOLDER, at / "backbone")
    source, exact = mj.load(at / "backbone"), mj.load(at / "backbone", dtype="float32")
    np.save(at / "tokens.npy", np.random.default_rng(0).integers(4064, size=500).astype(np.uint16))
    (at / "small.json").write_text(json.dumps(small_drafter().to_dict()))
    text = at / "text.npz"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mj, "load", lambda *_, **__: exact)
        train_drafter.main(
            f"generate --data {at / 'tokens.npy'} --out {text} --prompts 2 --prompt-len 10 14 "
            "--length 40 --temperature 0 --batch 2".split()
        )
        patched.setattr(mj, "load", lambda *_, **__: source)
        train_drafter.main(
            f"train --continuations {text} --out {at / 'trained'} --steps 100 --batch 2 "
            f"--optimizer adamw --lr 4e-3 --compute float32 --mtp-blocks {MTP_BLOCKS} --anchors 16 "
            f"--drafter-config {at / 'small.json'} --log {at / 'log.json'} --log-every 25".split()
        )
    with np.load(text) as file:
        tokens, mask = file["tokens"], file["mask"]
    return types.SimpleNamespace(
        folder=at / "trained",
        source=source,
        exact=exact,
        tokens=tokens,
        mask=mask,
        prompts=[row[:n].tolist() for row, n in zip(tokens, mask.argmax(axis=1), strict=True)],
        curve=json.loads((at / "log.json").read_text())["curve"],
        lm=mj.load(at / "trained", dtype="float32"),
    )


def test_continuations_are_the_backbones_own(run):
    params = [mj.SamplingParams(temperature=0.0, max_tokens=40 - len(p)) for p in run.prompts]
    own = run.exact.generate(run.prompts, params, max_len=40)
    for prompt, row, mask, out in zip(run.prompts, run.tokens, run.mask, own, strict=True):
        assert 10 <= len(prompt) <= 14
        assert row[mask].tolist() == out.token_ids
        assert not mask[len(prompt) + len(out.token_ids) :].any()


@pytest.mark.parametrize("name", ["mtp", "dflash"])
def test_the_loss_falls(run, name):
    assert [point["step"] for point in run.curve] == [25, 50, 75, 100]
    losses = [point[name]["loss"] for point in run.curve]
    assert losses[:3] == sorted(losses[:3], reverse=True)
    assert losses[-1] < 0.1 * losses[0]


def test_the_checkpoint_is_whole_and_the_backbone_as_it_was(run):
    assert "no problems found" in str(checkpoint.inspect(run.folder))
    saved = checkpoint.load(run.folder)
    before = {p.spec.name: p.get_value() for _, p in parameters(run.source.model)}
    after = {p.spec.name: p.get_value() for _, p in parameters(saved.model)}
    assert before.keys() == after.keys()
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert saved.mtp is not None
    assert len(saved.mtp.layers) == MTP_BLOCKS
    assert isinstance(saved.mtp.layers[0].mlp.gate_proj.get_value(), FP8Array)
    assert saved.mtp.layers[0].eh_proj[...].dtype == jnp.bfloat16
    assert saved.drafter is not None
    assert saved.drafter.config.to_dict() == small_drafter().to_dict()
    assert (run.folder / "dflash" / "mask_embedding.pt").is_file()


@pytest.mark.parametrize("name", ["mtp", "dflash"])
def test_speculation_gives_the_plain_tokens_in_fewer_rounds(run, name):
    decoder, prompts = train_drafter.speculating(run.lm)[name], run.prompts
    params = [mj.SamplingParams(temperature=0.0, max_tokens=24)] * 2
    rows = np.concatenate([b.tokens for b in decoder.blocks(prompts, params, [0, 0])], axis=1)
    for row, text, own in zip(rows, run.tokens, run.mask, strict=True):
        assert row[row >= 0].tolist() == text[own].tolist()[:24]  # what plain decoding has given
    found = train_drafter.acceptance(decoder, prompts, 0.0, 24, 2)
    # It has learnt these by heart.
    most = decoder.drafter.tokens
    assert found["acceptance_length"] > 1 + 0.8 * most
    assert len(found["accepted_by_position"]) == most


def test_evaluation_of_a_checkpoint(run, tmp_path, monkeypatch):
    monkeypatch.setattr(mj, "load", lambda *_, **__: run.lm)
    np.save(tmp_path / "tokens.npy", run.tokens.reshape(-1))
    train_drafter.main(
        f"evaluate --data {tmp_path / 'tokens.npy'} --prompts 2 --prompt-len 12 --tokens 8 "
        f"--temperature 1 --out {tmp_path / 'out.json'}".split()
    )
    results = json.loads((tmp_path / "out.json").read_text())
    for name, n in (("mtp", MTP_BLOCKS), ("dflash", BLOCK - 1)):
        (found,) = results[name]
        assert found["temperature"] == 1
        assert len(found["accepted_by_position"]) == n
        assert 1 <= found["acceptance_length"] <= n + 1


def test_files_of_something_else(tmp_path):
    (tmp_path / "text").write_text("no numbers")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.save(tmp_path / "ids.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"text is no \.npy file of numbers"):
        train_drafter.read_stream(tmp_path / "text", backbone(), 1)
    for name in ("text", "other.npz", "ids.npy"):
        with pytest.raises(ValueError, match=rf"{name} is not what generate writes"):
            train_drafter.read_continuations(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        train_drafter.read_continuations(tmp_path / "none")
