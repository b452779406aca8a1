"""What decoding carries from dispatch to dispatch, and what the host sees of it."""

from __future__ import annotations

import atexit
import collections
import contextlib
import dataclasses
import functools
import threading
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from mimo_jax.decoding.sampling import Logprobs
from mimo_jax.model.cache import KVCache
from pallas_kernels import clock


@no_type_check  # at run time: jax also puts what it knows of an array in an array's place
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What a decoding loop carries.

    Attributes:
      cache: keys and values of all positions before `positions`.
      tokens: the newest token of each row, whose keys are not in the cache yet.
      positions: its position.
      remaining: how many more tokens each row may produce; 0 when it is done.
      drafts: with speculation, tokens [B, n] that may follow, and what the drafter carries.
    """

    cache: KVCache
    tokens: Int32[Array, " B"]
    positions: Int32[Array, " B"]
    remaining: Int32[Array, " B"]
    drafts: Any = None


@functools.partial(jax.jit, donate_argnames="state")
def ended_rows(state: DecodeState, ended: Bool[Array, " B"]) -> DecodeState:
    """The state, given away, with these rows done."""
    return dataclasses.replace(state, remaining=jnp.where(ended, 0, state.remaining))


@no_type_check  # at run time: jax also puts what it knows of an array in an array's place
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
    """What the host looks at after a dispatch, whole on every device (and so in every process).

    Attributes:
      tokens: produced tokens; -1 where there is none.
      logprobs: of them [B, n, ...], if asked for.
      remaining: how many more tokens each row may produce.
      lengths: with speculation, how many tokens each round produced; 0 where a row was done.
      ticks: and what each round's verification and its drafting took, by the device's clock
        (`pallas_kernels.clock`); 0 where it has none.
      width: how many tokens of a row were verified at once.
      compiled: whether the program was compiled first.
    """

    tokens: Int32[Array, "B n"]
    logprobs: Logprobs | None
    remaining: Int32[Array, " B"]
    lengths: Int32[Array, "B rounds"] | None = None
    ticks: Int32[Array, "B rounds 2"] | None = None
    width: int = dataclasses.field(default=1, metadata={"static": True})
    compiled: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def is_ready(self) -> bool:
        """Whether the device has it."""
        tokens: Any = self.tokens
        return tokens.is_ready()

    def on_its_way(self) -> Seen:
        """Itself, whose arrays are copied to the host as soon as the device has them."""
        with _LOCK:
            while _COMING and _COMING[0].is_ready:
                _COMING.popleft()
            _COMING.append(self)
        for array in jax.tree.leaves(self):
            array.copy_to_host_async()
        return self


# All that is on its way, and some that has arrived.
_COMING: collections.deque[Seen] = collections.deque()
_LOCK = threading.Lock()


@atexit.register
def _await_copies() -> None:
    """Waits for what nobody asked for any more, after Ctrl-C or a break from a loop over blocks.

    Where a copy ends, a thread of XLA's takes the interpreter's lock, and if the interpreter has
    ended by then it aborts the process (jaxlib 0.11.2, Python 3.12).
    """
    with contextlib.suppress(Exception):  # of steps that nobody asks about any more
        jax.device_get(list(_COMING))


@dataclasses.dataclass(frozen=True)
class Block:
    """Tokens that one dispatch produced, on the host.

    Attributes:
      tokens: int32 [B, n], a row's one after the other, then -1.
      logprobs: as the device reported them ([B, n, ...]), if asked for.
      lengths: with speculation, int32 [B, rounds]: how many of them each round produced, 0 where a
        row was done.
      phases: float64 [B, rounds, 2], seconds that each round took to verify and to draft; None if
        the device doesn't tell.
      width: how many tokens of a row these rounds verified at once.
    """

    tokens: np.ndarray
    logprobs: Logprobs | None
    lengths: np.ndarray | None = None
    phases: np.ndarray | None = None
    width: int = 1

    @classmethod
    def of(cls, seen: Seen) -> Block:
        """From what the device reported, without the gaps that speculation leaves."""
        if seen.lengths is None:
            return cls(np.asarray(seen.tokens), seen.logprobs)
        tokens = np.asarray(seen.tokens)
        order = np.argsort(tokens < 0, axis=1, kind="stable")

        def ordered(a: Any) -> np.ndarray:
            a = np.asarray(a)
            return np.take_along_axis(a, order.reshape(*order.shape, *[1] * (a.ndim - 2)), axis=1)

        logprobs = jax.tree.map(ordered, seen.logprobs)
        phases = np.asarray(seen.ticks) * clock.TICK
        told = phases if phases.any() else None
        return cls(ordered(tokens), logprobs, np.asarray(seen.lengths), told, seen.width)

    def first(self, rows: int) -> Block:
        """That of the first rows; log-probabilities stay as they are."""
        parts = {"tokens": self.tokens, "lengths": self.lengths, "phases": self.phases}
        return dataclasses.replace(
            self, **{name: a if a is None else a[:rows] for name, a in parts.items()}
        )
