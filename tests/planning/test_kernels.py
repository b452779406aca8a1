"""Which kernels are said to be used, and which a model's step then calls."""

from typing import Any

import jax
import pytest

from mimo_jax.config import MiMoConfig
from mimo_jax.planning.kernels import TARGETS, Choice, kernel_choices
from mimo_jax.portability.places import find_place
from mimo_jax.portability.steps import StepSize, abstract_step
from pallas_kernels import backends

MODELS = ["MiMo-V2.5-Pro-FP4-DFlash", "MiMo-V2.6-Flash-RL"]
# Of one token, the norm before the experts is a part of their scores.
JOINED = {"normed_scores": "scores"}


def config_of(model: str) -> MiMoConfig:
    """Its first layers, the dense one and one of each kind of attention among them."""
    return MiMoConfig.from_pretrained(model).truncated(3)


@pytest.fixture
def called(monkeypatch):
    """(operation, backend) of each call that is traced."""
    found: set[tuple[str, str]] = set()
    call = backends.call

    def recorded(operation: str, implementations: Any, allowed: Any, case: Any, *args: Any, **kw):
        chosen, _ = backends.choose(implementations, allowed, *case)
        assert chosen is not None
        found.add((JOINED.get(operation, operation), chosen.backend))
        return call(operation, implementations, allowed, case, *args, **kw)

    monkeypatch.setattr(backends, "call", recorded)
    return found


@pytest.mark.parametrize("kernels", ["auto", "triton"])
@pytest.mark.parametrize("tokens", [1, 16, 64])
@pytest.mark.parametrize("model", MODELS)
def test_what_is_said_is_what_a_step_calls(model, tokens, kernels, called):
    config = config_of(model)
    step = abstract_step(config, StepSize("", tokens, 1, 4096), find_place("hopper"), kernels)
    jax.eval_shape(step.f, *step.args)
    said = kernel_choices(config, TARGETS["h100"], kernels, tokens=(tokens,))
    pairs = {(choice.operation, choice.backend) for choice in said}
    assert called <= pairs
    # What else is said: one token's choice, which is a part of its experts' kernel, and a product
    # that is left to XLA without a call.
    beyond = {("route", "triton")} if tokens == 1 else {("residual_matmul", "reference")}
    assert pairs - called == beyond


def find(choices: list[Choice], operation: str, part: str = "") -> list[tuple]:
    found = [c for c in choices if c.operation == operation and part in c.what]
    return [(c.tokens, c.backend, c.refused) for c in found]


def test_neighbours_are_one_range_and_reasons_are_given():
    choices = kernel_choices(config_of(MODELS[0]), TARGETS["h100"])
    assert find(choices, "moe") == [
        ((1, 64), "triton", ()),
        ((128, 8192), "mosaic_gpu", (("triton", "128 tokens are more than 64"),)),
    ]
    few, many = find(choices, "rotate_and_store", "all positions")
    assert few == ((1, 16), "triton", ())
    assert many[:2] == ((64, 8192), "reference")
    assert dict(many[2])["triton"] == "64 tokens a sequence are more than 16"
    # Of a ring only what is stored before it is read.
    assert [n for n, *_ in find(choices, "rotate_and_store", "window")] == [(1, 16)]


def test_what_xla_multiplies_is_no_kernel():
    """Router scores of many tokens."""
    *_, (_, backend, refused) = find(
        kernel_choices(config_of(MODELS[0]), TARGETS["h100"]), "scores"
    )
    assert backend == "reference"
    assert dict(refused) == {"triton": "2048 tokens are more than 1024"}


@pytest.mark.parametrize("device", TARGETS)
def test_every_device_has_something_for_every_operation(device):
    choices = kernel_choices(config_of(MODELS[1]), TARGETS[device])
    assert all(choice.backend for choice in choices)
    assert {choice.operation for choice in choices} >= {"moe", "rms_norm", "decode_attention"}
    if device == "cpu":
        assert {choice.backend for choice in choices} == {"reference"}
