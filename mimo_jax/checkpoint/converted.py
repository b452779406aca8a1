"""Checkpoints of ready-to-run parameters, written and read by Orbax.

The folder has the arrays as they are in memory (codes and scales of quantised weights, QKV in
chunks, experts stacked), cut into chunks that any mesh can be filled from:

    arrays/       Orbax's own files
    config.json   the backbone's, as in every checkpoint
    orbax.json    what else `Loaded` says, versions, and the sizes of all files in arrays/
    tokenizer files, if the original had them

It is written beside its place under a temporary name, and renamed when everything is on the disk:
a conversion that was killed leaves nothing that looks like a checkpoint, and can be started again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, Sharding

from mimo_jax.checkpoint.building import Loaded, Part, build_parts
from mimo_jax.checkpoint.errors import CheckpointError, Problem
from mimo_jax.checkpoint.files import copy_tokenizer
from mimo_jax.checkpoint.layout import Layout
from mimo_jax.checkpoint.names import declared
from mimo_jax.checkpoint.orbax_arrays import (
    ArrayTree,
    UnreadableArraysError,
    restore_arrays,
    save_arrays,
    stored_arrays,
)
from mimo_jax.checkpoint.safetensors_file import loads_unique
from mimo_jax.config import ConfigError, DFlashConfig, MiMoConfig
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.dflash import DFlash
from mimo_jax.model.mtp import MTP
from mimo_jax.model.parameters import Make, parameters
from pallas_kernels.packed import Packed
from sharding.rules import ShardingRules

ARRAYS = "arrays"
CONFIG = "config.json"
DESCRIPTION = "orbax.json"
FORMAT = 1


def convert(loaded: Loaded, folder: str | Path) -> None:
    """Writes the parameters as they are in memory, to be loaded onto any mesh.

    Args:
      loaded: model, MTP blocks and drafter, on one device or a mesh.
      folder: a new or empty folder.

    Raises:
      FileExistsError: there is something in the folder.
      CheckpointError: several processes hold the model, or its weights are packed for kernels.
    """
    folder = Path(os.path.abspath(folder))
    if jax.process_count() > 1:
        found = f"{jax.process_count()} processes, each with a part of the weights"
        expected = "one process that holds all of them"
        raise CheckpointError(folder, [Problem("cannot be converted", found, expected)])
    arrays = _arrays(loaded)
    if any(isinstance(w, Packed) for part in arrays.values() for w in part.values()):
        found, expected = "weights in the order of some kernels", 'load(..., kernels="reference")'
        raise CheckpointError(folder, [Problem("cannot be converted", found, expected)])
    check_target(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    partial.mkdir(parents=True)
    try:
        save_arrays(partial / ARRAYS, arrays)
        copy_tokenizer(loaded.folder, partial)
        _write_json(partial / CONFIG, loaded.config.to_dict())
        _sync(partial)
        _write_json(partial / DESCRIPTION, _description(loaded, partial / ARRAYS))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    os.replace(partial, folder)
    _sync_one(folder.parent)


def check_target(folder: Path) -> None:
    """Raises what `convert` would of its target, before a checkpoint is loaded."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; convert into a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; convert into a new folder")


def is_converted(folder: Path) -> bool:
    """Whether a folder is such a checkpoint, or what is left of one."""
    return (folder / DESCRIPTION).is_file() or (folder / ARRAYS).is_dir()


def restore(
    folder: Path,
    *,
    mtp: bool = True,
    drafter: bool = True,
    mesh: Mesh | None = None,
    rules: str | ShardingRules = "latency",
) -> Loaded:
    """Loads a converted checkpoint; arguments and errors are those of `load`."""
    found = describe(folder)
    config, layout = found.config, found.layout
    if config is None or layout is None or found.problems:
        raise CheckpointError(folder, found.problems)
    left_out = {"mtp": not mtp, "drafter": not drafter}
    parts = {
        name: Part(build, lambda spec, own=found.arrays[name]: own[spec.name])
        for name, build in _builds(found, config, layout).items()
        if not left_out.get(name)
    }

    def fill(values: ArrayTree, shardings: Sequence[Sharding | None]) -> ArrayTree:
        try:
            return restore_arrays(folder / ARRAYS, values, shardings)
        except UnreadableArraysError as error:
            raise CheckpointError(folder, [_unreadable(error)]) from error

    built, placement = build_parts(parts, mesh, rules, fill)
    return Loaded(
        config, built["backbone"], built.get("mtp"), built.get("drafter"), layout, folder, placement
    )


@dataclasses.dataclass
class Description:
    """A converted checkpoint, as far as is known without reading weights.

    Attributes:
      folder: where it is.
      problems: everything found wrong.
      config, layout: None where they are unusable.
      mtp_blocks: MTP blocks in it.
      drafter: the drafter's config, if there is a drafter.
      files: Orbax's files.
      arrays: shapes and types of all arrays, by part and parameter.
    """

    folder: Path
    problems: list[Problem]
    config: MiMoConfig | None = None
    layout: Layout | None = None
    mtp_blocks: int = 0
    drafter: DFlashConfig | None = None
    files: dict[str, int] = dataclasses.field(default_factory=dict)
    arrays: ArrayTree = dataclasses.field(default_factory=dict)


def describe(folder: Path) -> Description:
    """Reads everything but weights; finds problems instead of raising."""
    found = Description(folder, [])

    def problem(kind: str, what: str, expected: str, file: str) -> None:
        found.problems.append(Problem(kind, what, expected, "", file))

    if not (folder / DESCRIPTION).is_file():
        expected = "a conversion that ran to its end; convert the checkpoint again"
        problem("unfinished conversion", f"no {DESCRIPTION}", expected, "")
        return found
    try:
        raw = loads_unique((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if raw["format"] != FORMAT:
            expected = f"format {FORMAT}; convert the checkpoint again"
            problem("unknown format", f"format {raw['format']}", expected, DESCRIPTION)
            return found
        shared = frozenset(raw["layout"].pop("shared_kv_scales"))
        reasons = tuple(raw["layout"].pop("reasons"))
        found.layout = Layout(**raw["layout"], shared_kv_scales=shared, reasons=reasons)
        found.mtp_blocks = int(raw["mtp_blocks"])
        drafter = raw["drafter"]
        found.drafter = None if drafter is None else DFlashConfig.from_dict(drafter)
        found.files = dict(raw["files"])
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        problem("broken JSON", repr(error), "what a conversion wrote", DESCRIPTION)
        return found
    try:
        text = (folder / CONFIG).read_text(encoding="utf-8")
        found.config = MiMoConfig.from_dict(loads_unique(text))
    except (ConfigError, ValueError, TypeError, OSError) as error:
        problem("unusable config", str(error), "that of a MiMo-V2", CONFIG)
    for name, size in found.files.items():
        file = folder / ARRAYS / name
        there = f"{file.stat().st_size} bytes" if file.is_file() else "nothing"
        if there != f"{size} bytes":
            problem("damaged checkpoint", there, f"{size} bytes", f"{ARRAYS}/{name}")
    if found.config is not None and found.layout is not None and not found.problems:
        try:
            found.arrays = stored_arrays(folder / ARRAYS)
            found.problems += _misfits(found, found.config, found.layout)
        except UnreadableArraysError as error:
            found.problems.append(_unreadable(error))
    return found


def _builds(
    found: Description, config: MiMoConfig, layout: Layout
) -> dict[str, Callable[[Make], Any]]:
    """What makes each module of the checkpoint."""
    blocks, chunks, drafter = found.mtp_blocks, layout.chunks, found.drafter
    builds: dict[str, Callable[[Make], Any]] = {"backbone": lambda make: MiMo(config, make, chunks)}
    if blocks:
        builds["mtp"] = lambda make: MTP(config, blocks, make, chunks)
    if drafter is not None:
        builds["drafter"] = lambda make: DFlash(drafter, make)
    return builds


def _misfits(found: Description, config: MiMoConfig, layout: Layout) -> list[Problem]:
    """Arrays that are not those of the modules."""
    problems = []
    builds = _builds(found, config, layout)
    for part in builds.keys() | found.arrays.keys():
        values = found.arrays.get(part, {})
        specs = {s.name: s for s in declared(builds[part])} if part in builds else {}
        for name in sorted(specs.keys() | values.keys()):
            there = str(values[name].shape) if name in values else "nothing"
            wanted = str(specs[name].shape) if name in specs else "no such array"
            if there != wanted:
                kind = "does not fit the config"
                problems.append(Problem(kind, there, wanted, name, f"{ARRAYS} of the {part}"))
    return problems


def _unreadable(error: UnreadableArraysError) -> Problem:
    return Problem("unreadable arrays", str(error), "arrays that Orbax wrote", "", ARRAYS)


def _arrays(loaded: Loaded) -> ArrayTree:
    """All parameters by part and name."""
    modules = {"backbone": loaded.model, "mtp": loaded.mtp, "drafter": loaded.drafter}
    return {
        part: {p.spec.name: p.get_value() for _, p in parameters(module)}
        for part, module in modules.items()
        if module is not None
    }


def _description(loaded: Loaded, arrays: Path) -> dict[str, Any]:
    layout = dataclasses.asdict(loaded.layout)
    layout["shared_kv_scales"] = sorted(layout["shared_kv_scales"])
    files = [p for p in sorted(arrays.rglob("*")) if p.is_file()]
    return {
        "format": FORMAT,
        "layout": layout,
        "mtp_blocks": 0 if loaded.mtp is None else len(loaded.mtp.layers),
        "drafter": None if loaded.drafter is None else loaded.drafter.config.to_dict(),
        "versions": {n: _version(n) for n in ("mimo-jax", "jax", "orbax-checkpoint")},
        "files": {str(p.relative_to(arrays)): p.stat().st_size for p in files},
    }


def _version(package: str) -> str | None:
    """A package's version; None where it runs without being installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _write_json(path: Path, content: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    _sync_one(path.parent)


def _sync(folder: Path) -> None:
    """Waits until a folder and everything in it is on the disk."""
    for path in (*folder.rglob("*"), folder):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
