"""Speculation as people call it: `generate(speculative=)`, its metrics, and the command line."""

import dataclasses
import json

import batch_generate
import numpy as np
import pytest
from checkpoint.release_format import make_release
from typer.testing import CliRunner

import mimo_jax as mj
from mimo_jax import cli
from mimo_jax.decoding import draft_width
from mimo_jax.decoding.draft_width import AdaptiveWidth, by_position, widths
from mimo_jax.decoding.outputs import Metrics

pytestmark = pytest.mark.filterwarnings("ignore::mimo_jax.AcceptanceWarning")

GREEDY = mj.SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
PROMPTS = [[1, 5, 9, 30], [7], list(range(3, 28))]


@pytest.fixture(scope="module")
def lm(tmp_path_factory) -> mj.LanguageModel:
    """A checkpoint in a release's format with MTP blocks and a drafter, all of it random."""
    release = make_release(mtp=3, drafter=True, vocab_size=128)
    return mj.load(release.write(tmp_path_factory.mktemp("release")), dtype="float32")


@pytest.mark.parametrize("speculative", ["mtp", "dflash"])
def test_completions_are_those_without(lm, speculative):
    sampled = dataclasses.replace(GREEDY, temperature=1.0, seed=3, n=2)
    for params in (GREEDY, sampled):
        plain = lm.generate(PROMPTS, params)
        outputs = lm.generate(PROMPTS, params, speculative=speculative)
        for a, b in zip(plain, outputs, strict=True):
            assert [c.token_ids for c in a.completions] == [c.token_ids for c in b.completions]
            m = b.metrics
            assert sum(m.acceptance_lengths) == m.generated_tokens
            assert len(m.draft_widths) == len(m.acceptance_lengths)
            assert len(m.acceptance_by_position) == m.draft_widths[0] - 1
            assert not a.metrics.acceptance_lengths
            assert a.metrics.tokens_per_round == 1


def test_a_stream_too(lm):
    stream = lm.stream(PROMPTS[0], GREEDY, speculative="mtp", draft_width=2)
    assert list(stream) == []  # there is no tokenizer
    assert stream.output.token_ids == lm.generate([PROMPTS[0]], GREEDY)[0].token_ids
    assert set(stream.output.metrics.draft_widths) == {2}


def test_what_cannot_be(lm):
    with pytest.raises(ValueError, match="give speculative= too"):
        lm.generate(PROMPTS, draft_width=4)
    with pytest.raises(ValueError, match='expected "mtp", "dflash" or None'):
        lm._drafter("eagle")
    with pytest.raises(ValueError, match="expected 2 to 4"):
        lm.generate(PROMPTS, speculative="mtp", draft_width=5)
    bare = mj.load("colibri-tiny", random_weights=0)
    with pytest.raises(ValueError, match="no such drafter; it has none"):
        bare.generate(PROMPTS, speculative="dflash")


def test_a_drafter_that_is_never_right_is_said_to_be(lm, monkeypatch):
    monkeypatch.setattr(draft_width, "CHANCE", 1.01)  # this one is right by chance
    monkeypatch.setattr(draft_width, "ENOUGH_ROUNDS", 20)
    with pytest.warns(mj.AcceptanceWarning, match="of different checkpoints"):
        lm.generate([[3]], GREEDY, speculative="dflash")


def test_random_drafters_of_a_preset():
    lm = mj.load("colibri-tiny", random_weights=0, dtype="float32")
    assert lm.mtp is None
    assert lm.drafter is None
    with pytest.raises(ValueError, match="drafters= are of models with random_weights="):
        mj.load("mimo-tiny", drafters=True)


def test_the_command_line(lm, monkeypatch):
    monkeypatch.setattr(mj, "load", lambda *args, **options: lm)
    base = ("generate", "--model", "x", "--prompt", "abc", "--temperature", "0")
    base = (*base, "--max-tokens", "20")
    runner = CliRunner()
    plain = runner.invoke(cli.app, base)
    result = runner.invoke(cli.app, (*base, "--speculative", "mtp", "--draft-width", "3"))
    assert result.exit_code == 0, result.output
    assert result.stdout == plain.stdout
    assert "rounds of" in result.stderr
    assert "kept, by position" in result.stderr
    table = runner.invoke(cli.app, (*base, "--compare-speculative"))
    assert table.exit_code == 0, table.output
    for word in ("plain", "mtp", "dflash", "verify ms", "yes"):
        assert word in table.stdout
    assert " no " not in table.stdout
    bad = runner.invoke(cli.app, (*base, "--speculative", "mtp", "--draft-width", "x"))
    assert bad.exit_code != 0
    assert "expected a number or adaptive" in bad.output


def test_acceptance_by_position():
    lengths, verified = (1, 3, 2, 1), (3, 3, 3, 2)
    assert by_position(lengths, verified) == (0.5, pytest.approx(1 / 3))
    metrics = Metrics(0.0, 0.0, 1, 8, lengths, verified)
    assert metrics.tokens_per_round == 7 / 4
    assert metrics.acceptance_by_position == by_position(lengths, verified)


def test_chance_is_told_from_little():
    enough = draft_width.ENOUGH_ROUNDS
    assert draft_width.at_chance("mtp", [1] * (enough - 1), [4] * (enough - 1)) is None
    assert draft_width.at_chance("mtp", [1] * enough, [4] * enough)
    some = [2] * 10 + [1] * (enough - 10)
    assert draft_width.at_chance("mtp", some, [4] * enough) is None


@pytest.mark.parametrize(("right", "expected"), [(0.95, 8), (0.7, 4), (0.02, 2)])
def test_the_width_follows_acceptance(right, expected):
    """Rounds that cost half as much again for each token beyond the first."""
    assert widths(8) == (2, 4, 8)
    assert widths(4) == (2, 4)
    assert widths(5) == (2, 4, 5)
    rng = np.random.default_rng(0)
    policy = AdaptiveWidth(8)
    chosen = []
    for _ in range(30):
        width = policy.choose()
        chosen.append(width)
        hits = rng.random((4, 6, width - 1)) < right
        lengths = 1 + np.cumprod(hits, axis=2).sum(axis=2)
        seconds = 1 + 0.25 * (width - 1)
        policy.learn(lengths, width, seconds if chosen.count(width) > 1 else None)
        assert policy.settled == (len(chosen) >= 6)
    assert chosen[:6] == [8, 8, 4, 4, 2, 2]
    assert chosen[-1] == expected


def test_a_batch_from_a_file(lm, monkeypatch, tmp_path):
    monkeypatch.setattr(mj, "load", lambda *args, **options: lm)
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"token_ids": p}) + "\n" for p in PROMPTS))

    def completed(name: str, *options: str) -> list[dict]:
        out = tmp_path / name
        args = [str(source), str(out), "--max-tokens", "24", "--temperature", "0", *options]
        done = CliRunner().invoke(batch_generate.app, args)
        assert done.exit_code == 0, done.output
        assert ("tokens a round" in done.stdout) == bool(options)
        return [json.loads(line) for line in out.read_text().splitlines()]

    plain = completed("plain.jsonl")
    several = completed("several.jsonl", "--speculative", "mtp")
    for a, b in zip(plain, several, strict=True):
        assert b["metrics"]["tokens_per_round"] >= 1
        assert {k: v for k, v in a.items() if k != "metrics"} == {
            k: v for k, v in b.items() if k != "metrics"
        }


def test_a_batch_without_the_drafter_that_was_asked_for(monkeypatch, tmp_path):
    bare = mj.load("colibri-tiny", random_weights=0)
    monkeypatch.setattr(mj, "load", lambda *args, **options: bare)
    (tmp_path / "in.jsonl").write_text('{"token_ids": [1]}\n')
    args = [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--speculative", "dflash"]
    done = CliRunner().invoke(batch_generate.app, args)
    assert done.exit_code == cli.USAGE
    assert "no such drafter" in done.stderr
