"""What an artifact says of itself: manifest.json, which is enough to call its programs by."""

from __future__ import annotations

import json
from importlib import metadata
from typing import Any

import numpy as np
from jax import export

from mimo_jax.checkpoint.safetensors_file import DTYPE_NAMES
from mimo_jax.language_model import LanguageModel
from mimo_jax.portability.step import MAX_LEN, Argument

FORMAT = "mimo-jax export"
VERSION = 1
MANIFEST = "manifest.json"

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


def head(
    lm: LanguageModel,
    name: str,
    exported: export.Exported,
    batch: int,
    max_len: int | None,
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
        "cache_len": {
            "symbol": MAX_LEN if max_len is None else None,
            "most": lm.config.max_position_embeddings if max_len is None else max_len,
        },
    }


def stored_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype in which the safetensors library's numpy front end reads such an array."""
    return np.dtype(np.uint8) if DTYPE_NAMES[dtype].startswith("F8_") else dtype


def described(argument: Argument) -> dict[str, Any]:
    """An argument or a result, as the manifest has it."""
    array, ids = argument.array, argument.role in ("tokens", "positions")
    shape = [d if isinstance(d, int) else str(d) for d in array.shape]
    entry = {
        "name": argument.name,
        "role": argument.role,
        "shape": [shape[0], "T"] if ids else shape,
        "dtype": array.dtype.name,
    }
    if argument.role == "weight" and stored_dtype(array.dtype) != array.dtype:
        entry["stored"] = stored_dtype(array.dtype).name
    if argument.role in _WHAT:
        entry["what"] = _WHAT[argument.role]
    return entry


def _version(package: str) -> str | None:
    """A package's version; None where it runs without being installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def to_json(manifest: dict[str, Any]) -> str:
    """JSON with a line for each item of the first level and of the long lists in it."""
    lines = []
    for key, value in manifest.items():
        text = json.dumps(value)
        if isinstance(value, list) and len(text) > 100:
            text = "[\n  " + ",\n  ".join(json.dumps(item) for item in value) + "\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
