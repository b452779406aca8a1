"""JSON as a request may have it: strict where Python's own reader is lenient."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

# Chat messages with parts need five levels.  Python's own limit depends on who calls.
MAX_DEPTH = 32


def loads(raw: bytes) -> Any:
    """The value of a JSON text.

    Refuses, besides what isn't JSON: bytes that aren't UTF-8, keys that an object has twice, NaN
    and numbers beyond float64, half surrogate pairs, and nesting deeper than MAX_DEPTH.

    Raises:
      ValueError: one of these; says which and where.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_float=_finite,
            parse_constant=_refuse_constant,
        )
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte {error.start + 1} of the line is {raw[error.start]:#04x}, which is not UTF-8 "
            f"({error.reason}); write the file in UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"the line is not JSON: {error.msg} at character {error.pos + 1}"
        ) from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        if "integer string conversion" not in str(error):
            raise
        raise ValueError("the line has an integer of thousands of digits; shorten it") from None
    _check_depth(value, MAX_DEPTH)
    if b"\\u" in raw:  # the only way for half a pair to get in
        _check_surrogates(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"an object has the key {twice!r} twice; leave out one of them")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is beyond the range of float64")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number; give a finite one or leave the field out")


def _too_deep() -> ValueError:
    return ValueError(f"arrays and objects are nested deeper than {MAX_DEPTH} levels")


def _check_depth(value: Any, left: int) -> None:
    if not isinstance(value, dict | list):
        return
    if not left:
        raise _too_deep()
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, dict | list):
            _check_depth(item, left - 1)


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise ValueError(
            f"a string has \\u{half:04x}, half of a surrogate pair, which is no character; give "
            "both halves"
        ) from None
