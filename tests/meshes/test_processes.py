"""A model that two processes hold together, four devices each, gives what one device gives."""

import json

import golden
import numpy as np
from two_processes import run_in_processes

from mimo_jax import checkpoint
from mimo_jax.checkpoint import Loaded, release_layout
from mimo_jax.decoding.sampling import SamplingParams
from mimo_jax.language_model import LanguageModel
from mimo_jax.model.parameters import Format, ParamSpec, parameters
from mimo_jax.model.placement import Placement
from sharding import distributed
from sharding.mesh import make_mesh, use
from sharding.types import replicated

TOKENS = [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9]]
LAYOUTS = [["expert=4,tensor=2", "latency"], ["data=2,expert=4", "throughput"]]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=20),
    SamplingParams(temperature=0.7, top_p=0.9, max_tokens=20, seed=5),
]


def small_model(mesh: str | None = None, rules: str = "latency") -> LanguageModel:
    """A model without tokenizer, on a mesh of all processes' devices or on one device."""
    case = golden.tiny(
        num_attention_heads=8,
        swa_num_attention_heads=8,
        num_key_value_heads=2,
        swa_num_key_value_heads=4,
        max_position_embeddings=1024,
    )
    model, where = golden.build(case), None
    if mesh is not None:
        held: list[tuple[ParamSpec, Format]] = [(p.spec, "plain") for _, p in parameters(model)]
        where = Placement.fit(make_mesh(mesh), rules, held)
        model = where.place(model)
    layout = release_layout(model.config)
    nowhere = checkpoint.bundled()["mimo-tiny"].parent  # no files of a model
    return LanguageModel(Loaded(model.config, model, None, None, layout, nowhere, where))


def results(lm: LanguageModel) -> list:
    """Logits, and the tokens of a greedy and a seeded row."""
    with use(lm.mesh):
        logits = np.asarray(replicated(lm.logits(TOKENS)))
    return [logits.tolist(), [o.token_ids for o in lm.generate(TOKENS, PARAMS)]]


def runs_a_model(layouts: list[list[str]]) -> None:
    for mesh, rules in layouts:
        lm = small_model(mesh, rules)
        print(json.dumps(results(lm)))
        unseeded = SamplingParams(max_tokens=20)
        print([o.token_ids for o in lm.generate(TOKENS, unseeded)])


def test_two_processes_give_what_one_device_gives():
    """Under both layouts of the experts; without a seed, the same tokens in both processes."""
    first, second = run_in_processes(runs_a_model, LAYOUTS)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout == second.stdout
    logits, tokens = results(small_model())
    lines = first.stdout.splitlines()
    assert len(lines) == 2 * len(LAYOUTS)
    for line in lines[::2]:
        got_logits, got_tokens = json.loads(line)
        largest = np.abs(logits).max()
        np.testing.assert_allclose(got_logits, logits, atol=1e-5 * largest, rtol=0)
        assert got_tokens == tokens


def asks_for_half_of_the_devices() -> None:
    make_mesh("tensor=4")


def test_a_mesh_that_leaves_a_process_without_devices_ends_both():
    for ended in run_in_processes(asks_for_half_of_the_devices):
        assert ended.returncode == 1
        assert "leaves processes [1] without any; use all devices" in ended.stderr


def gives_another_seed() -> None:
    distributed.from_leader("a seed", "5")
    distributed.require_agreement("the command", f"process {distributed.is_leader()}")


def test_processes_with_other_commands_are_told_so():
    for ended in run_in_processes(gives_another_seed):
        assert ended.returncode == 1
        assert "the command is not the same in all processes" in ended.stderr
