"""How many tokens to verify at once: what acceptance and the cost of a round say.

Wider rounds keep more tokens and cost more, the most in a mixture of experts, where each further
token brings experts of its own that have to be read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from mimo_jax.model.backbone import MiMo
from mimo_jax.model.parameters import parameters

# Weight of older rounds at each dispatch: acceptance changes with the text.
MEMORY = 0.9
# Dispatches after which the widest round is tried again.
PROBE = 32


def widths(most: int) -> tuple[int, ...]:
    """Those that are chosen among, few because each is a program: powers of two, and the most."""
    return tuple(sorted({most, *(w for w in (2, 4, 8, 16) if w < most)}))


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a round reads, in bytes, without the cache.

    Attributes:
      fixed: weights that are read at any width, the drafter's included.
      experts: weights of all experts.
      share: of the experts, that a token uses.
      rows: of the batch.
    """

    fixed: float
    experts: float
    share: float
    rows: int

    @classmethod
    def of(cls, model: MiMo, drafter_bytes: float, rows: int) -> Cost:
        """Of a backbone and its drafter, which reads the head once more."""
        config, fixed, experts = model.config, drafter_bytes, 0.0
        for _, param in parameters(model):
            value = param.get_value()
            arrays = (value,) if hasattr(value, "nbytes") else vars(value).values()
            size = float(sum(getattr(a, "nbytes", 0) for a in arrays))
            if "{}" in param.spec.name:
                experts += size
            elif param.spec.name == "lm_head.weight":
                fixed += 2 * size
            elif param.spec.name != "model.embed_tokens.weight":
                fixed += size
        share = config.num_experts_per_tok / config.n_routed_experts if experts else 0.0
        return cls(fixed, experts, share, rows)

    def __call__(self, width: int) -> float:
        """Bytes of a round, with as many distinct experts as random routing would choose."""
        distinct = 1 - (1 - self.share) ** (self.rows * width)
        return self.fixed + self.experts * distinct


class AdaptiveWidth:
    """Chooses the width of the next rounds: the one with most tokens a second, as far as is known.

    Acceptance is measured by position, with older rounds counting less.  Seconds of a round are
    measured where a width was used, and else follow from the bytes that it reads.

    Args:
      most: the widest round.
      cost: bytes of a round by width.
    """

    def __init__(self, most: int, cost: Cost):
        self.widths = widths(most)
        self.cost = cost
        self._tried = np.zeros(most - 1)
        self._kept = np.zeros(most - 1)
        self._seconds: dict[int, float] = {}
        self._dispatches = 0

    def learn(self, lengths: np.ndarray, width: int, seconds: float | None) -> None:
        """Takes the outcome of a dispatch.

        Args:
          lengths: int [B, rounds], tokens of each round; 0 where a row was done.
          width: of these rounds.
          seconds: of a round; None if that was not measured, or with compilation.
        """
        counts = lengths[lengths > 0]
        if not len(counts):
            return
        position = np.arange(1, width)
        # A proposal is tried if those before it were right.
        tried = (counts[:, None] >= position).sum(axis=0)
        right = (counts[:, None] > position).sum(axis=0)
        self._tried[: width - 1] = MEMORY * self._tried[: width - 1] + tried
        self._kept[: width - 1] = MEMORY * self._kept[: width - 1] + right
        if seconds is not None:
            self._seconds[width] = min(seconds, self._seconds.get(width, seconds))
        self._dispatches += 1

    def choose(self) -> int:
        """The next width; the widest first, and now and then."""
        if self._dispatches % PROBE == 0:
            return self.widths[-1]
        return max(self.widths, key=lambda w: self.expected(w) / self.seconds(w))

    def expected(self, width: int) -> float:
        """Tokens that a round of this width keeps."""
        # Before anything is known a proposal is as likely right as wrong.
        rates = (self._kept + 0.5) / (self._tried + 1)
        return 1 + float(np.cumprod(rates[: width - 1]).sum())

    def seconds(self, width: int) -> float:
        """Of a round of this width; relative to each other if none was measured."""
        if width in self._seconds:
            return self._seconds[width]
        known = [s / self.cost(w) for w, s in self._seconds.items()]
        return self.cost(width) * (float(np.mean(known)) if known else 1.0)


def by_position(lengths: Sequence[int], widths_of: Sequence[int]) -> tuple[float, ...]:
    """Share of rounds that kept the first proposal, the first two, and so on.

    Args:
      lengths: tokens of each round.
      widths_of: its width.
    """
    n, w = np.asarray(lengths), np.asarray(widths_of)
    most = int(w.max(initial=1))
    return tuple(float((n > i).sum() / max(1, (w > i).sum())) for i in range(1, most))
