"""What a request asks for, and how a token is drawn from logits.

`SamplingParams` is what people write; `RowParams` is the same on the device, one entry a row of the
batch.  The target distribution of a row is by definition softmax(`processed_logits`), and `sample`
draws from it with randomness that depends on the row's seed and on the position of the token, on
nothing else.  Logits may be split over a mesh by rows and by vocabulary: `sample` and `logprobs`
bring a row together where they must, and greedy decoding never does.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from sharding.types import by_rows, entries, reshard

# Temperatures below this mean greedy decoding, as in vLLM.
GREEDY_BELOW = 1e-5
# The top-k/top-p cutoff is looked for among this many largest logits before all of them are sorted;
# on a CPU, over 152576 logits, lax.top_k(256) takes 0.23 ms and the sort 28 ms.
SHORTLIST = 256


@no_type_check  # at run time: __post_init__ does it, with errors written for the reader
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled; names and meanings are vLLM's.

    Attributes:
      temperature: divides the logits; 0 (anything below 1e-5) is greedy decoding.
      top_p: keep the fewest most probable tokens whose probabilities reach this sum.
      top_k: keep this many most probable tokens; 0 or -1 keeps all.
      min_p: keep tokens at least this fraction as probable as the most probable one.
      max_tokens: most tokens to generate.
      stop: strings that end generation; the output ends before them.  Stored as a tuple.
      seed: of the request's randomness; None lets the engine choose.
      n: completions a prompt.
      logprobs: how many most probable tokens to report log-probabilities of, besides the chosen
        one; None reports nothing.
      ignore_eos: go on after an end-of-sequence token.

    Raises:
      ValueError: a value is of the wrong type or out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 256
    stop: Sequence[str] = ()
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self):
        set_field = object.__setattr__  # the dataclass is frozen
        set_field(self, "temperature", _number("temperature", self.temperature, 3e38))
        set_field(self, "min_p", _number("min_p", self.min_p, 1.0))
        set_field(self, "top_p", _number("top_p", self.top_p, 1.0, excluded=0.0))
        for name, low, high in (
            ("top_k", -1, 2**31 - 1),
            ("max_tokens", 1, 2**31 - 1),
            ("n", 1, 2**31 - 1),
            ("seed", 0, 2**64 - 1),
            ("logprobs", 0, 2**31 - 1),
        ):
            value = getattr(self, name)
            if value is not None or name not in ("seed", "logprobs"):
                set_field(self, name, _integer(name, value, low, high))
        set_field(self, "stop", _stop_strings(self.stop))
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos is {self.ignore_eos!r}; it must be True or False")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature < GREEDY_BELOW

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SamplingParams:
        """Parameters from JSON-like fields; None stands for a field's default.

        Raises:
          ValueError: a field is unknown (the nearest names are given) or its value is refused.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        problems = []
        for name in fields:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=2, cutoff=0.5)
                hint = f" (did you mean {' or '.join(near)}?)" if near else ""
                problems.append(f"{name!r}{hint}")
        if problems:
            raise ValueError(
                f"unknown sampling parameter {', '.join(problems)}; known are {', '.join(known)}"
            )
        return cls(**{name: value for name, value in fields.items() if value is not None})


def _number(name: str, value: Any, high: float, excluded: float | None = None) -> float:
    numeric = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        number = float(value) if numeric else math.nan
    except OverflowError:  # an integer beyond all floats
        number = math.inf
    if not 0 <= number <= high or number == excluded:
        but = "" if excluded is None else f", but not {excluded:g}"
        raise ValueError(f"{name} is {value!r}; it must be a number from 0 to {high:g}{but}")
    return number


def _integer(name: str, value: Any, low: int, high: int) -> int:
    integral = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not integral or not low <= int(value) <= high:
        raise ValueError(f"{name} is {value!r}; it must be an integer from {low} to {high}")
    return int(value)


def _stop_strings(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or not all(isinstance(s, str) and s for s in strings):
        raise ValueError(f"stop is {stop!r}; it must be a non-empty string or a list of them")
    return tuple(strings)


@no_type_check  # at run time: jax also puts what it knows of an array in an array's place
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowParams:
    """What rows of a batch ask for, as arrays on the host or on devices, an entry a row.

    What no row asks for isn't part of a program: a condition on the device would do as well, but
    makes a GPU wait for the host at every step.

    Attributes:
      temperature: 0 marks a greedy row.
      top_p: as in `SamplingParams`, and so are the next two.
      top_k: 0 or less keeps all tokens.
      min_p: 0 keeps all tokens.
      key_data: threefry key of the row's seed.
      ignore_eos: go on after an end-of-sequence token.
      sampled: whether rows may have a temperature above 0.
      narrowed: whether such rows may have a top-k or a top-p.
    """

    temperature: Float32[Any, " B"]
    top_p: Float32[Any, " B"]
    top_k: Int32[Any, " B"]
    min_p: Float32[Any, " B"]
    key_data: UInt32[Any, "B 2"]
    ignore_eos: Bool[Any, " B"]
    sampled: bool = dataclasses.field(default=True, metadata={"static": True})
    narrowed: bool = dataclasses.field(default=True, metadata={"static": True})

    def for_requests(self, params: Iterable[SamplingParams]) -> RowParams:
        """The same rows, which ask for no more than these do."""
        sampled = [p for p in params if not p.greedy]
        narrowed = any(p.top_k > 0 or p.top_p < 1 for p in sampled)
        return dataclasses.replace(self, sampled=bool(sampled), narrowed=narrowed)


@no_type_check  # at run time: jax also puts what it knows of an array in an array's place
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of the chosen token and of the most probable ones, best first."""

    chosen: Float32[Array, " B *T"]
    top_ids: Int32[Array, "B *T top"]
    top: Float32[Array, "B *T top"]


def row_params(params: Sequence[SamplingParams], seeds: Sequence[int]) -> RowParams:
    """The parameters of a batch, on the host; `seeds` (0 <= seed < 2**64) replace params' own.

    Rows of the same request (n > 1) need different seeds: `sample_seed` makes them.

    Raises:
      ValueError: the two sequences differ in length, or a seed is out of range.
    """
    if len(params) != len(seeds):
        raise ValueError(f"{len(params)} rows of parameters but {len(seeds)} seeds; give one a row")
    halves = [divmod(_integer("seed", s, 0, 2**64 - 1), 2**32) for s in seeds]
    return RowParams(
        temperature=np.array([0.0 if p.greedy else p.temperature for p in params], np.float32),
        top_p=np.array([p.top_p for p in params], np.float32),
        top_k=np.array([p.top_k for p in params], np.int32),
        min_p=np.array([p.min_p for p in params], np.float32),
        key_data=np.array(halves, np.uint32).reshape(-1, 2),
        ignore_eos=np.array([p.ignore_eos for p in params], bool),
    )


def sample_seed(seed: int, index: int) -> int:
    """The seed of completion `index` of a request with `seed`; the first one has `seed` itself.

    Derived by hashing and not by addition, so that requests with neighbouring seeds share nothing.
    """
    if index == 0:
        return seed
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])


def mask_vocabulary(logits: Float32[Array, "*b V"], n_valid: int) -> Float32[Array, "*b V"]:
    """Sets the logits of ids >= n_valid, which have no tokenizer entry, to -inf.

    To be applied before everything else here.

    Raises:
      ValueError: n_valid would leave no token.
    """
    if n_valid < 1:
        raise ValueError(f"n_valid is {n_valid}; at least one token id must remain")
    return jnp.where(jnp.arange(logits.shape[-1]) < n_valid, logits, -jnp.inf)


def processed_logits(logits: Float32[Array, "B V"], rows: RowParams) -> Float32[Array, "B V"]:
    """Logits whose softmax is the distribution that tokens of each row are drawn from.

    In vLLM's order: temperature, min-p, top-k, top-p, each acting on what the one before left;
    removed tokens get -inf.  Of tokens with equal logits at the edge of top-k or top-p the lower
    ids stay, so that top-k keeps exactly k and top-p the fewest tokens whose renormalised
    probabilities sum to at least p (up to float32 rounding of the sum), always one or more.  In a
    greedy row the most probable token, the lowest id among equals, gets 0 and all others -inf.
    """
    V = logits.shape[-1]
    greedy = rows.temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, rows.temperature)[:, None]
    floor = jnp.max(scaled, axis=-1) + jnp.log(rows.min_p)
    scaled = jnp.where(scaled >= floor[:, None], scaled, -jnp.inf)
    if rows.narrowed:
        limited = (rows.top_k > 0) & (rows.top_k < V)
        narrowed = ~greedy & (limited | (rows.top_p < 1))
        scaled = _keep_top(scaled, rows, limited, narrowed)
    best = jnp.arange(V) == jnp.argmax(logits, axis=-1)[:, None]
    return jnp.where(greedy[:, None], jnp.where(best, 0.0, -jnp.inf), scaled)


def _keep_top(
    x: Float32[Array, "B V"],
    rows: RowParams,
    limited: Bool[Array, " B"],
    narrowed: Bool[Array, " B"],
) -> Float32[Array, "B V"]:
    """top-k, then top-p, of the `narrowed` rows; `limited` are those that have a top-k."""
    V = x.shape[-1]
    S = min(SHORTLIST, V)
    total = jax.nn.logsumexp(x, axis=-1)

    def count(ordered: Array) -> Array:
        """How many tokens stay, [B], given the largest logits in descending order."""
        inside = ~limited[:, None] | (jnp.arange(ordered.shape[-1]) < rows.top_k[:, None])
        ordered = jnp.where(inside, ordered, -jnp.inf)
        mass = jnp.where(limited, jax.nn.logsumexp(ordered, axis=-1), total)
        sums = jnp.cumsum(jnp.exp(ordered - mass[:, None]), axis=-1)
        before = jnp.pad(sums[:, :-1], ((0, 0), (1, 0)))
        reached = (before >= rows.top_p[:, None]) & (rows.top_p < 1)[:, None]
        return jnp.maximum(jnp.sum(inside & ~reached, axis=-1), 1)

    def smallest_kept(ordered: Array, kept: Array) -> Array:
        ranks = jnp.arange(ordered.shape[-1])
        return jnp.min(jnp.where(ranks < kept[:, None], ordered, jnp.inf), axis=-1)

    def from_all() -> tuple[Array, Array]:
        ordered = jnp.sort(x, axis=-1, descending=True)
        # A row that the shortlist settles keeps that result: its neighbours must not matter.
        all_kept = jnp.where(settled, kept, count(ordered))
        return all_kept, smallest_kept(ordered, all_kept)

    shortlist = jax.lax.top_k(x, S)[0]
    kept = count(shortlist)
    settled = ~narrowed | jnp.where(limited, rows.top_k <= S, (kept < S) | (S == V))
    kept, edge = jax.lax.cond(
        jnp.all(settled), lambda: (kept, smallest_kept(shortlist, kept)), from_all
    )
    above = x > edge[:, None]
    equal = x == edge[:, None]
    room = kept - jnp.sum(above, axis=-1)
    stays = above | (equal & (jnp.cumsum(equal, axis=-1) <= room[:, None]))
    return jnp.where(stays | ~narrowed[:, None], x, -jnp.inf)


def sample(
    logits: Float32[Array, "B *T V"], rows: RowParams, positions: Int32[Array, " B *T"]
) -> Int32[Array, " B *T"]:
    """Tokens drawn from softmax(processed_logits(logits, rows)) by the Gumbel-max trick.

    A row's noise is a function of its seed and of the position of the token drawn, so the same
    seed gives the same tokens in any row of any batch, and in any block of successive tokens.

    Args:
      logits: of the tokens to draw, one a row or several, already masked (`mask_vocabulary`).
      rows: the rows' parameters.
      positions: positions in their sequences of the tokens to draw.
    """

    def draw(logits: Array, rows: RowParams, positions: Array) -> Array:
        each = math.prod(positions.shape[1:])
        rows = jax.tree.map(lambda a: jnp.repeat(a, each, axis=0), rows)
        gumbel = jax.vmap(noise)(rows.key_data, positions.reshape(-1))
        processed = processed_logits(logits.reshape(-1, logits.shape[-1]), rows)
        return jnp.argmax(processed + gumbel, axis=-1).reshape(positions.shape)

    def noise(key_data: Array, position: Array) -> Array:
        key = jax.random.wrap_key_data(key_data, impl="threefry2x32")
        # Low-resolution noise has some 50 distinct values among the winners of 152576 equal logits;
        # the ties would favour low ids.
        return jax.random.gumbel(
            jax.random.fold_in(key, position), logits.shape[-1:], jnp.float32, mode="high"
        )

    if rows.sampled:
        drawn = by_rows(draw, reshard(logits, entries(logits)[0]), rows, positions)
    else:
        drawn = jnp.argmax(logits, axis=-1)
    return drawn.astype(jnp.int32)


def logprobs(logits: Float32[Array, "B *T V"], tokens: Int32[Array, " B *T"], top: int) -> Logprobs:
    """Natural log-probabilities under softmax(logits), unprocessed as vLLM reports them.

    Args:
      logits: as the model gave them (masked, but not processed by `processed_logits`).
      tokens: the tokens chosen.
      top: how many of the most probable tokens to report as well; equal ones by ascending id.

    Raises:
      ValueError: top is negative or exceeds the vocabulary.
    """
    V = logits.shape[-1]
    if not 0 <= top <= V:
        raise ValueError(f"logprobs of the top {top} tokens were asked for; expected 0 to {V}")
    logits = reshard(logits, entries(logits)[0])
    total = jax.nn.logsumexp(logits, axis=-1)
    # Not a gather: this form needs no sharding hints.
    chosen = jnp.sum(jnp.where(jnp.arange(V) == tokens[..., None], logits, 0.0), axis=-1)
    best, ids = by_rows(lambda x: jax.lax.top_k(x, top), logits)
    return Logprobs(chosen - total, ids.astype(jnp.int32), best - total[..., None])
