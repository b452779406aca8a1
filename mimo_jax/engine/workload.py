"""Made-up requests to measure with: how long they are, and when they come."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import numpy as np

from mimo_jax.decoding.sampling import SamplingParams
from mimo_jax.engine.loop import Work

_EXPECTED = (
    "expected tokens as 128 (all alike), 32-512 (every number as often) or "
    "lognormal:MEDIAN,SIGMA[,MOST] such as lognormal:128,0.8,1024"
)
# Each has random numbers of its own, so that a change of one leaves the others as they are.
_PROMPT, _OUTPUT, _ARRIVAL, _TOKENS = range(4)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """A distribution of numbers of tokens.

    Attributes:
      text: as people write it (`parse`).
      least: the smallest number that is drawn.
      most: the largest one; None for no bound.
      median: of a lognormal distribution, of which what exceeds the bounds becomes them; None for a
        uniform one.
      sigma: of its logarithm.
    """

    text: str
    least: int
    most: int | None
    median: float | None = None
    sigma: float | None = None

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """A distribution from text: "128", "32-512" or "lognormal:MEDIAN,SIGMA[,MOST]".

        Raises:
          ValueError: it is none of these, or a number is out of range.
        """
        if found := re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip()):
            least, most = int(found[1]), int(found[2] or found[1])
            if not 1 <= least <= most:
                raise ValueError(f"lengths {text!r}: at least 1 token, and the smaller one first")
            return cls(text, least, most)
        name, _, numbers = text.strip().partition(":")
        try:
            median, sigma, *rest = [float(number) for number in numbers.split(",")]
            bound = rest[0] if rest else None
        except ValueError:
            raise ValueError(f"lengths {text!r}: {_EXPECTED}") from None
        if name != "lognormal" or len(rest) > 1:
            raise ValueError(f"lengths {text!r}: {_EXPECTED}")
        if not (1 <= median < math.inf and 0 <= sigma < math.inf):
            raise ValueError(
                f"lengths {text!r}: MEDIAN must be at least 1 and SIGMA at least 0, both finite"
            )
        if bound is not None and not (bound.is_integer() and bound >= median):
            raise ValueError(f"lengths {text!r}: MOST must be a whole number, at least MEDIAN")
        return cls(text, 1, None if bound is None else int(bound), median, sigma)

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """So many lengths, int64; the first ones are the same however many."""
        if self.median is None or self.sigma is None:
            assert self.most is not None
            return rng.integers(self.least, self.most, size=count, endpoint=True)
        drawn = rng.lognormal(math.log(self.median), self.sigma, count)
        most = 2**31 - 1 if self.most is None else self.most
        return np.clip(np.rint(drawn), self.least, most).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Workload:
    """Requests of random tokens.  The same arguments make the same ones, and the first of more
    requests are those of fewer.

    Attributes:
      prompt: how long prompts are.
      output: how long outputs are, independently of the prompts.
      requests: how many.
      rate: requests a second, of a Poisson process that begins with the first; None if all are
        there at the start.
      seed: of all that is random.

    Raises:
      ValueError: there are no requests, the rate is not positive, or the seed is negative.
    """

    prompt: Lengths
    output: Lengths
    requests: int
    rate: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.requests < 1:
            raise ValueError(f"the workload has {self.requests} requests; give it at least 1")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise ValueError(
                f"the rate is {self.rate} requests/s; give a positive one, or none for requests "
                "that are all there at the start"
            )
        if self.seed < 0:
            raise ValueError(f"the workload's seed is {self.seed}; give one from 0 on")

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of each prompt, and of each output."""
        prompt = self.prompt.draw(self._rng(_PROMPT), self.requests)
        return prompt, self.output.draw(self._rng(_OUTPUT), self.requests)

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output together."""
        return int(np.sum(self.lengths(), axis=0).max())

    def check(self, positions: int) -> None:
        """Refuses requests that a model of so many positions can't run.

        Raises:
          ValueError: one is longer.
        """
        prompts, outputs = self.lengths()
        i = int(np.argmax(prompts + outputs))
        if prompts[i] + outputs[i] > positions:
            raise ValueError(
                f"a request of the workload has {prompts[i]} tokens of prompt and {outputs[i]} of "
                f"output, but the model has {positions} positions; shorten the lengths "
                f"({self.prompt.text} and {self.output.text}), such as by MOST of lognormal"
            )

    def arrivals(self) -> np.ndarray:
        """Seconds from the start until each request comes, float64, ascending."""
        if self.rate is None:
            return np.zeros(self.requests)
        gaps = self._rng(_ARRIVAL).exponential(1 / self.rate, self.requests)
        return np.cumsum(gaps) - gaps[0]

    def works(self, vocabulary: int) -> list[tuple[float, Work]]:
        """The requests, each with the seconds from the start until it comes.

        Their outputs are greedy and as long as was drawn, whatever tokens come.

        Args:
          vocabulary: prompts have token ids below it.
        """
        prompts, outputs = self.lengths()
        return [
            (float(after), random_work(i, self._rng(_TOKENS, i), vocabulary, prompt, output))
            for i, (after, prompt, output) in enumerate(
                zip(self.arrivals(), prompts.tolist(), outputs.tolist(), strict=True)
            )
        ]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the number of requests is left to each measurement."""
        return {
            "prompt_tokens": self.prompt.text,
            "output_tokens": self.output.text,
            "arrival": "all at once" if self.rate is None else "poisson",
            "requests_per_s": self.rate,
            "seed": self.seed,
        }

    def _rng(self, *of: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *of])


def random_work(
    key: int, rng: np.random.Generator, vocabulary: int, prompt: int, output: int
) -> Work:
    """A request with random tokens and a greedy output of just so many."""
    tokens = rng.integers(vocabulary, size=prompt).tolist()
    greedy = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    return Work(key, tokens, greedy, seed=key)
