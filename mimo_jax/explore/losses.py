"""How good a model's predictions are, and how far two models' are from each other."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float


def token_losses(logits: Any, tokens: Any) -> Float[np.ndarray, "B following"]:
    """Negative log-probability of each token but the first, in nats.

    Args:
      logits: [B, T, vocab], such as `LanguageModel.logits` or the tap of that name.
      tokens: the text's ids [B, T].
    """
    logprobs = _log_softmax(logits)[:, :-1]
    following = np.asarray(tokens)[:, 1:, None]
    return -np.take_along_axis(logprobs, following, axis=-1)[..., 0]


def divergence(logits: Any, other: Any) -> Float[np.ndarray, "B T"]:
    """Kullback-Leibler divergence of what `other` says from what `logits` say, in nats.

    Args:
      logits: [B, T, vocab], the model that counts as right.
      other: [B, T, vocab], the model in question.
    """
    right, theirs = _log_softmax(logits), _log_softmax(other)
    return (np.exp(right) * (right - theirs)).sum(axis=-1)


def _log_softmax(logits: Any) -> np.ndarray:
    shifted = np.asarray(logits, np.float32)
    shifted = shifted - shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
