"""A model that two processes hold together, four devices each, gives what one device gives."""

from pathlib import Path

import numpy as np
import pytest
from tiny import exact
from two_processes import run_in_processes

import mimo_jax as mj
from sharding.mesh import use
from sharding.types import replicated

TOKENS = [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9]]
PROMPTS = ["import os\n\n\ndef main():\n", "class A:\n"]
SAMPLING = {"max_tokens": 20, "temperature": 0.7, "top_p": 0.9, "seed": 5}


def runs_mimo_tiny(mesh: str, rules: str, out: str) -> None:
    """Prints what it generates, in every process, and process 0 writes the logits."""
    from sharding.distributed import is_leader

    lm = mj.load("mimo-tiny", dtype="float32", mesh=mesh, rules=rules)
    with use(lm.mesh):
        logits = np.asarray(replicated(lm.logits(TOKENS)))
    if is_leader():
        np.save(out, logits)
    params = [mj.SamplingParams(temperature=0.0, max_tokens=20), mj.SamplingParams(**SAMPLING)]
    print([o.token_ids for o in lm.generate(PROMPTS, params)])
    unseeded = mj.SamplingParams(max_tokens=8)
    print([o.token_ids for o in lm.generate(PROMPTS, unseeded)])


@pytest.mark.parametrize(
    ("mesh", "rules"), [("expert=4,tensor=2", "latency"), ("data=2,expert=4", "throughput")]
)
def test_two_processes_give_what_one_device_gives(tmp_path: Path, mesh: str, rules: str):
    """Logits, greedy and seeded tokens; without a seed, the same tokens in both processes."""
    out = tmp_path / "logits.npy"
    first, second = run_in_processes(runs_mimo_tiny, mesh, rules, str(out))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    lm = exact()
    expected = np.asarray(lm.logits(TOKENS))
    np.testing.assert_allclose(np.load(out), expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    params = [mj.SamplingParams(temperature=0.0, max_tokens=20), mj.SamplingParams(**SAMPLING)]
    tokens = [o.token_ids for o in lm.generate(PROMPTS, params)]
    assert first.stdout.splitlines()[0] == str(tokens)
    assert first.stdout == second.stdout
