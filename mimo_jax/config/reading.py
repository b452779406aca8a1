"""Finding and reading config files: presets by name, lenient JSON, refusals."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A config.json is broken, incomplete, or asks for something mimo-jax does not implement."""


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


def read_named(name_or_path: str | Path, *, suffix: str) -> dict[str, Any]:
    """The JSON behind a path or preset name; `suffix` tells backbone from drafter presets.

    Raises:
      ConfigError: nothing is there under that name, or it is not JSON.
    """
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "dflash" / "config.json" if suffix else path / "config.json"
        if not path.is_file():
            raise ConfigError(f"{path} does not exist; is {path.parent} a checkpoint folder?")
    if path.is_file():
        try:
            raw = loads_lenient(path.read_text(encoding="utf-8"))
        except ConfigError as error:
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
    raise ConfigError(
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
