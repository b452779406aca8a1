"""Files of requests and of their results, a line of JSON each.

A request has one of "prompt" (text), "messages" (chat) and "token_ids"; "id", if its line number
should not be its name; and any field of `SamplingParams`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from mimo_jax.decoding.sampling import SamplingParams

PROMPT_FIELDS = ("prompt", "messages", "token_ids")
# More would make a result, or one request's share of the batches, absurdly long.
MOST = {"n": 128, "logprobs": 20}
# Every result begins so, which tells a torn one from another program's file.
RESULT_BEGINS = b'{"line": '


class ResultsError(Exception):
    """Results can't be written, or those in the file are of another run; says what to do."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A well-formed request.

    Attributes:
      line: its number in the file, from 1.
      id: its name, unique in the file.
      field: which of PROMPT_FIELDS it has.
      prompt: the value of that field.
      params: with a seed, always.
    """

    line: int
    id: str
    field: str
    prompt: Any
    params: SamplingParams

    def echo(self) -> dict[str, Any]:
        """The part of its result that is known before it runs."""
        params = dataclasses.asdict(self.params)
        params["stop"] = list(self.params.stop)
        return {"line": self.line, "id": self.id, self.field: self.prompt, "params": params}


@dataclasses.dataclass(frozen=True)
class Failure:
    """A line that can't be completed, and why."""

    line: int
    id: str | None
    type: str
    message: str

    def result(self) -> dict[str, Any]:
        """Its line of results."""
        error = {"type": self.type, "message": self.message}
        return {"line": self.line, "id": self.id, "error": error}


def read_requests(
    path: Path, defaults: Mapping[str, Any], seed: int
) -> tuple[list[Request], list[Failure]]:
    """Reads and checks a file of requests; a bad line spoils no other.

    Args:
      path: the file; empty lines are skipped.
      defaults: sampling fields of requests that don't have them; None is no default.
      seed: requests without a seed get one that follows from this and their id.

    Raises:
      OSError: the file can't be read.
    """
    requests, failures, seen = [], [], set()
    defaults = {name: value for name, value in defaults.items() if value is not None}
    for number, raw in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not raw.strip():
            continue
        request_id = None
        try:
            fields = json.loads(raw.decode())
            if not isinstance(fields, dict):
                raise ValueError(f"a line is a JSON object; found {type(fields).__name__}")
            json.dumps(fields, ensure_ascii=False).encode()  # refuses half surrogate pairs
            request_id = _take_id(fields, number)
            if request_id in seen:
                raise ValueError(f"the id {request_id!r} is an earlier line's; ids are unique")
            seen.add(request_id)
            field, prompt = _take_prompt(fields)
            params = _params({**defaults, **fields}, seed, request_id)
            requests.append(Request(number, request_id, field, prompt, params))
        except (ValueError, RecursionError) as error:
            failures.append(Failure(number, request_id, "invalid_request", str(error)))
    return requests, failures


def _take_id(fields: dict[str, Any], number: int) -> str:
    request_id = fields.pop("id", None)
    if request_id is None:
        return f"line-{number}"
    if not isinstance(request_id, str) or not request_id:
        raise ValueError(f"id is {request_id!r}; it must be a non-empty string")
    return request_id


def _take_prompt(fields: dict[str, Any]) -> tuple[str, Any]:
    given = [name for name in PROMPT_FIELDS if name in fields]
    if len(given) != 1:
        found = " and ".join(given) or f"none of them, but {', '.join(fields) or 'nothing'}"
        raise ValueError(f"a line has one of {', '.join(PROMPT_FIELDS)}; found {found}")
    field, prompt = given[0], fields.pop(given[0])
    if field == "prompt":
        expected, right = "a string", isinstance(prompt, str)
    else:
        item = dict if field == "messages" else int
        expected = "a list of chat messages" if item is dict else "a list of integers"
        right = isinstance(prompt, list) and all(type(x) is item for x in prompt)
    if not right or not prompt:
        shown = json.dumps(prompt)
        shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
        raise ValueError(f"{field} is {shown}; it must be {expected}, and not empty")
    return field, prompt


def _params(fields: Mapping[str, Any], seed: int, request_id: str) -> SamplingParams:
    params = SamplingParams.from_dict(fields)
    for name, most in MOST.items():
        if (getattr(params, name) or 0) > most:
            raise ValueError(f"{name} is {getattr(params, name)}; in a batch it is at most {most}")
    if params.seed is None:
        # 48 bits, which every JSON reader takes exactly.
        digest = hashlib.blake2b(f"{seed}:{request_id}".encode(), digest_size=6).digest()
        params = dataclasses.replace(params, seed=int.from_bytes(digest))
    return params


class Results:
    """A file of results: those in it, and appending to it durably.

    Half a line at the end, which a killed run can leave, is cut off.

    Attributes:
      path: the file.
      records: its lines.

    Raises:
      ResultsError: it can't be written, or is not a file of results; it is then left as it was.
    """

    def __init__(self, path: Path):
        self.path = path
        self.records: list[dict[str, Any]] = []
        if path.exists() and not path.is_file():
            raise ResultsError(f"{path} is not a regular file; give the name of one")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes() if path.exists() else b""
            whole, newline, torn = content.rpartition(b"\n")
            for number, line in enumerate(whole.split(b"\n") if newline else (), 1):
                self.records.append(self._parse(line, number))
            if not (torn.startswith(RESULT_BEGINS) or RESULT_BEGINS.startswith(torn)):
                self._refuse(len(self.records) + 1)
            self._end = len(whole + newline)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            os.ftruncate(self._file, self._end)
            os.lseek(self._file, self._end, os.SEEK_SET)
        except OSError as error:
            raise ResultsError(f"{path} can't be written: {error}") from error

    @property
    def completed(self) -> dict[str, dict[str, Any]]:
        """Completions by id."""
        return {record["id"]: record for record in self.records if "text" in record}

    @property
    def failed(self) -> set[int]:
        """Lines that have an error and, if they were corrected since, no completion either."""
        lines = {record["line"] for record in self.records if "error" in record}
        return lines - {record["line"] for record in self.records if "text" in record}

    def append(self, record: dict[str, Any]) -> None:
        """Adds a line, which is on the disk afterwards.

        Raises:
          ResultsError: it is not; the file then has the earlier lines only.
        """
        data = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        try:
            written = 0
            while written < len(data):
                written += os.write(self._file, data[written:])
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, self._end)
            os.lseek(self._file, self._end, os.SEEK_SET)
            raise ResultsError(
                f"writing {self.path} failed ({error}); the {len(self.records)} lines in it are "
                "safe: see to the cause, then run the same command to go on"
            ) from error
        self._end += len(data)
        self.records.append(record)

    def add_failures(self, failures: Iterable[Failure]) -> None:
        """Adds the failures of lines that have none yet."""
        known = self.failed
        for failure in failures:
            if failure.line not in known:
                self.append(failure.result())

    def check_unchanged(self, requests: Iterable[Request]) -> None:
        """Checks that what is completed is what the requests ask for.

        Raises:
          ResultsError: a prompt or sampling parameters differ.
        """
        completed = self.completed
        for request in requests:
            record, echo = completed.get(request.id), request.echo()
            for name in (request.field, "params"):
                if record is not None and record.get(name) != echo[name]:
                    raise ResultsError(
                        f"{self.path} has {request.id!r} with other {name} than asked for now; "
                        "give another output file, or the input and options it was begun with"
                    )

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError:
            self._refuse(number)
        if not isinstance(record, dict) or not {"line", "id"} <= record.keys():
            self._refuse(number)
        if not {"text", "error"} & record.keys():
            self._refuse(number)
        return record

    def _refuse(self, number: int) -> NoReturn:
        raise ResultsError(
            f"line {number} of {self.path} is no result of a batch, so nothing was written to it; "
            "give another output file, or move that one away"
        )
