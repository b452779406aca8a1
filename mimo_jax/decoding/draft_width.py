"""How many tokens to verify at once: what acceptance and the time of a round say.

Wider rounds keep more tokens and take longer, above all in a mixture of experts, where each further
token brings experts of its own that have to be read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sharding import distributed

# Weight of older rounds at each dispatch: acceptance changes with the text.
MEMORY = 0.9
# Dispatches after which the widest round is tried again.
PROBE = 32
# Dispatches that a width is given before it is judged: the first compiles.
TRIALS = 2
# Fewer right first proposals than this are no better than guesses, after so many rounds.
CHANCE = 0.04
ENOUGH_ROUNDS = 64


def widths(most: int) -> tuple[int, ...]:
    """Those that are chosen among, few because each is a program: powers of two, and the most."""
    return tuple(sorted({most, *(w for w in (2, 4, 8, 16) if w < most)}))


class AdaptiveWidth:
    """Chooses the width of the next rounds: the one with most tokens a second so far.

    Acceptance is measured by position, with older rounds counting less, and seconds by width.  In a
    job of several processes all go by what process 0 has measured.

    Args:
      most: the widest round.
    """

    def __init__(self, most: int):
        self.widths = widths(most)
        self._tried = np.zeros(most - 1)
        self._kept = np.zeros(most - 1)
        self._seconds: dict[int, float] = {}
        self._trials = dict.fromkeys(self.widths, 0)

    def learn(self, lengths: np.ndarray, width: int, seconds: float | None) -> None:
        """Takes the outcome of a dispatch.

        Args:
          lengths: int [B, rounds], tokens of each round; 0 where a row was done.
          width: of these rounds.
          seconds: of a round; None if that was not measured, or with compilation.
        """
        self._trials[width] += 1
        counts = lengths[lengths > 0]
        position = np.arange(1, width)
        # A proposal is tried if those before it were right.
        tried = (counts[:, None] >= position).sum(axis=0)
        right = (counts[:, None] > position).sum(axis=0)
        self._tried[: width - 1] = MEMORY * self._tried[: width - 1] + tried
        self._kept[: width - 1] = MEMORY * self._kept[: width - 1] + right
        if seconds is not None:
            self._seconds[width] = min(seconds, self._seconds.get(width, seconds))

    @property
    def settled(self) -> bool:
        """Whether each width has been tried as often as it takes to judge it."""
        return not any(map(self._untried, self.widths))

    def choose(self) -> int:
        """The next width."""
        return int(distributed.from_leader("a draft width", str(self._best())))

    def _best(self) -> int:
        for width in reversed(self.widths):
            if self._untried(width):
                return width
        if sum(self._trials.values()) % PROBE == 0:
            return self.widths[-1]
        return max(self.widths, key=lambda w: self.expected(w) / self._seconds[w])

    def _untried(self, width: int) -> bool:
        return self._trials[width] < TRIALS or width not in self._seconds

    def expected(self, width: int) -> float:
        """Tokens that a round of this width keeps."""
        # Before anything is known a proposal is as likely right as wrong.
        rates = (self._kept + 0.5) / (self._tried + 1)
        return 1 + float(np.cumprod(rates[: width - 1]).sum())


def at_chance(name: str, lengths: Sequence[int], widths_of: Sequence[int]) -> str | None:
    """What to say if proposals are hardly ever right, which no drafter of a model is; else None."""
    if len(lengths) < ENOUGH_ROUNDS:
        return None
    right = by_position(lengths, widths_of)[0]
    if right >= CHANCE:
        return None
    return (
        f"{name} proposed the right next token in {right:.1%} of "
        f"{len(lengths)} rounds, as good as never, so it only costs time.  The likely causes: "
        "drafter and backbone are of different checkpoints; the QKV rows were read in the wrong "
        "order (qkv=, see `mimo-jax inspect`); mask_embedding.pt is that of another model; the "
        "weights are random; or the text is unlike any that the drafter was trained on"
    )


def by_position(lengths: Sequence[int], widths_of: Sequence[int]) -> tuple[float, ...]:
    """Share of rounds that kept the first proposal, the first two, and so on.

    Args:
      lengths: tokens of each round.
      widths_of: its width.
    """
    n, w = np.asarray(lengths), np.asarray(widths_of)
    most = int(w.max(initial=1))
    return tuple(float((n > i).sum() / max(1, (w > i).sum())) for i in range(1, most))
