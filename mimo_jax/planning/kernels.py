"""Which kernels a model's operations use on a device, and why not others."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mimo_jax.config import MiMoConfig
from mimo_jax.model.attention import Attention
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.cache import RING_SLACK
from mimo_jax.model.moe import MoE
from mimo_jax.model.packing import has_kernels
from mimo_jax.model.parameters import ParamSpec
from mimo_jax.model.random_weights import shapes
from pallas_kernels import (
    attention,
    decode_attention,
    moe,
    packed,
    quantized_matmul,
    residual_matmul,
    rms_norm,
    rotate_and_store,
)
from pallas_kernels.backends import REFERENCE, Implementation, Target, choose, resolve, why_not
from pallas_kernels.decode_attention.reference import MAX_QUERIES
from pallas_kernels.moe import split_scores

# Kinds of devices that need not be there, by the names of `sharding.devices`.
TARGETS = {
    "h100": Target("cuda", "NVIDIA H100", 90),
    "h200": Target("cuda", "NVIDIA H200", 90),
    "b200": Target("cuda", "NVIDIA B200", 100),
    "a100": Target("cuda", "NVIDIA A100", 80),
    "v4": Target("tpu", "TPU v4"),
    "v5e": Target("tpu", "TPU v5 lite"),
    "v5p": Target("tpu", "TPU v5"),
    "v6e": Target("tpu", "TPU v6 lite"),
    "tpu7x": Target("tpu", "TPU7x"),
    "cpu": Target("cpu", "cpu"),
}
TOKENS = (1, 8, 16, 64, 128, 512, 2048, 8192)

# Operations that models have the reference of, whichever kernels were asked for.
FALLING_BACK = ("scores", "route", "rotate_and_store", "residual_matmul", "rms_norm")

# To what and with how many tokens something is done, which operation it is, its implementations,
# and the shapes of its operands.
Case = tuple[str, int, str, Sequence[Implementation], tuple]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What one operation uses for a range of numbers of tokens.

    Attributes:
      operation: "moe" and its router's "scores" and "route", or another of `pallas_kernels`.
      what: of weights their name without the layer, format and shape; of attention its heads.
      tokens: the least and the most of TOKENS; for attention and its cache, of a sequence.
      backend: what is used; None if nothing can do it.
      refused: the backends preferred to it, and why they aren't used.
    """

    operation: str
    what: str
    tokens: tuple[int, int]
    backend: str | None
    refused: tuple[tuple[str, str], ...]


def kernel_choices(
    config: MiMoConfig, target: Target, kernels: str = "auto", tokens: Sequence[int] = TOKENS
) -> list[Choice]:
    """What the operations of a model's layers use on one device.

    Raises:
      BackendError: the device can't run these kernels.
    """
    allowed = resolve(kernels, target)
    found: dict[tuple[str, str], list[Choice]] = {}
    for what, n, operation, implementations, case in _cases(config, allowed, tokens):
        usable = (*allowed, REFERENCE) if operation in FALLING_BACK else allowed
        choice = _choice(operation, what, n, implementations, usable, target, case)
        found.setdefault((operation, what), []).append(choice)
    return [choice for rows in found.values() for choice in _merged(rows)]


def show(choices: Sequence[Choice], target: Target) -> str:
    """The choices as text."""
    lines = [f"kernels on {target.kind}"]
    for previous, choice in zip([None, *choices], choices):
        if previous is None or _title(previous) != _title(choice):
            lines.append(_title(choice))
        least, most = choice.tokens
        span = f"{least}" if least == most else f"{least} to {most}"
        name = "plain XLA" if choice.backend == REFERENCE else choice.backend or "nothing"
        lines.append(f"  {span} tokens: {name}")
        lines += [f"    not {name}: {reason}" for name, reason in choice.refused]
    return "\n".join(lines)


def _title(choice: Choice) -> str:
    return f"{choice.operation}: {choice.what}"


def _cases(config: MiMoConfig, allowed: tuple[str, ...], tokens: Sequence[int]) -> Iterator[Case]:
    """What there is to do."""
    specs: list[ParamSpec] = []

    def make(spec: ParamSpec) -> Any:
        specs.append(spec)
        return shapes(spec, config.dtype)

    layers, dtype = MiMo(config, make).layers, jnp.dtype(config.dtype)
    for spec in _kinds(specs):
        what = f"{_short(spec)} {spec.format} {list(spec.shape)}"
        for n in tokens:
            case = _of_weights(spec, config, allowed, n)
            if "{}" in spec.name:
                yield what, n, "moe", moe.IMPLEMENTATIONS, case
            else:
                yield what, n, "quantized_matmul", quantized_matmul.IMPLEMENTATIONS, case
    for mlp in [layer.mlp for layer in layers if isinstance(layer.mlp, MoE)][:1]:
        yield from _of_router(mlp, dtype, tokens)
    attentions = dict[Any, Attention]()
    for attend in (layer.self_attn for layer in layers):
        attentions.setdefault(dataclasses.replace(attend.layer, index=0, moe=False), attend)
    for attend in attentions.values():
        yield from _of_attention(attend, dtype, tokens)
    for shape in dict.fromkeys(attend.o_proj.get_value().shape for attend in attentions.values()):
        rows, columns = shape[0], math.prod(shape[1:])
        w = jax.ShapeDtypeStruct((rows, columns), dtype)
        for n in tokens:
            case = jax.ShapeDtypeStruct((n, columns), dtype), w
            what = f"o_proj {dtype} {[rows, columns]}"
            yield what, n, "residual_matmul", residual_matmul.IMPLEMENTATIONS, case
    for n in tokens:
        x = jax.ShapeDtypeStruct((n, config.hidden_size), dtype)
        yield f"{dtype} [{config.hidden_size}]", n, "rms_norm", rms_norm.IMPLEMENTATIONS, (x,)


def _kinds(specs: Sequence[ParamSpec]) -> Iterator[ParamSpec]:
    """One declaration of each kind of quantised weights; of a layer's experts the first stack."""
    seen = set()
    for spec in specs:
        if spec.format == "plain" or ("{}" in spec.name and "gate_proj" not in spec.name):
            continue
        kind = (_short(spec), spec.shape)
        if kind not in seen:
            seen.add(kind)
            yield spec


def _short(spec: ParamSpec) -> str:
    name = spec.name.removesuffix(".weight").split(".")
    return "experts" if "{}" in name else name[-1]


def _of_weights(
    spec: ParamSpec, config: MiMoConfig, allowed: tuple[str, ...], tokens: int
) -> tuple:
    held = shapes(spec, config.dtype)
    if allowed != (REFERENCE,) and has_kernels(spec, allowed):
        held = jax.eval_shape(functools.partial(packed.pack, kernels=allowed), held)
    x = jax.ShapeDtypeStruct((tokens, spec.shape[-1]), jnp.dtype(config.dtype))
    if "{}" not in spec.name:
        return x, held
    chosen = jax.ShapeDtypeStruct((tokens, config.num_experts_per_tok), jnp.int32)
    return x, chosen, held


def _of_router(mlp: MoE, dtype: jnp.dtype, tokens: Sequence[int]) -> Iterator[Case]:
    router = mlp.gate.get_value()
    experts, dim = router.shape
    # Not the products of parts that XLA multiplies, whatever the kernels.
    kernels = [i for i in moe.SCORES if i.call is not split_scores.scores]
    for n in tokens:
        x = jax.ShapeDtypeStruct((n, dim), dtype)
        yield f"router {router.dtype} {[experts, dim]}", n, "scores", kernels, (x, router)
    for n in tokens:
        scores = jax.ShapeDtypeStruct((n, experts), jnp.float32)
        yield f"{mlp.top_k} of {experts} experts", n, "route", moe.ROUTES, (scores,)


def _of_attention(part: Attention, dtype: jnp.dtype, tokens: Sequence[int]) -> Iterator[Case]:
    """Rotation and storing too, where a cache is written before it is read."""
    layer, heads, ring = part.layer, part.heads, part.layer.window is not None
    kv, group = layer.num_kv_heads, layer.num_heads // layer.num_kv_heads
    seen = f"a window of {layer.window}" if ring else "all positions"
    what = f"{layer.num_heads} heads of {layer.head_dim}/{layer.v_head_dim}, {kv} KV heads, {seen}"
    for n in tokens:
        few, slots = n <= MAX_QUERIES, max(TOKENS)
        if layer.window is not None:
            slots = layer.window + (RING_SLACK if few else n)
        shapes = (
            (1, n, kv, group, layer.head_dim),
            (1, slots, kv, layer.head_dim),
            (1, slots, kv, layer.v_head_dim),
            (1, n, kv // heads.kv_heads, sum(heads.rows)),
        )
        q, k, v, fused = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
        if few or not ring:
            case = fused, k, heads, ring
            yield what, n, "rotate_and_store", rotate_and_store.IMPLEMENTATIONS, case
        case = q, k, v, layer.window
        if few:
            yield what, n, "decode_attention", decode_attention.IMPLEMENTATIONS, case
        else:
            yield what, n, "attention", attention.IMPLEMENTATIONS, case


def _choice(
    operation: str,
    what: str,
    tokens: int,
    implementations: Sequence[Implementation],
    allowed: Sequence[str],
    target: Target,
    case: tuple,
) -> Choice:
    chosen, refused = choose(implementations, allowed, *case)
    # A backend may do a case in one way and not in another: what does it counts.
    backend = chosen and chosen.backend
    reasons = dict(item for item in refused if item[0] != backend)
    for name in reasons.keys() - set(allowed):
        reasons[name] = why_not(name, target) or "not among the kernels asked for"
    return Choice(operation, what, (tokens, tokens), backend, tuple(reasons.items()))


def _merged(rows: Sequence[Choice]) -> list[Choice]:
    """Neighbours that differ only in the number of tokens as one."""
    merged: list[Choice] = []
    for row in rows:
        last = merged[-1] if merged else None
        if last is not None and last.backend == row.backend:
            tokens = (last.tokens[0], row.tokens[1])
            merged[-1] = dataclasses.replace(last, tokens=tokens)
        else:
            merged.append(row)
    return merged
