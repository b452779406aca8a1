"""What a function computes, read from its jaxpr."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params


def equations(f: Callable[..., Any], *args: Any) -> Iterator[Any]:
    """Every equation of f(*args), those of inner functions, loops and branches included."""
    yield from _walk(jax.make_jaxpr(f)(*args).jaxpr)


def dot_flops(f: Callable[..., Any], *args: Any) -> int:
    """Floating-point operations of the matrix products of f(*args).

    Loop bodies count once an iteration, conditionals as their most expensive branch.
    """
    return _flops(jax.make_jaxpr(f)(*args).jaxpr)


def _walk(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _walk(inner)


def _flops(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        inner = [_flops(j) for j in jaxprs_in_params(equation.params)]
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(left[i] for i in contracted)
        elif name == "scan":
            total += equation.params["length"] * sum(inner)
        elif name == "cond":
            total += max(inner)
        elif name == "while" and any(inner):
            raise ValueError("matrix products in a loop of unknown length cannot be counted")
        else:
            total += sum(inner)
    return total
