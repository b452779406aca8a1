"""Reading a file of requests, a line of JSON each, of which any may be bad.

A plain line has one of "prompt" (text), "messages" (chat) and "token_ids"; "id", if its line number
should not be its name; and any field of `SamplingParams`.  Lines of OpenAI's batch API are told by
their custom_id and body (`openai_batch`); a file may have both.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mimo_jax.decoding.sampling import SamplingParams
from mimo_jax.engine import openai_batch, strict_json
from mimo_jax.engine.lines import MAX_LINE, Line, Lines
from mimo_jax.engine.prompts import PROMPT_FIELDS, check_prompt

Convention = Literal["plain", "openai"]
# More would make a result, or one request's share of the batches, absurdly long.
MOST = {"n": 128, "logprobs": 20}
_LONGEST_MESSAGE = 500


@dataclasses.dataclass(frozen=True)
class Request:
    """A well-formed request.

    Attributes:
      line: its number in the file, from 1.
      id: its name (OpenAI's custom_id), unique in the file.
      field: which of PROMPT_FIELDS it has.
      prompt: the value of that field.
      params: with a seed, always.
      convention: of its line, which its result has, too.
    """

    line: int
    id: str
    field: str
    prompt: Any
    params: SamplingParams
    convention: Convention = "plain"

    def echo(self) -> dict[str, Any]:
        """What its plain result repeats of it."""
        params = dataclasses.asdict(self.params)
        params["stop"] = list(self.params.stop)
        return {self.field: self.prompt, "params": params}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells it from other requests: a hash of id and prompt, "-", and one of all the rest."""
        prompt = json.dumps([self.id, self.field, self.prompt]).encode()
        rest = json.dumps([self.convention, self.echo()["params"]]).encode()
        return f"{_digest(prompt)}-{_digest(rest)}"


@dataclasses.dataclass(frozen=True)
class Failure:
    """A line that can't be completed, and why.

    Attributes:
      line: its number in the file, from 1.
      id: as a request's; None if it can't be read.
      type: "invalid_request" (the line), "invalid_prompt" (for this model) or another word.
      message: a sentence for who wrote the line.
      convention: as a request's.
      fingerprint: tells it from the line as it may be later; of the bytes or of the request.
    """

    line: int
    id: str | None
    type: str
    message: str
    convention: Convention = "plain"
    fingerprint: str = ""

    @classmethod
    def of(cls, request: Request, type: str, message: str) -> Failure:
        """The failure of a request that was well-formed."""
        shown = shorten(message)
        return cls(request.line, request.id, type, shown, request.convention, request.fingerprint)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One of `count` parts of a file: its lines number `index` (from 1), `index` + `count`, ..."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """A shard written as "i/n", of which 1/n to n/n cover every line once.

        Raises:
          ValueError: it is not of that form, or i is not from 1 to n.
        """
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        index, count = map(int, match.groups()) if match else (0, 0)
        if not 1 <= index <= count:
            raise ValueError(
                f"shard is {text[:40]!r}; it must be i/n with i from 1 to n, as in 1/4"
            )
        return cls(index, count)

    def has(self, line: int) -> bool:
        """Whether a line, by its number from 1, is in it."""
        return (line - self.index) % self.count == 0

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclasses.dataclass(frozen=True)
class RequestFile:
    """A file of requests, read.

    Attributes:
      requests: one for each well-formed line, in the order of lines.
      failures: one for each other line that isn't empty.
      sha256: of the file's bytes as they are stored.
      lines: how many lines aren't empty, those outside of the shard included.
    """

    requests: list[Request]
    failures: list[Failure]
    sha256: str
    lines: int


def read_requests(
    source: str | Path,
    defaults: Mapping[str, Any],
    seed: int,
    shard: Shard | None = None,
    max_line: int = MAX_LINE,
) -> RequestFile:
    """Reads and checks a file of requests; a bad line spoils no other.

    Args:
      source: a path, of a gzip file as well; "-" is the standard input.  Empty lines are skipped.
      defaults: sampling fields of requests that don't have them; None is no default.
      seed: requests without a seed get one that follows from this and their id.
      shard: which lines to keep; ids are unique in the whole file nevertheless.
      max_line: bytes that a line may have.

    Raises:
      OSError: the file can't be read.
    """
    defaults = {name: value for name, value in defaults.items() if value is not None}
    requests: list[Request] = []
    failures: list[Failure] = []
    ids: set[str] = set()
    convention: Convention | None = None
    lines, count = Lines(source, max_line), 0
    for line in lines:
        if line.problem is None and not line.raw.strip():
            continue
        count += 1
        outcome, found = _read_line(line, defaults, seed, ids, convention or "plain")
        if convention is None and found is not None:
            # What can't be read is answered as the lines around it.
            failures = [dataclasses.replace(f, convention=found) for f in failures]
        convention = found or convention
        kept = shard is None or shard.has(line.number)
        if isinstance(outcome, Request):
            ids.add(outcome.id)
            requests += [outcome] * kept
        else:
            failures += [outcome] * kept
    return RequestFile(requests, failures, lines.sha256, count)


def _read_line(
    line: Line,
    defaults: Mapping[str, Any],
    seed: int,
    ids: set[str],
    convention: Convention,
) -> tuple[Request | Failure, Convention | None]:
    """What a line is, and its convention if that can be told."""
    found: Convention | None = None
    request_id = None
    try:
        if line.problem is not None:
            raise ValueError(line.problem)
        fields = strict_json.loads(line.raw)
        if not isinstance(fields, dict):
            raise ValueError(f"a line is a JSON object; found {type(fields).__name__}")
        found = "openai" if openai_batch.is_batch_line(fields) else "plain"
        request_id = _take_id(fields, line.number, found)
        if request_id in ids:
            raise ValueError(f"the id {request_id!r} is an earlier line's; ids are unique")
        if found == "openai":
            field, prompt, sampling = openai_batch.parse(fields)
        else:
            field, prompt = _take_prompt(fields)
            sampling = fields
        params = _params({**defaults, **sampling}, seed, request_id)
        return Request(line.number, request_id, field, prompt, params, found), found
    except ValueError as error:
        raw = line.raw or (line.problem or "").encode()
        fingerprint = f"{_digest(raw)}-{_digest(b'')}"
        message = shorten(str(error))
        kind = found or convention
        return Failure(
            line.number, request_id, "invalid_request", message, kind, fingerprint
        ), found


def _take_id(fields: dict[str, Any], number: int, convention: Convention) -> str:
    name = "custom_id" if convention == "openai" else "id"
    request_id = fields.pop(name, None)
    if request_id is None and convention == "plain":
        return f"line-{number}"
    if not isinstance(request_id, str) or not request_id:
        raise ValueError(f"{name} is {request_id!r}; it must be a non-empty string")
    return request_id


def _take_prompt(fields: dict[str, Any]) -> tuple[str, Any]:
    given = [name for name in PROMPT_FIELDS if name in fields]
    if len(given) != 1:
        found = " and ".join(given) or f"none of them, but {', '.join(fields) or 'nothing'}"
        raise ValueError(f"a line has one of {', '.join(PROMPT_FIELDS)}; found {found}")
    return given[0], check_prompt(given[0], fields.pop(given[0]))


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


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def shorten(message: str) -> str:
    """An error message without the middle of what it quotes, if that is long."""
    if len(message) <= _LONGEST_MESSAGE:
        return message
    half = _LONGEST_MESSAGE // 2
    return f"{message[:half]} ... {message[-half:]}"
