"""Finding the folder of a checkpoint by bundled name, path or hub id."""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from mimo_jax.config import nearest_names, presets

PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.pt"]
# Codecs and code of the multimodal releases, which nothing here uses.
IGNORED = ["audio_tokenizer/*"]


class ModelNotFoundError(FileNotFoundError):
    """No checkpoint under that name; the message says what to do."""


def bundled() -> dict[str, Path]:
    """The checkpoints that come with the package."""
    assets = Path(str(resources.files("mimo_jax"))) / "assets"
    return {p.parent.name: p.parent for p in sorted(assets.glob("*/config.json"))}


def resolve(name_or_path: str | Path) -> Path:
    """The local folder of a checkpoint, downloaded from the hub if need be.

    Args:
      name_or_path: the name of a bundled model, a folder, or a hub id ("XiaomiMiMo/MiMo-V2.5").

    Raises:
      ModelNotFoundError: nothing is there under that name, or the hub could not be reached.
    """
    name = str(name_or_path)
    if isinstance(name_or_path, str) and name in bundled():
        return bundled()[name]
    if not name:
        raise ModelNotFoundError(
            "the model's name is empty; give a bundled name, a checkpoint's folder or a hub id"
        )
    # Of os.path: names that no file can have are not there, and raise nothing.
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        return path
    if isinstance(name_or_path, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return _download(name)
    if os.path.exists(path):
        raise ModelNotFoundError(f"{name} is a file; give the folder of the checkpoint")
    if "/" in name:
        raise ModelNotFoundError(f"the folder {name} does not exist")
    if name in presets():
        raise ModelNotFoundError(
            f"{name} is the name of a configuration without weights; give the folder of its "
            f"checkpoint, or its hub id (XiaomiMiMo/{name} for Xiaomi's own)"
        )
    known = [*bundled(), *presets()]
    raise ModelNotFoundError(f"no model or folder called {name!r}; {nearest_names(name, known)}")


def _download(name: str) -> Path:
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=PATTERNS, ignore_patterns=IGNORED
            )
        )
    except hub_errors.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{name} needs permission: ask for access on its page and log in with `hf auth login`"
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"there is no folder {name}, and no model of that name on the hub (or it is private)"
        ) from error
    except (OSError, hub_errors.HFValidationError) as error:
        detail = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelNotFoundError(
            f"there is no folder {name}, and the hub could not be reached to download it "
            f"({detail}); check the connection, or download it elsewhere and give its folder"
        ) from error
