"""A model as a folder that runs without its code: programs for several platforms, and its weights.

    manifest.json         what is here, and how to call it; written last
    prompt.jaxexport      the program that reads a chunk of a prompt
    step.jaxexport        the program that reads one token
    weights.safetensors   the programs' first arguments
    tokenizer files, if the checkpoint has them

Both programs are `jax.export`'s and have the same arguments and results: (weights..., tokens,
positions, cache...) -> (next_tokens, logits, cache...).  Weights stay as the model holds them,
quantised or not, and are arguments, so that programs are small and weights are stored once.
`scripts/run_exported.py` needs nothing else than the folder, jax, numpy and safetensors.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import export

from mimo_jax.checkpoint.files import TOKENIZER_FILES, copy_tokenizer
from mimo_jax.checkpoint.safetensors_file import DTYPE_NAMES, Entry, write_file
from mimo_jax.engine.durable import sync_folder
from mimo_jax.language_model import LanguageModel
from mimo_jax.portability.step import MAX_LEN, PLATFORMS, Argument, Step, require_flatbuffers
from pallas_kernels.backends import REFERENCE

FORMAT = "mimo-jax export"
VERSION = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
PROMPT_LEN = 64

_ABOUT = (
    "A language model as programs that jax.export made: jax runs them without the model's code.",
    "jax.export.deserialize(bytearray of a program's file).call(*arguments) returns the results. "
    "Both programs have the arguments and results listed here, in this order. In their shapes T is "
    "the program's tokens, and the symbol of cache_len is a number that the caller chooses.",
    "A prompt is read in chunks by programs.prompt; then each call of programs.step adds a token.",
    "Weights are tensors of the weights' file, by name. Where 'stored' is given, the file has that "
    "dtype, and the argument is the same bits seen as 'dtype'.",
    "The cache is zeros at first, afterwards what the last call of either program returned. The "
    "programs give it away: jax.jit(exported.call, donate_argnums=...) updates it in place.",
    "jax promises to read an export for six months, and with a version up to three weeks older.",
)
_WHAT = {
    "tokens": "ids of the next T tokens of each row",
    "positions": "theirs, counted from 0; -1 for padding, which is behind a row's last token, and "
    "for rows that have nothing to do",
    "next_tokens": "the most probable token after each row's newest one; of idle rows, nothing",
    "logits": "of all tokens there; -inf for ids that the tokenizer doesn't have",
}


def export_model(
    lm: LanguageModel,
    folder: str | Path,
    *,
    name: str,
    platforms: Sequence[str] = PLATFORMS,
    batch: int = 1,
    max_len: int | None = None,
    prompt_len: int = PROMPT_LEN,
) -> dict[str, Any]:
    """Writes a model's programs and weights, for machines that have jax but not this package.

    The folder appears when it is complete.

    Args:
      lm: on one device, with the kernels of the reference, which run everywhere.
      folder: a new or empty folder.
      name: of the model, for the manifest.
      platforms: of PLATFORMS; each program is lowered for all of them.
      batch: rows B of every call.
      max_len: positions of the cache; None leaves it open until the programs are compiled.
      prompt_len: tokens of a prompt that are read at once; longer prompts take several calls.

    Returns:
      The manifest.

    Raises:
      ValueError: there is no such platform, a size is impossible, or the model is on a mesh or
        uses kernels of one platform.
      FileExistsError: there is something in the folder.
      OSError: it can't be written, or jax can't serialise programs here.
    """
    folder = Path(os.path.abspath(folder))
    platforms = tuple(platforms)
    _check(lm, platforms, batch, max_len, prompt_len)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and isn't empty; export to a new folder")
    require_flatbuffers()
    step = Step(lm.model, batch, max_len, lm.decoder.valid_vocabulary)
    programs = {
        program: (tokens, step.export(tokens, platforms))
        for program, tokens in (("prompt", prompt_len), ("step", 1))
    }
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir(parents=True)
    try:
        written = {
            program: _write_program(partial / f"{program}.jaxexport", tokens, exported)
            for program, (tokens, exported) in programs.items()
        }
        write_file(partial / WEIGHTS, [_entry(*named) for named in step.weights()], {})
        copy_tokenizer(lm.loaded.folder, partial)
        manifest = {
            **_head(lm, name, programs["step"][1], batch, max_len, prompt_len),
            "programs": written,
            "weights": {"file": WEIGHTS, "bytes": (partial / WEIGHTS).stat().st_size},
            "tokenizer": [n for n in TOKENIZER_FILES if (partial / n).is_file()],
            "arguments": [_described(a) for a in step.arguments(1)],
            "results": [_described(a) for a in step.results()],
        }
        _write(partial / MANIFEST, _json(manifest).encode())
        sync_folder(partial)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(folder.parent)
    return manifest


def _check(
    lm: LanguageModel, platforms: Sequence[str], batch: int, max_len: int | None, prompt_len: int
) -> None:
    """Raises ValueError where `export_model` can't do what its arguments say."""
    known = ", ".join(PLATFORMS)
    unknown = [p for p in platforms if p not in PLATFORMS]
    if unknown:
        hint = "; GPUs are cuda (NVIDIA) or rocm (AMD)" if "gpu" in unknown else ""
        raise ValueError(f"there is no platform {unknown[0]!r}: choose of {known}{hint}")
    if not platforms or len(set(platforms)) < len(platforms):
        raise ValueError(
            f"platforms are {list(platforms)}: name at least one of {known}, each once"
        )
    limit = lm.config.max_position_embeddings
    if batch < 1:
        raise ValueError(f"batch is {batch}; at least one row must fit")
    if max_len is not None and not 2 <= max_len <= limit:
        raise ValueError(
            f"max_len is {max_len}; a cache of this model has 2 to {limit} positions, or leave it "
            "out to choose when the artifact runs"
        )
    most = limit if max_len is None else max_len
    if not 1 <= prompt_len <= most:
        raise ValueError(
            f"prompt_len is {prompt_len}; the cache has room for chunks of 1 to {most}"
        )
    if lm.placement is not None or jax.process_count() > 1:
        raise ValueError("the model is on a mesh; load it without mesh= to export it")
    used = {getattr(part, "kernels", (REFERENCE,)) for _, part in nnx.iter_modules(lm.model)}
    if used != {(REFERENCE,)}:
        raise ValueError(
            "the model uses kernels that only one platform has; load it with kernels='reference' "
            "to export it"
        )


def _head(
    lm: LanguageModel,
    name: str,
    exported: export.Exported,
    batch: int,
    max_len: int | None,
    prompt_len: int,
) -> dict[str, Any]:
    """What a manifest says before it lists files and arrays."""
    packages = ("mimo-jax", "jax", "jaxlib")
    return {
        "format": FORMAT,
        "version": VERSION,
        "about": list(_ABOUT),
        "made_with": {package: _version(package) for package in packages},
        "calling_convention_version": exported.calling_convention_version,
        "platforms": list(exported.platforms),
        "model": {
            "name": name,
            "dtype": lm.config.dtype,
            "vocabulary": lm.config.vocab_size,
            "valid_vocabulary": lm.decoder.valid_vocabulary,
            "eos_token_ids": list(lm.eos_ids),
        },
        "batch": batch,
        "prompt_len": prompt_len,
        "cache_len": {
            "symbol": MAX_LEN if max_len is None else None,
            "most": lm.config.max_position_embeddings if max_len is None else max_len,
        },
    }


def _write_program(path: Path, tokens: int, exported: export.Exported) -> dict[str, Any]:
    """Writes a program; returns what the manifest says of it."""
    data = bytes(exported.serialize())
    _write(path, data)
    return {
        "file": path.name,
        "tokens": tokens,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def stored_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype in which the safetensors library's numpy front end reads such an array."""
    return np.dtype(np.uint8) if DTYPE_NAMES[dtype].startswith("F8_") else dtype


def _entry(name: str, leaf: jax.Array) -> Entry:
    """A weight to write."""
    dtype = stored_dtype(leaf.dtype)
    return Entry(name, dtype, leaf.shape, functools.partial(_bits, leaf, dtype))


def _bits(leaf: jax.Array, dtype: np.dtype) -> np.ndarray:
    return np.asarray(leaf).view(dtype)


def _described(argument: Argument) -> dict[str, Any]:
    """An argument or a result, as the manifest has it."""
    array, ids = argument.array, argument.role in ("tokens", "positions")
    shape = [d if isinstance(d, int) else str(d) for d in array.shape]
    described = {
        "name": argument.name,
        "role": argument.role,
        "shape": [shape[0], "T"] if ids else shape,
        "dtype": array.dtype.name,
    }
    if argument.role == "weight" and stored_dtype(array.dtype) != array.dtype:
        described["stored"] = stored_dtype(array.dtype).name
    if argument.role in _WHAT:
        described["what"] = _WHAT[argument.role]
    return described


def _version(package: str) -> str | None:
    """A package's version; None where it runs without being installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _json(manifest: dict[str, Any]) -> str:
    """JSON with a line for each item of the first level and of the long lists in it."""
    lines = []
    for key, value in manifest.items():
        text = json.dumps(value)
        if isinstance(value, list) and len(text) > 100:
            text = "[\n  " + ",\n  ".join(json.dumps(item) for item in value) + "\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
