"""A model as a folder that runs without its code: programs for several platforms, and its weights.

    manifest.json         what is here, and how to call it; written last
    prompt.jaxexport      the program that reads a chunk of a prompt
    step.jaxexport        the program that reads one token
    weights.safetensors   the programs' first arguments
    tokenizer files, if the checkpoint has them

Both programs are `jax.export`'s and have the same arguments and results: (weights..., tokens,
positions, cache...) -> (next_tokens, logits, cache...).  Weights stay as the model holds them,
quantised or not, and are arguments, so that programs are small and weights are stored once.
`scripts/run_exported.py` needs the folder, jax, numpy, safetensors and
flatbuffers, and nothing else.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import export

from mimo_jax.checkpoint.files import TOKENIZER_FILES, copy_tokenizer
from mimo_jax.checkpoint.safetensors_file import Entry, write_file
from mimo_jax.engine.durable import sync_folder
from mimo_jax.language_model import LanguageModel
from mimo_jax.portability.manifest import MANIFEST, described, head, stored_dtype, to_json
from mimo_jax.portability.step import PLATFORMS, Step, require_flatbuffers
from pallas_kernels.backends import REFERENCE

WEIGHTS = "weights.safetensors"
PROMPT_LEN = 64


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
    check_target(folder, platforms)
    _check(lm, batch, max_len, prompt_len)
    step = Step(lm.model, batch, max_len, lm.decoder.valid_vocabulary)
    programs = {
        "prompt": (prompt_len, step.export(prompt_len, platforms)),
        "step": (1, step.export(1, platforms)),
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
            **head(lm, name, programs["step"][1], batch, max_len),
            "programs": written,
            "weights": {"file": WEIGHTS, "bytes": (partial / WEIGHTS).stat().st_size},
            "tokenizer": [n for n in TOKENIZER_FILES if (partial / n).is_file()],
            "arguments": [described(a) for a in step.arguments(1)],
            "results": [described(a) for a in step.results()],
        }
        _write(partial / MANIFEST, to_json(manifest).encode())
        sync_folder(partial)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(folder.parent)
    return manifest


def check_target(folder: Path, platforms: Sequence[str]) -> None:
    """Raises what `export_model` would of its target, before a model is loaded."""
    known = ", ".join(PLATFORMS)
    unknown = [p for p in platforms if p not in PLATFORMS]
    if unknown:
        hint = "; GPUs are cuda (NVIDIA) or rocm (AMD)" if "gpu" in unknown else ""
        raise ValueError(f"there is no platform {unknown[0]!r}: choose of {known}{hint}")
    if not platforms or len(set(platforms)) < len(platforms):
        raise ValueError(f"platforms are {list(platforms)}: name some of {known}, each once")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and isn't empty; export to a new folder")
    require_flatbuffers()


def _check(lm: LanguageModel, batch: int, max_len: int | None, prompt_len: int) -> None:
    """Raises ValueError where a model can't be exported, or not with these sizes."""
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


def _entry(name: str, leaf: jax.Array) -> Entry:
    """A weight to write."""
    dtype = stored_dtype(leaf.dtype)
    return Entry(name, dtype, leaf.shape, functools.partial(_bits, leaf, dtype))


def _bits(leaf: jax.Array, dtype: np.dtype) -> np.ndarray:
    return np.asarray(leaf).view(dtype)


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
