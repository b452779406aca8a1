"""What a model holds: its parameters, alike ones counted together, and their bytes on a mesh."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from flax import nnx

from mimo_jax.config import DFlashConfig, LayerSpec, MiMoConfig
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.dflash import DFlash
from mimo_jax.model.mtp import MTP
from mimo_jax.model.parameters import Format, ParamSpec, abstract, parameters, value_format
from mimo_jax.model.placement import Placement
from sharding import plan

# Group of a backbone's parameter by a part of its name; the first that matches.
GROUPS = (
    ("embed_tokens", "embedding"),
    ("lm_head", "head"),
    ("self_attn", "attention"),
    ("mlp.gate.", "router"),
    (".mlp.", "dense MLP"),
    ("norm", "norms"),
)


@dataclasses.dataclass(frozen=True)
class Held:
    """Parameters that are alike.

    Attributes:
      group: what they are for, in the words of a plan.
      spec: the declaration of the first of them.
      value: its arrays, as shapes.
      count: how many there are.
    """

    group: str
    spec: ParamSpec
    value: Any
    count: int

    @property
    def format(self) -> Format:
        """The format it is held in."""
        return value_format(self.value)


@dataclasses.dataclass(frozen=True)
class Placed:
    """Alike parameters on a mesh; sums over all of them.

    Attributes:
      group: as in `Held`.
      per_device, once: bytes on each device, and of one copy.
      weights: number of weights on each device.
      dequantized: number of weights that a device has to dequantise of one of them.
    """

    group: str
    per_device: int
    once: int
    weights: int
    dequantized: int


@functools.lru_cache(maxsize=8)  # shapes of the 1T model take seconds to work out
def inventory(
    config: MiMoConfig,
    dtype: str,
    *,
    quantized: bool,
    mtp_blocks: int,
    drafter: DFlashConfig | None,
) -> tuple[Held, ...]:
    """Everything that is held, in the order of the network.

    Args:
      config: of the backbone.
      dtype: of parameters that do not set their own.
      quantized: weights are held in the release's formats.
      mtp_blocks: MTP blocks besides.
      drafter: a DFlash drafter besides.
    """
    form = functools.partial(abstract, dtype=dtype, quantized=quantized)
    found = _alike(form(lambda make: MiMo(config, make)), None)
    if mtp_blocks:
        found += _alike(form(lambda make: MTP(config, mtp_blocks, make)), "MTP")
    if drafter is not None:
        found += _alike(form(lambda make: DFlash(drafter, make)), "drafter")
    return tuple(found)


@functools.lru_cache(maxsize=8)
def layer_kinds(config: MiMoConfig) -> dict[LayerSpec, int]:
    """How many layers there are of each kind; `index` is 0 in all."""
    return dict(collections.Counter(dataclasses.replace(s, index=0) for s in config.layers))


def place(held: Sequence[Held], placement: Placement) -> list[Placed]:
    """The bytes of what is held, as a placement splits it."""
    return [_placed(h, placement) for h in held]


def declarations(held: Sequence[Held]) -> Iterator[tuple[ParamSpec, Format]]:
    """What `Placement.fit` wants to know."""
    return ((h.spec, h.format) for h in held)


def _alike(module: nnx.Module, group: str | None) -> list[Held]:
    """The parameters of an abstract module; `group` is the group of all, None for a backbone."""
    found: dict[Any, Held] = {}
    for _, param in parameters(module):
        spec, value = param.spec, param.get_value()
        name = group or _group(spec)
        leaves = [(a.shape, a.dtype) for a in jax.tree.leaves(value)]
        key = (name, type(value), spec.shape, spec.axes, *leaves)
        count = found[key].count if key in found else 0
        found[key] = Held(name, spec, value, count + 1)
    return list(found.values())


def _group(spec: ParamSpec) -> str:
    if "expert" in spec.axes:
        return "experts"
    return next(group for part, group in GROUPS if part in spec.name)


def _placed(held: Held, placement: Placement) -> Placed:
    shardings = placement.shardings(held.spec, held.value)
    per_device, once = plan.array_bytes(held.value, shardings)
    codes = jax.tree.leaves(held.value)[0], jax.tree.leaves(shardings)[0]
    part, whole = plan.array_bytes(*codes)
    weights = held.spec.size * part // whole
    return Placed(
        held.group,
        held.count * per_device,
        held.count * once,
        held.count * weights,
        0 if held.format == "plain" else weights,
    )
