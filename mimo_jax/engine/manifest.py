"""What a file of results was made with, in a file beside it, so that runs that differ don't mix."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from mimo_jax.engine.durable import replacing
from mimo_jax.engine.requests import RequestFile, Shard
from mimo_jax.engine.results import ResultsError, advice

FORMAT = 2
# Files of a checkpoint whose contents decide what it computes, and are small.
_HASHED = (".json", ".jinja", ".txt", ".model")
_MAX_HEADER = 100_000_000  # the limit of the safetensors library
_ABSENT = "(nothing)"

Manifest = dict[str, Any]


def make_manifest(
    source: RequestFile,
    *,
    model: str,
    checkpoint_sha256: str,
    code_version: str,
    mesh: Any = None,
    rules: Any = None,
    kernels: Any = None,
    dtype: Any = None,
    decoding: Any = None,
    sampling: Mapping[str, Any] | None = None,
    seed: int = 0,
    shard: Shard | None = None,
) -> Manifest:
    """What decides the results of a run.

    Args:
      source: the input.
      model: the checkpoint's name.
      checkpoint_sha256: of `hash_checkpoint`, or another string that tells checkpoints apart.
      code_version: `mimo_jax.__version__`.
      mesh: what the model is split over.  Of this and the next four, what JSON can't hold is
        written as its `str`.
      rules: how it is split.
      kernels: which ones it uses.
      dtype: what it computes in.
      decoding: how it decodes.
      sampling: defaults of the requests; None values are left out.
      seed: from which requests get theirs.
      shard: the part of the input that the run does.
    """
    manifest = {
        "format": FORMAT,
        "input": {"sha256": source.sha256, "lines": source.lines},
        "checkpoint": {"name": model, "sha256": checkpoint_sha256},
        "code_version": code_version,
        "jax_version": jax.__version__,
        "mesh": mesh,
        "rules": rules,
        "kernels": kernels,
        "dtype": dtype,
        "decoding": decoding,
        "sampling": {k: v for k, v in (sampling or {}).items() if v is not None},
        "seed": seed,
        "shard": None if shard is None else str(shard),
    }
    return json.loads(json.dumps(manifest, default=str))


def manifest_path(results: Path) -> Path:
    """Where the manifest of a file of results is."""
    return results.with_name(results.name + ".manifest.json")


def read_manifest(results: Path) -> Manifest | None:
    """The manifest of a file of results, or None if there is none.

    Raises:
      ResultsError: it can't be read, or is not a manifest.
    """
    path = manifest_path(results)
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ResultsError(f"{path} can't be read: {error}; see to the cause") from error
    except (ValueError, RecursionError):
        manifest = None
    if not _is_manifest(manifest):
        raise ResultsError(
            f"{path} is not a manifest that this version wrote; give another output file, or move "
            "that one away"
        )
    return manifest


def _is_manifest(value: Any) -> bool:
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        return False
    source = value.get("input")
    sound = isinstance(source, dict) and type(source.get("lines")) is int
    return sound and "shard" in value and isinstance(value.get("forced", []), list)


def write_manifest(results: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest of a file of results, which is on the disk afterwards.

    Raises:
      ResultsError: it can't be written; an earlier one is then as it was.
    """
    path = manifest_path(results)
    try:
        with replacing(path) as file:
            file.write(json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b"\n")
    except OSError as error:
        raise ResultsError(f"{path} can't be written: {error}; {advice(error)}") from error


def ensure_manifest(
    results: Path, manifest: Manifest, has_results: bool, force: bool = False
) -> list[str]:
    """Writes the manifest of a run that begins, or checks that of a run that goes on.

    To be called before the first result is written.

    Args:
      results: the file of results.
      manifest: of this run.
      has_results: whether there are results already.  Without, there is nothing to mix.
      force: go on in spite of differences; the manifest is then replaced, and has under "forced"
        the differences of this and of earlier times.

    Returns:
      The differences that were overridden, "name: old -> new" each.

    Raises:
      ResultsError: there are results of a run with another manifest, or without any, and no
        `force`; or it can't be written.
    """
    path = manifest_path(results)
    if not has_results:
        write_manifest(results, manifest)
        return []
    try:
        old = read_manifest(results)
        problems = [f"{path} is missing"] if old is None else differences(old, manifest)
    except ResultsError as error:
        if not force:
            raise
        old, problems = None, [str(error)]
    if not problems:
        return []
    if not force:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise ResultsError(
            f"{results} has results of a run that differs (then -> now):{listed}\n"
            "give another output file, or what it was begun with, or --force to go on nevertheless"
        )
    forced = [*(old or {}).get("forced", []), *problems]
    write_manifest(results, {**manifest, "forced": forced})
    return problems


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The entries in which two manifests differ, "name: old -> new" each."""
    then, now = _flat(old), _flat(new)
    names = [name for name in {**then, **now} if name.partition(".")[0] != "forced"]
    return [
        f"{name}: {then.get(name, _ABSENT)} -> {now.get(name, _ABSENT)}"
        for name in names
        if then.get(name) != now.get(name)
    ]


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flat(item, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.dumps(item, ensure_ascii=False)
    return flat


def hash_checkpoint(folder: Path) -> str:
    """A hash that tells checkpoints apart, at the cost of reading their small files.

    SHA-256 over the names (relative to the folder, sorted) and sizes of its files; besides, over
    the headers of safetensors files, which have the tensors' names, types, shapes and places; and
    over the contents of configuration, index, tokenizer and template files.  The bytes of tensors
    are not hashed: a checkpoint of the same layout with other values in its tensors, such as a
    later step of the same training, has the same hash.  Hidden files and *.md don't count.

    Raises:
      OSError: a file can't be read.
      ValueError: the folder has no files.
    """
    total = hashlib.sha256()
    files = sorted(_files(folder))
    if not files:
        raise ValueError(f"{folder} has no files; give the folder of a checkpoint")
    for name in files:
        path = folder / name
        size = path.stat().st_size
        content = _content_hash(path, size)
        for part in (os.fsencode(name), str(size).encode(), content):
            total.update(struct.pack("<Q", len(part)) + part)
    return total.hexdigest()


def _files(folder: Path) -> list[str]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(parent).relative_to(folder)
        found += [
            (relative / name).as_posix()
            for name in names
            if not name.startswith(".") and not name.lower().endswith(".md")
        ]
    return found


def _content_hash(path: Path, size: int) -> bytes:
    with open(path, "rb") as file:
        if path.suffix == ".safetensors":
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            # What isn't sound is the loader's to refuse.
            header = file.read(length) if length <= min(size, _MAX_HEADER) else b""
            return hashlib.sha256(prefix + header).digest()
        if path.suffix in _HASHED:
            return hashlib.file_digest(file, "sha256").digest()
    return b""
