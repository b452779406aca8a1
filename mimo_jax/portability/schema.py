"""The schema of results.json, from the docstrings of the classes that it is written from."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

from mimo_jax.portability.results import (
    Agreement,
    Exchange,
    Program,
    Results,
    Room,
    Row,
    Run,
    Slice,
    Speed,
    Stage,
)

_CLASSES = (Results, Run, Row, Stage, Program, Exchange, Agreement, Speed, Slice, Room)
_NAMES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
_NAMES |= {"Status": "status", "StageName": "name of a stage"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One kind of object in the file.

    Attributes:
      name: of its class in `mimo_jax.portability.results`.
      text: what it is.
      fields: name, type and meaning of each.
    """

    name: str
    text: str
    fields: tuple[tuple[str, str, str], ...]


def entries() -> Iterator[Entry]:
    """Everything that results.json has, outermost first."""
    for kind in _CLASSES:
        yield _entry(kind)


def _entry(kind: Any) -> Entry:
    text, _, attributes = (inspect.getdoc(kind) or "").partition("\nAttributes:\n")
    meanings = dict(_meanings(attributes))
    fields = tuple(
        (f.name, _type(str(f.type)), meanings.get(f.name, "")) for f in dataclasses.fields(kind)
    )
    return Entry(kind.__name__, " ".join(text.split()), fields)


def _meanings(attributes: str) -> Iterator[tuple[str, str]]:
    """Names and meanings of a docstring's Attributes, of which several may share a meaning."""
    for item in re.split(r"\n(?=  \S)", attributes):
        names, _, meaning = item.strip().partition(":")
        for name in names.split(","):
            yield name.strip(), re.sub(r"\bNone\b", "null", " ".join(meaning.split()))


def _type(annotation: str) -> str:
    """A Python annotation in the words of JSON."""
    if annotation.endswith(" | None"):
        return f"{_type(annotation.removesuffix(' | None'))} or null"
    if found := re.fullmatch(r"Mapping\[(\w+), (\w+)\]", annotation):
        return f"object: {_type(found[1])} to {_type(found[2])}"
    if found := re.fullmatch(r"tuple\[(\w+), \.\.\.\]", annotation):
        return f"list of {_type(found[1])}"
    return _NAMES.get(annotation, annotation)
