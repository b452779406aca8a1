"""What a study of portability found, as data: results.json is this and nothing else."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from mimo_jax.engine.durable import replacing

SCHEMA = 1
FILE = "results.json"

Status = Literal["ok", "failed", "refused", "not run"]
StageName = Literal["trace", "lower", "compile", "agree", "time"]
STAGES: tuple[StageName, ...] = get_args(StageName)


class ResultsError(ValueError):
    """A file isn't the results of a study; the message says why."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """How far one thing got.

    Attributes:
      status: "ok"; "failed", where it was tried; "refused", where the project's own code says that
        it can't do this case; "not run".
      reason: why, unless it is "ok".
      seconds: that it took; None where it wasn't tried.
    """

    status: Status
    reason: str = ""
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.status != "ok" and not self.reason:
            raise ValueError(f"a stage that is {self.status!r} needs a reason")


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Collectives of one kind.

    Attributes:
      count: how many there are in the program.
      bytes: of their results on one device, together.
    """

    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler says of a program; bytes are those of one device.

    Attributes:
      argument_bytes, output_bytes, alias_bytes, temp_bytes: of its buffers; outputs that are put
        where arguments were are in both of the first and in alias_bytes.
      code_bytes: of the machine code; None where the compiler doesn't say (GPUs).
      usable_bytes: of the device's memory; None where it isn't known.
      collectives: by kind.
      kernels: calls of the project's own kernels, by backend.
      fusions: loops that XLA made.
      library_calls: calls of the vendor's libraries, such as cuBLAS.
      registers: a thread, by the name of each Mosaic GPU kernel.
      spills: kernels that keep values in memory for want of registers.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    code_bytes: int | None
    usable_bytes: int | None
    collectives: Mapping[str, Exchange]
    kernels: Mapping[str, int]
    fusions: int
    library_calls: int
    registers: Mapping[str, int]
    spills: tuple[str, ...]

    @property
    def needed_bytes(self) -> int:
        """Bytes of a device's memory while the program runs."""
        buffers = self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes
        return buffers + (self.code_bytes or 0)

    @property
    def fits(self) -> bool | None:
        """Whether that is there; None where it isn't known."""
        return None if self.usable_bytes is None else self.needed_bytes <= self.usable_bytes


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Numbers beside those of the float32 reference.

    Attributes:
      error: norm of the difference over the norm of the reference.
      limit: the most that is allowed.
      compared: what was, and how it was computed.
    """

    error: float
    limit: float
    compared: str


@dataclasses.dataclass(frozen=True)
class Speed:
    """A time, and what bounds it.

    Attributes:
      seconds: of one call; the median of several groups of calls.
      bytes: that have to be read.
      flops: that have to be done.
      roofline_seconds: what these take at the device's full speed; None where that isn't known.
    """

    seconds: float
    bytes: float
    flops: float
    roofline_seconds: float | None

    @property
    def fraction(self) -> float | None:
        """Of the roofline that is reached."""
        if self.roofline_seconds is None or not self.seconds:
            return None
        return self.roofline_seconds / self.seconds


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing, on one target, by one backend.

    Attributes:
      subject: an operation ("moe"), or a step of a model ("decode").
      case: its sizes, by name.
      target: kind of device and topology, such as "hopper" or "v5p:4x4x4".
      devices: how many the program is for.
      mesh: how they are arranged, "" for one device.
      backend: "reference", "triton", "mosaic_gpu" or "mosaic_tpu", with " interpreted" behind it
        where a CPU plays the device; "auto" where a model's operations choose.
      stages: of each name in STAGES ("trace", "lower", "compile", "agree", "time").
      program: None where it didn't compile.
      agreement, speed: None where they weren't measured.
      run: index of the machine and time in `Results.runs`.
    """

    subject: str
    case: str
    target: str
    devices: int
    mesh: str
    backend: str
    stages: Mapping[str, Stage]
    program: Program | None = None
    agreement: Agreement | None = None
    speed: Speed | None = None
    run: int = 0

    def __post_init__(self) -> None:
        if set(self.stages) != set(STAGES):
            raise ValueError(f"a row needs the stages {', '.join(STAGES)}, not {[*self.stages]}")

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """What two studies are compared by."""
        return self.subject, self.case, self.target, self.mesh, self.backend

    @property
    def reached(self) -> tuple[StageName, Stage]:
        """The last stage that was run, and how it ended; the first if none was."""
        reached = STAGES[0]
        for name in STAGES:
            if self.stages[name].status != "not run":
                reached = name
        return reached, self.stages[reached]


@dataclasses.dataclass(frozen=True)
class Room:
    """What a slice needs at one batch and context.

    Attributes:
      batch: sequences.
      context: positions of each.
      bytes: on each device: weights, cache and an estimate of temporary memory.
      fits: whether a device has that.
    """

    batch: int
    context: int
    bytes: int
    fits: bool


@dataclasses.dataclass(frozen=True)
class Slice:
    """The smallest slice of a kind of device that holds a model, by its plan.

    Attributes:
      model: name of the preset.
      device: kind, as in `sharding.devices`.
      topology: chips of the slice; a number of GPUs.
      devices: as JAX counts them.
      mesh: the arrangement with which it fits.
      weight_bytes: on each device.
      usable_bytes: of each device's memory.
      rooms: at several batches and contexts.
      reason: why there is none; "" if there is.
    """

    model: str
    device: str
    topology: str
    devices: int
    mesh: str
    weight_bytes: int
    usable_bytes: int
    rooms: tuple[Room, ...]
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Run:
    """Where and when rows were made.

    Attributes:
      at: UTC, in ISO 8601.
      seconds: that it took.
      command: the arguments.
      cpu, cores, python: of the machine.
      devices: kinds of devices that were present and how many of each, the CPU's own left out.
      versions: of jax, jaxlib, flax, numpy and the project.
      compilers: versions of what can compile for devices that aren't there.
      commit: of the project's source; "" where that isn't a repository.
    """

    at: str
    seconds: float
    command: str
    cpu: str
    cores: int
    python: str
    devices: Mapping[str, int]
    versions: Mapping[str, str]
    compilers: Mapping[str, str]
    commit: str = ""


@dataclasses.dataclass(frozen=True)
class Results:
    """A whole study.

    Attributes:
      runs: machines and times, one or several whose rows were joined.
      rows: what was tried, and what wasn't and why.
      slices: what the models need, by their plans.
    """

    runs: tuple[Run, ...]
    rows: tuple[Row, ...]
    slices: tuple[Slice, ...] = ()

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def joined(self, other: Results) -> Results:
        """Both in one; of rows or slices of the same key those of `other` count."""
        offset = len(self.runs)
        rows = {row.key: row for row in self.rows}
        for row in other.rows:
            rows[row.key] = dataclasses.replace(row, run=row.run + offset)
        slices = {(s.model, s.device): s for s in (*self.slices, *other.slices)}
        return Results((*self.runs, *other.runs), tuple(rows.values()), tuple(slices.values()))

    def to_json(self) -> str:
        """As text."""
        return json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Results:
        """What `to_json` made.

        Raises:
          ResultsError: the text is something else, or of another version.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ResultsError(f"not JSON: {error}") from None
        if not isinstance(data, dict) or "schema" not in data:
            raise ResultsError("no results of a study of portability: they have a schema")
        if data.pop("schema") != SCHEMA:
            raise ResultsError(f"of another version than schema {SCHEMA}: make them again")
        try:
            results = _read(cls, data)
            bad = [row.key for row in results if not 0 <= row.run < len(results.runs)]
            if bad:
                raise ValueError(f"{bad[0]} belongs to no run")
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ResultsError(f"not as results are written: {error}") from None
        return results

    def write(self, folder: Path) -> None:
        """Writes results.json into a folder; one that is there is replaced whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / FILE) as file:
            file.write(self.to_json().encode())

    @classmethod
    def read(cls, path: Path) -> Results:
        """Reads results.json of a folder, or that file.

        Raises:
          ResultsError: there is none, or it is something else.
        """
        file = path / FILE if path.is_dir() else path
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ResultsError(f"{file} can't be read: {error}") from None
        try:
            return cls.from_json(text)
        except ResultsError as error:
            raise ResultsError(f"{file}: {error}") from None


def row_from(data: Any) -> Row:
    """The row of which `dataclasses.asdict` made this; errors as of a constructor."""
    return _read(Row, data)


def _read(kind: Any, data: Any) -> Any:
    """Plain data as an instance of a type, checked on the way."""
    origin, parts = typing.get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return typing.cast(Any, kind)(**{k: _read(hints[k], v) for k, v in data.items()})
    if origin is Literal:
        if data not in parts:
            raise ValueError(f"{data!r} is none of {', '.join(map(repr, parts))}")
        return data
    if origin is types.UnionType:
        return None if data is None else _read(next(p for p in parts if p is not type(None)), data)
    if origin is tuple:
        if not isinstance(data, list):
            raise TypeError(f"{data!r} is no list")
        return tuple(_read(parts[0], item) for item in data)
    if origin is not None:  # of mappings
        return {k: _read(parts[1], v) for k, v in data.items()}
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        raise TypeError(f"{data!r} is not {kind.__name__}")
    return data
