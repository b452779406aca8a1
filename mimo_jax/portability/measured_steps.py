"""Whole steps on the hardware that is present: numbers and time."""

from __future__ import annotations

import dataclasses
import gc
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.api import load
from mimo_jax.config import MiMoConfig
from mimo_jax.language_model import LanguageModel
from mimo_jax.model.cache import init_cache
from mimo_jax.planning import make_plan
from mimo_jax.planning.plan import Plan
from mimo_jax.portability.attempts import describe
from mimo_jax.portability.places import Place
from mimo_jax.portability.results import Agreement, Speed, Stage
from mimo_jax.portability.steps import StepSize, greedy_step
from mimo_jax.portability.timing import error, timed
from sharding.devices import Device, find_device

# Of the relative error of bfloat16 logits of a whole model: mimo-tiny has 0.013 to 0.028 on a CPU.
# A kernel that does something else gives about 1.
LIMIT = 5e-2
TOKENS = 64  # that are compared at the end of: enough to leave the first block of a kernel
COMPARED_LAYERS = 2  # of random models, whose experts' choice would drift apart
PART = 0.85  # of a device's memory that a cut model may fill
CALLS = 16  # steps in a program


def fitting_layers(config: MiMoConfig, size: StepSize, place: Place) -> int:
    """How many of a model's first layers fit on the accelerator that is present, by its plan."""
    device = place.device
    if device is None:
        return config.num_hidden_layers
    usable = PART * device.usable.value

    def fits(layers: int) -> bool:
        return _plan(config.truncated(layers), size, device).memory.needed <= usable

    layers = config.num_hidden_layers
    while layers > 1 and not fits(layers):
        layers -= 1
    return layers


def too_large(config: MiMoConfig, size: StepSize, place: Place) -> str | None:
    """Why a model can't be run on what is present, by its plan; None if it can."""
    device = place.device or find_device("cpu")
    needed, there = _plan(config, size, device).memory.needed, int(device.usable.value)
    if needed <= there:
        return None
    return f"it needs {needed / 2**30:.1f} GiB, and there are {there / 2**30:.1f}"


def _plan(config: MiMoConfig, size: StepSize, device: Device) -> Plan:
    """The plan of a step on one device."""
    return make_plan(
        config,
        device=device,
        batch=size.batch,
        context=size.context,
        prompt=size.tokens,
        verify=size.tokens,
    )


def load_model(name: str, layers: int | None, **options: Any) -> LanguageModel:
    """The bundled checkpoint of that name if it is whole, or a preset with random weights."""
    jax.clear_caches()
    gc.collect()  # modules refer to each other in circles, and the model before may be large
    if name == "mimo-tiny" and layers is None:
        return load(name, **options)
    return load(name, random_weights=0, layers=layers, **options)


def agree(name: str, size: StepSize, kernels: str) -> tuple[Stage, Agreement | None]:
    """Compares the logits of a cached step with those of the same weights in float32 and plain XLA.

    Args:
      name: of a model.
      size: how many tokens the step has.
      kernels: as for `mimo_jax.load`.
    """
    started = time.perf_counter()
    try:
        layers = None if name == "mimo-tiny" else COMPARED_LAYERS
        got = _last_logits(load_model(name, layers, kernels=kernels, dtype="bfloat16"), size)
        exact = load_model(name, layers, kernels="reference", dtype="float32")
        found = error(got, _last_logits(exact, size))
    except Exception as problem:  # whatever a device says is a result
        return Stage("failed", describe(problem), time.perf_counter() - started), None
    seconds = time.perf_counter() - started
    weights = "its weights" if layers is None else f"{layers} layers of random weights"
    agreement = Agreement(found, LIMIT, f"bfloat16 logits, {weights}")
    if not found <= LIMIT:  # NaN too
        reason = f"the relative error is {found:.2g}, more than {LIMIT:.2g}"
        return Stage("failed", reason, seconds), agreement
    return Stage("ok", seconds=seconds), agreement


def _last_logits(lm: LanguageModel, size: StepSize) -> np.ndarray:
    """Logits of the step that ends with the last of TOKENS random tokens."""
    new = min(size.tokens, TOKENS)
    ids = np.random.default_rng(0).integers(lm.config.vocab_size // 2, size=(1, TOKENS))
    positions = np.arange(TOKENS)[None]
    cache = init_cache(lm.config, 1, TOKENS)
    step = jax.jit(lambda model, *args: model(*args))
    with jax.default_matmul_precision("highest"):
        for part in (slice(0, TOKENS - new), slice(TOKENS - new, TOKENS)):
            tokens = jnp.asarray(ids[:, part], jnp.int32)
            if tokens.size:
                where = jnp.asarray(positions[:, part], jnp.int32)
                logits, cache = step(lm.model, tokens, where, cache)
    return np.asarray(logits)


def time_step(
    name: str, layers: int | None, size: StepSize, place: Place, kernels: str
) -> tuple[Stage, Speed | None]:
    """Times a step at the end of its context; the weights are random where there is no checkpoint.

    The roofline is that of the plan: weights of the experts that are expected, the cache, FLOPs.
    """
    started = time.perf_counter()
    try:
        lm = load_model(name, layers, kernels=kernels)
        seconds = timed(*_program(lm, size), CALLS)
        plan = _plan(lm.config, size, place.device or find_device("cpu"))
    except Exception as problem:
        return Stage("failed", describe(problem), time.perf_counter() - started), None
    step = plan.verify
    limit = step.limits.seconds if step.limits else None
    speed = Speed(seconds, step.read, step.flops, limit)
    return Stage("ok", seconds=time.perf_counter() - started), speed


def _program(lm: LanguageModel, size: StepSize) -> tuple[Any, tuple]:
    """A program of CALLS steps, each with the token of the one before, and its arguments."""
    leaves, tree = jax.tree.flatten(lm.model)  # once: it is a thousand arrays
    first = size.context - size.tokens
    positions = jnp.broadcast_to(
        jnp.arange(first, size.context, dtype=jnp.int32), (size.batch, size.tokens)
    )
    ids = np.random.default_rng(0).integers(lm.config.vocab_size // 2, size=positions.shape)

    def run(leaves: Any, tokens: Any, positions: Any, cache: Any) -> Any:
        model = jax.tree.unflatten(tree, leaves)

        def one(_: Any, carry: Any) -> Any:
            tokens, cache = carry
            token, cache = greedy_step(model, tokens, positions, cache)
            return jnp.concatenate([tokens[:, 1:], token], axis=1), cache

        tokens, cache = jax.lax.fori_loop(0, CALLS, one, (tokens, cache))
        return tokens, cache

    cache = init_cache(lm.config, size.batch, size.context)
    return jax.jit(run), (leaves, jnp.asarray(ids, jnp.int32), positions, cache)


def named(size: StepSize, name: str, layers: int | None, of: int) -> str:
    """A step's case: the model, how much of it, and its sizes."""
    cut = "" if layers in (None, of) else f", {layers} of {of} layers"
    return f"{name}{cut}: {size.text}"


def smaller(size: StepSize, config: MiMoConfig) -> StepSize:
    """The step in as much context as the model has."""
    return dataclasses.replace(size, context=min(size.context, config.max_position_embeddings))
