"""Which prompts begin alike, and which beginnings are kept in snapshots.

A prefix is a whole number of chunks of the largest size.  It is known by a hash of its tokens, so
that the work for a prompt is proportional to its length, however many others there are.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Sequence

# Of a prefix and all shorter ones of a prompt: the first is that of one chunk.
Keys = tuple[bytes, ...]
_DIGEST = 16  # bytes; a collision would mix up prompts, but nobody sees one of 2**64 prefixes


class Prefixes:
    """Prefixes of the prompts that wait, that are being computed, and of the snapshots.

    Args:
      chunk: tokens of a chunk.
      capacity: how many snapshots there may be, numbered from 0.
    """

    def __init__(self, chunk: int, capacity: int):
        self.chunk = chunk
        self.capacity = capacity
        self._waiting: Counter[bytes] = Counter()
        self._coming: Counter[bytes] = Counter()
        self._snapshots: OrderedDict[bytes, tuple[int, Keys]] = OrderedDict()  # oldest use first
        self._pins: Counter[int] = Counter()

    def keys(self, tokens: Sequence[int]) -> Keys:
        """The keys of a prompt's prefixes; none if there are no snapshots."""
        keys, state = [], hashlib.blake2b(digest_size=_DIGEST)
        full = len(tokens) // self.chunk if self.capacity else 0
        for start in range(0, full * self.chunk, self.chunk):
            state.update(array("q", tokens[start : start + self.chunk]).tobytes())
            keys.append(state.digest())
        return tuple(keys)

    def wait(self, keys: Keys) -> None:
        """A prompt waits that could start from any of these."""
        self._waiting.update(keys)

    def cease_to_wait(self, keys: Keys) -> None:
        """The opposite of `wait`."""
        _subtract(self._waiting, keys)

    def compute(self, keys: Iterable[bytes]) -> None:
        """A lane is going to compute these."""
        self._coming.update(keys)

    def cease_to_compute(self, keys: Iterable[bytes]) -> None:
        """A lane has computed these, or won't."""
        _subtract(self._coming, keys)

    def saved(self, keys: Keys) -> int:
        """The length in chunks of the longest of these prefixes that is in a snapshot, or 0."""
        return _longest(keys, self._snapshots)

    def coming(self, keys: Keys) -> int:
        """The length in chunks of the longest of these prefixes that a lane is to compute, or 0."""
        return _longest(keys, self._coming)

    def pin(self, key: bytes) -> int:
        """The number of the snapshot of a prefix, which stays until `unpin` is called."""
        self._snapshots.move_to_end(key)
        number = self._snapshots[key][0]
        self._pins[number] += 1
        return number

    def unpin(self, number: int) -> None:
        """The opposite of `pin`."""
        _subtract(self._pins, (number,))

    def has_room(self) -> bool:
        """Whether a snapshot can be made."""
        return len(self._snapshots) < self.capacity or self._useless({}) is not None

    def save(self, keys: Keys, length: int) -> int | None:
        """The number of a new snapshot of the first `length` chunks of a prompt, if it is wanted.

        It is if a prompt waits that has this prefix, but not the next one, for which it would
        rather wait.  Another snapshot gives way if it is pinned by nobody and of use for no prompt
        that waits, the one first whose last use is longest ago.  If there is none such the new one
        isn't made: of more families of prompts than snapshots some get theirs, where replacing the
        oldest could make all of them lose it just before it is used.

        Args:
          keys: of the prompt, longer prefixes included.
          length: from 1 to len(keys).
        """
        key = keys[length - 1]
        further = self._waiting[keys[length]] if length < len(keys) else 0
        if self._waiting[key] == further or key in self._snapshots:
            return None
        if len(self._snapshots) < self.capacity:
            used = {number for number, _ in self._snapshots.values()}
            number = next(i for i in range(self.capacity) if i not in used)
        else:
            useless = self._useless({key: keys[:length]})
            if useless is None:
                return None
            number, _ = self._snapshots.pop(useless)
        self._snapshots[key] = (number, keys[:length])
        return number

    def _useless(self, more: dict[bytes, Keys]) -> bytes | None:
        """The snapshot that no prompt that waits would start from, if there were `more`."""
        paths = {key: path for key, (_, path) in self._snapshots.items()} | more
        starts = {key: self._waiting[key] for key in paths}
        for key, path in paths.items():
            shorter = _longest(path[:-1], paths)
            if shorter:
                starts[path[shorter - 1]] -= self._waiting[key]
        for key, (number, _) in self._snapshots.items():
            if not starts[key] and not self._pins[number]:
                return key
        return None

    def lengths(self) -> list[int]:
        """How many chunks each snapshot has."""
        return [len(path) for _, path in self._snapshots.values()]

    def check(self, waiting: Iterable[Keys], coming: Iterable[Keys], pinned: Iterable[int]) -> None:
        """Compares what is known with what it should be; raises AssertionError."""
        assert dict(self._waiting) == dict(Counter(key for keys in waiting for key in keys))
        assert dict(self._coming) == dict(Counter(key for keys in coming for key in keys))
        assert dict(self._pins) == dict(Counter(pinned))
        numbers = [number for number, _ in self._snapshots.values()]
        assert len(set(numbers)) == len(numbers) <= self.capacity
        assert all(0 <= number < self.capacity for number in numbers)
        assert set(self._pins) <= set(numbers)


def _longest(keys: Keys, known: Collection[bytes]) -> int:
    return next((i for i in range(len(keys), 0, -1) if keys[i - 1] in known), 0)


def _subtract(counter: Counter, keys: Iterable) -> None:
    """Forgets what has no count left, so that memory stays bounded."""
    for key in keys:
        counter[key] -= 1
        if not counter[key]:
            del counter[key]
