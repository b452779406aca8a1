"""What goes on inside a model while it reads a text, as named arrays on the host."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from mimo_jax.config import MiMoConfig
from mimo_jax.explore.named import NamedArray
from mimo_jax.language_model import LanguageModel, Prompt
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.taps import AXES
from sharding.mesh import use
from sharding.types import reshard

LOGITS = "logits"
# Programs are compiled for multiples of so many tokens.
LENGTHS = 64
# Dimensions that have padding, which is cut off.
_LONG = ("position", "query", "key")


def tap_names(config: MiMoConfig) -> tuple[str, ...]:
    """Every name that `taps` knows for a model: `hidden.i` and `attention.i` of each layer i,
    `router.i` and `experts.i` of each mixture of experts, and `logits`."""
    names = [
        f"{kind}.{spec.index}"
        for kind in AXES
        for spec in config.layers
        if spec.moe or kind not in ("router", "experts")
    ]
    return (*names, LOGITS)


def taps(
    lm: LanguageModel, prompt: Prompt | Sequence[Sequence[int]], *names: str
) -> dict[str, NamedArray]:
    """What a model computes on the way, while it reads a text as `LanguageModel.logits` does.

    Args:
      lm: the model; on a mesh too, whose devices have to be of this process.
      prompt: a prompt as for `generate`, or token ids [B, T] of several that are as long.
      names: of `tap_names`; patterns such as "hidden.*" stand for all that match.

    Returns:
      By name, in the model's order, the arrays of `mimo_jax.model.taps` with the axes it gives
      them, float32 "logits" (batch, position, token), and always "tokens", int32 (batch, position).
      Attention weights are `query` x `key`: they grow with the square of the text.

    Raises:
      ValueError: nothing has such a name, or the prompt is empty, malformed or too long.
    """
    wanted = _expanded(names, tap_names(lm.config))
    tokens = as_tokens(lm, prompt)
    length = tokens.shape[1]
    limit = lm.config.max_position_embeddings
    if not 0 < length <= limit:
        raise ValueError(f"the text has {length} tokens; give 1 to {limit}, the model's positions")
    padded = min(-(-length // LENGTHS) * LENGTHS, limit)
    inside = np.pad(tokens, ((0, 0), (0, padded - length)))
    positions = np.where(np.arange(padded) < length, np.arange(padded), -1).astype(np.int32)
    run = functools.partial(_tapped, names=wanted)
    found = on_rows(lm, run, lm.model, inside, np.broadcast_to(positions, inside.shape))
    seen = {"tokens": NamedArray(tokens, ("batch", "position"))}
    for name in wanted:
        axes = AXES.get(name.split(".")[0], ("batch", "position", "token"))
        cut = tuple(slice(length) if axis in _LONG else slice(None) for axis in axes)
        seen[name] = NamedArray(found[name][cut], axes)
    return seen


def token_texts(lm: LanguageModel, tokens: Any) -> list[str]:
    """What each token is as text, with what can't be seen made visible.

    Args:
      lm: whose tokenizer has them.
      tokens: their ids, one dimension.
    """
    ids = [int(t) for t in np.asarray(tokens)]
    if lm.tokenizer is None:
        return [str(i) for i in ids]
    texts = (lm.tokenizer.decode([i]) for i in ids)
    return [t.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥") or "∅" for t in texts]


def as_tokens(lm: LanguageModel, prompt: Any) -> np.ndarray:
    """int32 token ids [B, T] of a prompt or of several as long ones.

    Raises:
      ValueError: they are of different lengths, or ids are outside the vocabulary.
    """
    if not isinstance(prompt, str) and len(prompt) and np.ndim(prompt[0]):
        lengths = sorted({len(row) for row in prompt})
        if len(lengths) > 1:
            raise ValueError(f"texts of {lengths} tokens; cut them to one length")
        return np.asarray([lm.encode([int(i) for i in row]) for row in prompt], np.int32)
    return np.asarray([lm.encode(prompt)], np.int32)


def on_rows(lm: LanguageModel, f: Callable[..., Any], model: MiMo, *arrays: np.ndarray) -> Any:
    """f(model, *arrays) of arrays [B, ...], which a mesh may split; its results on the host."""
    rows = len(arrays[0])
    more = -rows % lm.decoder.ways
    padded = tuple(np.pad(a, ((0, more), *[(0, 0)] * (a.ndim - 1))) for a in arrays)
    with use(lm.mesh):
        found = f(model, *lm.decoder.put(padded))
        return jax.tree.map(lambda a: np.asarray(a)[:rows], found)


@functools.partial(jax.jit, static_argnames="names")
def _tapped(
    model: MiMo, tokens: Array, positions: Array, *, names: tuple[str, ...]
) -> dict[str, Array]:
    inner = tuple(name for name in names if name != LOGITS)
    hidden, _, found = model.hidden_states(tokens, positions, taps=inner)
    if LOGITS in names:
        found = {**found, LOGITS: model.logits(hidden)}
    return {name: reshard(found[name]) for name in names}


def _expanded(patterns: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    found = {p: [n for n in known if isinstance(p, str) and fnmatchcase(n, p)] for p in patterns}
    wanted = {name for names in found.values() for name in names}
    unknown = [p for p, names in found.items() if not names]
    if unknown:
        raise ValueError(
            f"unknown taps {unknown}: use hidden.i or attention.i for a layer i below "
            f"{sum(name.startswith('hidden') for name in known)}, router.i or experts.i for a "
            "mixture of experts, logits, or a pattern such as hidden.*"
        )
    return tuple(name for name in known if name in wanted)
