"""The lines of a file that may be compressed, endless or broken, in bounded memory."""

from __future__ import annotations

import contextlib
import hashlib
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CHUNK = 1 << 20
# A prompt of a million tokens has some 8 MB of JSON.
MAX_LINE = 64 << 20
GZIP_MAGIC = b"\x1f\x8b\x08"  # with the one method of compression there is
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_GZIP_FORMAT = 31  # zlib's number for it: a window of 2**15 in a gzip wrapper


class Line(NamedTuple):
    """A line without its end, or what is wrong with it.

    Attributes:
      number: from 1; empty lines count.
      raw: its bytes; empty if there is a problem.
      problem: why its bytes can't be had, or None.
    """

    number: int
    raw: bytes
    problem: str | None = None


class Lines:
    """The lines of a file or of the standard input; to be iterated over once.

    What is compressed with gzip is recognised by its first bytes (or its name), and read as far as
    it goes: where it is cut off or damaged, a last line has that as its problem.  A line that is
    too long is passed over without being held.

    Args:
      source: a file's path; "-" is the standard input.
      max_line: bytes that a line may have.

    Raises:
      OSError: when iterating; the file can't be read.
    """

    def __init__(self, source: str | Path, max_line: int = MAX_LINE):
        self.source = str(source)
        self.max_line = max_line
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of the bytes read, as they are stored: of the whole file, once iteration has ended."""
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[Line]:
        with contextlib.ExitStack() as stack:
            if self.source == "-":
                if sys.stdin is None:
                    raise OSError("there is no standard input to read; give it one, or a file")
                file = sys.stdin.buffer
            else:
                file = stack.enter_context(open(self.source, "rb"))
            chunks = self._chunks(file)
            first = next(chunks, b"")
            packed = first.startswith(GZIP_MAGIC) or self.source.endswith(".gz")
            content = _prepend(first, chunks)
            yield from self._split(_gunzip(content) if packed else content)
            for _ in chunks:  # what follows damage belongs to the hash, too
                pass

    def _chunks(self, file) -> Iterator[bytes]:
        while chunk := file.read(CHUNK):
            self._hash.update(chunk)
            yield chunk

    def _split(self, content: Iterator[bytes]) -> Iterator[Line]:
        number, size, held = 1, 0, []
        try:
            for chunk in content:
                *ends, rest = chunk.split(b"\n")
                for end in ends:
                    yield self._line(number, size + len(end), [*held, end])
                    number, size, held = number + 1, 0, []
                size += len(rest)
                held = [*held, rest] if size <= self.max_line else []
        except _DamagedError as damage:
            yield Line(number, b"", f"{damage}; the lines before this one are kept")
            return
        if size:
            yield self._line(number, size, held)

    def _line(self, number: int, size: int, pieces: list[bytes]) -> Line:
        if size > self.max_line:
            problem = f"the line has {size} bytes; it may have {self.max_line}: split or shorten it"
            return Line(number, b"", problem)
        raw = b"".join(pieces)
        return Line(number, raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw)


def _prepend(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


class _DamagedError(Exception):
    """Compressed data that ends or goes wrong here."""


def _gunzip(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Decompresses; everything before the damage comes out before `_DamagedError` is raised.

    gzip.GzipFile would drop what the last call decompressed before the damage.
    """
    member, any_member = None, False
    for chunk in chunks:
        more = True
        while chunk or (member and more):
            if member is None:
                chunk = chunk.lstrip(b"\0") if any_member else chunk  # padding between members
                if not chunk:
                    break
                member, any_member = zlib.decompressobj(wbits=_GZIP_FORMAT), True
            before = member.copy()
            try:
                piece = member.decompress(chunk, CHUNK)
            except zlib.error as error:
                yield from _before_the_damage(before, chunk)
                reason = str(error).rpartition(": ")[2] or str(error)
                raise _DamagedError(
                    f"the gzip data is damaged here ({reason}), and what precedes may be, too: "
                    "make the file anew"
                ) from None
            yield piece
            more = len(piece) == CHUNK  # there may be output that waits without input
            chunk = member.unused_data if member.eof else member.unconsumed_tail
            member = None if member.eof else member
    if member is not None or not any_member:
        where = "inside of this line" if any_member else "before it begins"
        raise _DamagedError(f"the gzip data ends {where}: copy or compress the file anew")


def _before_the_damage(member, chunk: bytes) -> Iterator[bytes]:
    for i in range(len(chunk)):
        try:
            yield member.decompress(chunk[i : i + 1])
        except zlib.error:
            return
