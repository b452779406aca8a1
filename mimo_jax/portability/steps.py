"""Whole steps of models, from parameters that exist as shapes only, for devices that may not exist.

The step is the one that every loop is built on: tokens and a cache in, the greatest logit's index
and the cache out, the cache given away.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mimo_jax.config import MiMoConfig
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.cache import CACHE_AXES, init_cache
from mimo_jax.model.packing import abstract_packed
from mimo_jax.model.parameters import abstract, parameters
from mimo_jax.model.placement import Placement
from mimo_jax.portability.places import Place
from sharding.mesh import make_mesh

RULES = "latency"


@dataclasses.dataclass(frozen=True)
class StepSize:
    """A kind of step.

    Attributes:
      subject: its name.
      tokens: of each sequence that are new.
      batch: sequences.
      context: positions that the cache holds.
    """

    subject: str
    tokens: int
    batch: int
    context: int

    @property
    def text(self) -> str:
        """Its sizes."""
        return f"{self.batch} x {self.tokens} tokens, context {self.context}"


STEPS = {
    "decode": StepSize("decode", 1, 1, 4096),
    "verify": StepSize("verify", 8, 1, 4096),
    "prefill": StepSize("prefill", 512, 1, 4096),
}


@dataclasses.dataclass(frozen=True)
class AbstractStep:
    """A step to compile.

    Attributes:
      f: jitted.
      args: shapes.
      mesh: None on one device.
    """

    f: Any
    args: tuple
    mesh: Mesh | None


def greedy_step(model: MiMo, tokens: Any, positions: Any, cache: Any) -> tuple[Any, Any]:
    """The step: the most probable token after each row's last one, int32 [B, 1], and the cache."""
    logits, cache = model(tokens, positions, cache)
    return jnp.argmax(logits[:, -1:], axis=-1).astype(jnp.int32), cache


def abstract_step(config: MiMoConfig, size: StepSize, place: Place, kernels: str) -> AbstractStep:
    """A model's step on a target.

    Raises:
      BackendError: the kernels don't run there.
      ShardingError: its devices don't divide the model.
      RuntimeError: its devices can't be described, for lack of a compiler.
    """
    allowed = place.allowed(kernels)
    placement = None
    if place.mesh:
        model = abstract(lambda make: MiMo(config, make), config.dtype, quantized=True)
        held = [(p.spec, p.spec.format) for _, p in parameters(model)]
        mesh = make_mesh(place.mesh, place.topology_devices())
        placement = Placement.fit(mesh, RULES, held)
    model = abstract_packed(config, allowed, placement, native_e2m1=place.native_e2m1)
    cache = jax.eval_shape(lambda: init_cache(config, size.batch, size.context))
    rows = jax.ShapeDtypeStruct((size.batch, size.tokens), jnp.int32)
    if placement is not None:
        cache = jax.tree.map(lambda a: _on(placement, a, CACHE_AXES), cache)
        rows = _on(placement, rows, ("batch", None))
    f = jax.jit(greedy_step, donate_argnames="cache")
    return AbstractStep(f, (model, rows, rows, cache), placement and placement.mesh)


def _on(placement: Placement, array: Any, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
    return array.update(sharding=placement.sharding("cache", axes, array.shape))
