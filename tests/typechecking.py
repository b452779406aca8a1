"""What jaxtyping checks annotations with in the tests (pyproject.toml)."""

import inspect
from collections.abc import Callable, Hashable
from typing import Any

import beartype

_checked: dict[Hashable, Callable[..., Any]] = {}


def beartype_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """`beartype`, whose result is shared by the functions that one inner `def` makes.

    What jaxtyping gives has no body, only a signature to check arguments with, and an inner
    function's comes anew with each call of the outer one: a quarter of the time of loading a model.
    """
    if "<locals>" not in function.__qualname__:
        return beartype.beartype(function)
    signature = inspect.signature(function)
    parameters = (
        (p.name, p.kind, p.annotation, p.default is p.empty) for p in signature.parameters.values()
    )
    key = (function.__module__, function.__qualname__, signature.return_annotation, *parameters)
    if key not in _checked:
        _checked[key] = beartype.beartype(function)
    return _checked[key]
