"""What the model would say if it stopped after a layer: the logit lens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mimo_jax.explore.named import NamedArray
from mimo_jax.explore.tapping import on_rows
from mimo_jax.language_model import LanguageModel
from mimo_jax.model.backbone import MiMo
from sharding.types import reshard


@dataclasses.dataclass(frozen=True, eq=False)
class LogitLens:
    """The final norm and head applied to the residual stream after L layers.

    Attributes:
      layers: indices of the layers.
      ids: the k most probable tokens, the first one first.
      logprobs: their log-probabilities.
      next_logprobs: of the tokens that do follow in the text; there is none for the last position.
      divergence: Kullback-Leibler divergence of the distribution from the model's own, in nats.
    """

    layers: tuple[int, ...]
    ids: Int[np.ndarray, "L B T k"]
    logprobs: Float[np.ndarray, "L B T k"]
    next_logprobs: Float[np.ndarray, "L B following"]
    divergence: Float[np.ndarray, "L B T"]


def logit_lens(lm: LanguageModel, seen: Mapping[str, NamedArray], *, top: int = 5) -> LogitLens:
    """Reads the residual stream after each layer as if it were the last.

    Args:
      lm: the model.
      seen: what `taps` gave for "hidden.*", or for some layers and the last.
      top: how many tokens to name.

    Raises:
      ValueError: the last layer's residual stream is missing.
    """
    last = lm.config.num_hidden_layers - 1
    if f"hidden.{last}" not in seen:
        raise ValueError(f"hidden.{last} is missing, with which others are compared; ask for it")
    layers = tuple(s.index for s in lm.config.layers if f"hidden.{s.index}" in seen)
    tokens = np.asarray(seen["tokens"])
    following = np.roll(tokens, -1, axis=1)
    final = seen[f"hidden.{last}"].values
    read = functools.partial(_lens, top=top)
    found = [
        on_rows(lm, read, lm.model, seen[f"hidden.{i}"].values, final, following) for i in layers
    ]
    ids, logprobs, of_next, divergence = (np.stack(parts) for parts in zip(*found, strict=True))
    return LogitLens(layers, ids, logprobs, of_next[:, :, :-1], divergence)


def read_out(lm: LanguageModel, hidden: NamedArray) -> NamedArray:
    """float32 logits (batch, position, token) of a residual stream (batch, position, feature)."""
    logits = on_rows(lm, _read_out, lm.model, hidden.values)
    return NamedArray(logits, (*hidden.axes[:-1], "token"))


@jax.jit
def _read_out(model: MiMo, hidden: Array) -> Array:
    return reshard(model.logits(hidden))


@functools.partial(jax.jit, static_argnames="top")
def _lens(
    model: MiMo, hidden: Array, final: Array, following: Array, *, top: int
) -> tuple[Array, ...]:
    own, end = (reshard(jax.nn.log_softmax(model.logits(h))) for h in (hidden, final))
    logprobs, ids = jax.lax.top_k(own, top)
    of_next = jnp.take_along_axis(own, reshard(following)[..., None], axis=-1)[..., 0]
    return ids, logprobs, of_next, (jnp.exp(end) * (end - own)).sum(axis=-1)
