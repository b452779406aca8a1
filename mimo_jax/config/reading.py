"""Finding and reading config files: presets by name, lenient JSON, refusals."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A config.json is broken, incomplete, or asks for something mimo-jax does not implement."""


class ConfigNotFoundError(ConfigError, FileNotFoundError):
    """There is no configuration of that name; the message names what is close."""


def presets() -> tuple[str, ...]:
    """Names of the bundled backbone configurations, for `MiMoConfig.from_pretrained`."""
    return tuple(sorted(n for n in preset_files() if not n.endswith(".dflash")))


def nearest_names(name: str, known: Sequence[str]) -> str:
    """A sentence that suggests the known names closest to a mistyped one."""
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=3, cutoff=0.4)
    if close:
        return "did you mean " + " or ".join(repr(by_lower[c]) for c in close) + "?"
    return "known names: " + ", ".join(known)


def loads_lenient(text: str) -> Any:
    """JSON with trailing commas allowed: a released dflash/config.json has one (MODEL_SPEC 9.4).

    Raises:
      ConfigError: the text is not JSON even so.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    except RecursionError:
        raise ConfigError("not valid JSON: it is nested too deeply") from None
    strings_or_commas = re.compile(r'("(?:[^"\\]|\\.)*")|,(\s*[}\]])')
    try:
        return json.loads(strings_or_commas.sub(lambda m: m[1] or m[2], text))
    except json.JSONDecodeError as error:
        raise ConfigError(f"not valid JSON: {error}") from error


def refuse(d: Mapping[str, Any], what: str, **allowed: tuple[Any, ...]) -> None:
    """Refuses values of `d` that are not among those allowed, by key.

    Raises:
      ConfigError: names the key, the value and what is supported.
    """
    for key, values in allowed.items():
        if d.get(key) not in values:
            supported = " or ".join(repr(v) for v in values if v is not None) or "none"
            raise ConfigError(
                f"{what}: {key}={d.get(key)!r} is not supported (supported: {supported})"
            )


# What JSON has to have for a field of these types; lists become tuples.
_TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "bool": (bool, "true or false"),
    "str": (str, "a string"),
}


def refuse_types(
    cls: type,
    d: Mapping[str, Any],
    *,
    objects: Sequence[str] = (),
    alone: Sequence[str] = (),
) -> None:
    """Refuses values of `d` of other types than the fields of a configuration have.

    Args:
      cls: the configuration.
      d: from JSON, or as the configuration has it; null is of any type.
      objects: keys whose values are JSON objects.
      alone: fields with lists of numbers that may be one number instead.

    Raises:
      ConfigError: names the key, the value and what was expected.
    """
    kinds = {f.name: str(f.type).removesuffix(" | None") for f in dataclasses.fields(cls)}
    for key, value in d.items():
        kind = kinds.get(key, "")
        if key in objects:
            right, expected = isinstance(value, Mapping), "an object"
        elif item := re.fullmatch(r"tuple\[(\w+), \.\.\.\]", kind):
            accepted, _ = _TYPES[item[1]]
            items = [value] if key in alone and isinstance(value, accepted) else value
            right = isinstance(items, list | tuple) and all(isinstance(i, accepted) for i in items)
            expected = f"a list of {'numbers' if item[1] == 'int' else 'strings'}"
        elif kind in _TYPES:
            accepted, expected = _TYPES[kind]
            right = isinstance(value, accepted) and isinstance(value, bool) == (kind == "bool")
        else:
            continue
        if value is not None and not right:
            raise ConfigError(f"{key} is {json.dumps(value)[:60]}; it must be {expected}")


def read_named(name_or_path: str | Path, *, suffix: str) -> dict[str, Any]:
    """The JSON behind a path or preset name; `suffix` tells backbone from drafter presets.

    Raises:
      ConfigNotFoundError: nothing is there under that name.
      ConfigError: it is not a JSON object, or the folder has none.
    """
    # Of os.path: names that no file can have are not there, and raise nothing.
    path = Path(os.path.expanduser(name_or_path))
    if name_or_path != "" and os.path.isdir(path):
        path = path / "dflash" / "config.json" if suffix else path / "config.json"
        if not path.is_file():
            raise ConfigError(f"{path} does not exist; is {path.parent} a checkpoint folder?")
    if os.path.isfile(path):
        try:
            raw = loads_lenient(path.read_text(encoding="utf-8"))
        except (ConfigError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from error
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: a JSON object was expected, found a {type(raw).__name__}")
        return raw
    known = {n.removesuffix(suffix): f for n, f in preset_files().items() if n.endswith(suffix)}
    if not suffix:
        known = {n: f for n, f in known.items() if not n.endswith(".dflash")}
    by_lower = {n.lower(): f for n, f in known.items()}
    wanted = str(name_or_path).removeprefix("XiaomiMiMo/").lower()
    if wanted in by_lower:
        return loads_lenient(by_lower[wanted].read_text(encoding="utf-8"))
    if suffix and wanted in (name.lower() for name in presets()):
        raise ConfigNotFoundError(
            f"{name_or_path} has no drafter; those of {', '.join(sorted(known))} do"
        )
    raise ConfigNotFoundError(
        f"no preset, config.json or checkpoint folder called {str(name_or_path)!r}; "
        + nearest_names(wanted, sorted(known))
    )


def preset_files() -> dict[str, Any]:
    """The bundled configuration files by name, the drafters' with the ending `.dflash`."""
    folder = resources.files("mimo_jax") / "presets"
    return {f.name.removesuffix(".json"): f for f in folder.iterdir() if f.name.endswith(".json")}


def with_floats(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with those of float fields as floats: JSON files write 10000 for 1e4."""
    floats = {f.name for f in dataclasses.fields(cls) if "float" in str(f.type)}
    return {k: float(v) if k in floats and isinstance(v, int) else v for k, v in values.items()}
