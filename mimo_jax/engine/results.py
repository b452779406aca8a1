"""A file of results that loses nothing: every line is on the disk before the next request ends.

What a run that was killed left behind is taken up: finished lines stay, half a line is cut off.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

from mimo_jax.engine.durable import replacing, sync_folder
from mimo_jax.engine.records import Record, failure_record, is_failure, is_record, record_id
from mimo_jax.engine.requests import Failure, Request

# Every record begins so, which tells a torn one from another program's file.
RECORD_BEGINS = b'{"line": '
_LINE_NUMBER = re.compile(rb'\{"line": ([0-9]+)[,}]')
_ADVICE = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room within your quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "mount the file system for writing",
    errno.EIO: "check the disk",
    errno.EACCES: "give a place where you may write",
    errno.EEXIST: "give a path on which nothing but the end is a file",
    errno.ENOTDIR: "give a path on which nothing but the end is a file",
}


class ResultsError(Exception):
    """Results can't be written, or those in the file are of another run; says what to do."""


class Entry(NamedTuple):
    """What is remembered of a record: memory doesn't grow with the texts."""

    id: str | None
    failed: bool
    fingerprint: str


class Results:
    """A file of results: those in it, and appending to it durably.

    Half a line at the end, which a killed run can leave, is cut off, and so are lines that a power
    failure left without their data.  While it is open no other process can open it so.

    Args:
      path: of the file, which is made if it isn't there.

    Attributes:
      entries: what is in it, by the number of the request's line.

    Raises:
      ResultsError: it can't be written, another run writes it, or it is not a file of results; it
        is then left as it was.
    """

    def __init__(self, path: Path):
        self.path = path
        self.entries: dict[int, Entry] = {}
        self._end = 0  # of the last line that is safe
        self._torn = False  # whether something may follow it
        if path.exists() and not path.is_file():
            raise ResultsError(f"{path} is not a regular file; give the name of one")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
            try:
                self._take_up()
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise ResultsError(f"{path} can't be written: {error}; {advice(error)}") from error

    def __len__(self) -> int:
        return len(self.entries)

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets others open the file; nothing can be appended any more."""
        self._closer()

    @property
    def failed(self) -> int:
        """How many lines have an error."""
        return sum(entry.failed for entry in self.entries.values())

    @property
    def completed(self) -> int:
        """How many lines have a completion."""
        return len(self) - self.failed

    def completions(self) -> Iterator[Record]:
        """The records of completions, read from the disk one by one, in the order they ended."""
        with open(self.path, "rb") as file:
            for raw in file:
                if not is_failure(record := json.loads(raw)):
                    yield record

    def pending(self, requests: Iterable[Request]) -> list[Request]:
        """Those of the requests that have neither a completion nor an error."""
        return [request for request in requests if request.line not in self.entries]

    def append(self, *records: Record) -> None:
        """Adds lines, which are on the disk afterwards.

        Raises:
          ResultsError: not all of them are; the file then has the earlier lines and as many whole
            ones of these as could be written.
        """
        if not records:
            return
        lines = [_encode(record) for record in records]
        data, written = b"".join(lines), 0
        try:
            if self._torn:
                os.ftruncate(self._file, self._end)
                self._torn = False
            while written < len(data):
                count = os.pwrite(self._file, memoryview(data)[written:], self._end + written)
                if not count:
                    raise OSError(errno.EIO, "nothing was written")
                written += count
            os.fsync(self._file)
        except BaseException as error:
            # After a failed sync nobody knows what is on the disk, so nothing of it counts.
            synced = not (isinstance(error, OSError) and written == len(data))
            self._cut(records, lines, written if synced else 0)
            if not isinstance(error, OSError):
                raise
            raise ResultsError(
                f"writing {self.path} failed ({error}); the {len(self)} lines in it are safe: "
                f"{advice(error)}, then run the same command to go on"
            ) from error
        self._end += len(data)
        self._remember(records)

    def add_failures(self, failures: Iterable[Failure]) -> None:
        """Adds the failures of lines that have no record yet, all in one write.

        Raises:
          ResultsError: as `append`.
        """
        self.append(*(failure_record(f) for f in failures if f.line not in self.entries))

    def match(
        self, requests: Iterable[Request], failures: Iterable[Failure], force: bool = False
    ) -> None:
        """Checks that what is completed is what is asked for, and forgets errors that are not.

        A line that had an error and was changed since has no record afterwards, so that it is tried
        again; one that is the same keeps its error.  Completions of lines that the input has no
        longer stay.

        Args:
          requests: what the input has now that can be completed.
          failures: and what can't.
          force: keep completions made with other sampling parameters.

        Raises:
          ResultsError: a line with a completion now has another prompt, id or (without `force`)
            other sampling parameters; or the file can't be written.
        """
        left = {line for line, entry in self.entries.items() if entry.failed}
        for outcome in (*requests, *failures):
            entry = self.entries.get(outcome.line)
            if entry is not None and not entry.failed:
                self._check(entry, outcome, force)
            elif entry is not None and entry.fingerprint == outcome.fingerprint:
                left.remove(outcome.line)
        if left:
            kept = {line: entry for line, entry in self.entries.items() if line not in left}
            self.entries = kept
            self._rewrite()

    def _check(self, entry: Entry, outcome: Request | Failure, force: bool) -> None:
        if entry.id != outcome.id or isinstance(outcome, Failure):
            what = f"of {entry.id!r} for line {outcome.line}, which is now another line"
        else:
            # A hash of the prompt and one of the rest.
            then, now = entry.fingerprint.partition("-"), outcome.fingerprint.partition("-")
            if then == now or (force and then[0] == now[0]):
                return
            what = outcome.field if then[0] != now[0] else "params"
            what = f"of {entry.id!r} with other {what} than asked for now"
        raise ResultsError(
            f"{self.path} has a completion {what}; give another output file, or the input and "
            "options it was begun with (new lines go to the input's end)"
        )

    def _open(self) -> None:
        is_new = not self.path.exists()
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        self._closer = weakref.finalize(self, os.close, self._file)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                self.close()
                raise ResultsError(
                    f"another run is writing {self.path}; wait for its end, or give another file"
                ) from error
            # Some network file systems have no locks.
        if is_new:
            sync_folder(self.path.parent)

    def _take_up(self) -> None:
        """Reads what is in the file and cuts off what is no whole line."""
        with open(self.path, "rb") as file:
            head = file.read(len(RECORD_BEGINS))
            if not RECORD_BEGINS.startswith(head):
                _refuse(self.path, 1)
            file.seek(0)
            end, lost, holes = 0, False, False
            for number, raw in enumerate(file, 1):
                if b"\0" in raw or not raw.endswith(b"\n"):
                    if not _may_be_torn(raw):
                        _refuse(self.path, number)
                    lost = True
                    continue
                record = parse_record(raw, self.path, number)
                if record["line"] in self.entries:
                    raise ResultsError(
                        f"{self.path} has two results of line {record['line']}, which no run "
                        "writes; give another output file, or remove one of them"
                    )
                self._remember([record])
                holes = lost
                end += len(raw)
        if holes:
            self._rewrite()
        else:
            os.ftruncate(self._file, end)
            self._end = end

    def _rewrite(self) -> None:
        """Replaces the file by one with the remembered records only."""
        target = self.path.resolve()  # a link stays one
        try:
            with open(target, "rb") as file, replacing(target) as new:
                for raw in file:
                    match = _LINE_NUMBER.match(raw)
                    whole = raw.endswith(b"\n") and b"\0" not in raw
                    if match and whole and int(match[1]) in self.entries:
                        new.write(raw)
                self._end = new.tell()
            self.close()
            self._open()
        except OSError as error:
            raise ResultsError(f"{self.path} can't be written: {error}; {advice(error)}") from error

    def _cut(self, records: tuple[Record, ...], lines: list[bytes], written: int) -> None:
        """Ends the file behind the last whole line that was written and could be synced."""
        whole, size = 0, 0
        while whole < len(lines) and size + len(lines[whole]) <= written:
            size += len(lines[whole])
            whole += 1
        for count, end in ((whole, self._end + size), (0, self._end)):
            with contextlib.suppress(OSError):  # what stays there is cut off by the next run
                os.ftruncate(self._file, end)
                os.fsync(self._file)
                self._end = end
                self._remember(records[:count])
                return
        self._torn = True

    def _remember(self, records: Iterable[Record]) -> None:
        for record in records:
            entry = Entry(record_id(record), is_failure(record), record["fingerprint"])
            self.entries[record["line"]] = entry


def parse_record(raw: bytes, path: Path, number: int) -> Record:
    """A record from its line.

    Raises:
      ResultsError: it is none; names the file and the number of its line.
    """
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):
        _refuse(path, number)
    if not raw.startswith(RECORD_BEGINS) or not is_record(record):
        _refuse(path, number)
    return record


def read_raw(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes, Record]]:
    """The offset, the bytes and the record of each line of a file of results that is complete.

    Raises:
      ResultsError: a line is half or no result.
    """
    offset = 0
    for number, raw in enumerate(file, 1):
        if not raw.endswith(b"\n") and _may_be_torn(raw):
            raise ResultsError(
                f"line {number} of {path} is half a line, which a run that was killed leaves; "
                "run that one to its end first"
            )
        yield offset, raw, parse_record(raw, path, number)
        offset += len(raw)


def _may_be_torn(raw: bytes) -> bool:
    """Whether a line is the beginning of a record.

    After a power failure a file system may show zeros where data was not yet written.
    """
    head = raw.partition(b"\0")[0]
    return head.startswith(RECORD_BEGINS) or RECORD_BEGINS.startswith(head)


def _encode(record: Record) -> bytes:
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    try:
        line = text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, which only an escape can carry
        line = json.dumps(record, allow_nan=False).encode("utf-8")
    if not line.startswith(RECORD_BEGINS):
        raise ValueError(f"a record begins with {RECORD_BEGINS}; found {line[:20]}")
    return line + b"\n"


def advice(error: OSError) -> str:
    """What to do about a file that can't be written."""
    return _ADVICE.get(error.errno or 0, "see to the cause")


def _refuse(path: Path, number: int) -> NoReturn:
    raise ResultsError(
        f"line {number} of {path} is no result of a batch, so nothing was written to it; "
        "give another output file, or move that one away"
    )
