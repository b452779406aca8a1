"""The tensors of a checkpoint folder: index, shards, and no way out of the folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Set
from pathlib import Path, PurePosixPath
from typing import Any

from mimo_jax.checkpoint.errors import Problem
from mimo_jax.checkpoint.safetensors_file import StoredTensor, loads_unique, open_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Files that belong to the tokenizer and are copied as they are.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


class UnsafePathError(ValueError):
    """A file name in a checkpoint that leads out of the checkpoint's folder."""


def inside(root: Path, name: str) -> Path:
    """The path of a file of a checkpoint, which may not lie anywhere else.

    Links are followed.  The hub's cache keeps a snapshot's files as links into the `blobs` folder
    of the same repository; these are allowed.

    Raises:
      UnsafePathError: the name is absolute, goes up, or is a link to another place.
    """
    parts = PurePosixPath(name).parts
    if not parts or "\0" in name or name.startswith("/") or ".." in parts:
        raise UnsafePathError(f"{name!r} is not a file name inside the folder")
    path, home = root / name, root.resolve()
    target = path.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(a) for a in allowed):
        raise UnsafePathError(f"{name!r} links to {target}, outside of {home}")
    return path


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies what is there of a checkpoint's tokenizer to another checkpoint's folder."""
    for name in TOKENIZER_FILES:
        file = source / name
        if file.is_file() and file.resolve() != (target / name).resolve():
            shutil.copyfile(file, target / name)


@dataclasses.dataclass
class TensorStore:
    """The tensors that the files of one folder hold, and everything wrong with those files.

    Attributes:
      root: the checkpoint's folder.
      sub: "" or the subfolder ("dflash") that this store is about.
      tensors: by name.  Tensors of damaged files are here too, as far as their header tells.
      metadata: of the index, over that of the files' headers.
      problems: unreadable files, entries that do not match, tensors stored twice.
      unavailable: names the index lists whose absence is already among the problems.
      files: names of the safetensors files, relative to `root`.
      incomplete: a file is unreadable and no index says which tensors were in it.
    """

    root: Path
    sub: str = ""
    tensors: dict[str, StoredTensor] = dataclasses.field(default_factory=dict)
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    problems: list[Problem] = dataclasses.field(default_factory=list)
    unavailable: set[str] = dataclasses.field(default_factory=set)
    files: list[str] = dataclasses.field(default_factory=list)
    incomplete: bool = False

    @property
    def names(self) -> Set[str]:
        """Of all tensors that are here or that the index lists."""
        return self.tensors.keys() | self.unavailable

    def path(self, name: str) -> Path | None:
        """Path of a file of this folder if it exists; an unsafe one becomes a problem."""
        try:
            path = inside(self.root, self.relative(name))
        except UnsafePathError as error:
            self.problems.append(
                Problem("unsafe path", str(error), "a file inside the folder", file=name)
            )
            return None
        return path if path.is_file() else None

    def relative(self, name: str) -> str:
        """File name relative to the checkpoint's folder."""
        return f"{self.sub}/{name}" if self.sub else name

    def file_of(self, tensor: str) -> str:
        """The file a tensor is in, or should be listed in."""
        if tensor in self.tensors:
            return self.tensors[tensor].file.name
        return self.files[0] if len(self.files) == 1 else self.relative(INDEX)

    def read_json(self, name: str) -> Any:
        """Contents of a JSON file without repeated keys; None (and a problem) if broken."""
        path = self.path(name)
        if path is None:
            return None
        try:
            return loads_unique(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            self.problems.append(
                Problem("broken JSON", str(error), "a JSON object", file=self.relative(name))
            )
            return None


def open_store(
    root: Path, sub: str = "", *, skip: Callable[[str], bool] = lambda name: False
) -> TensorStore:
    """Reads index and headers of a folder; finds problems instead of raising.

    Args:
      root: the checkpoint's folder.
      sub: a subfolder of it to look in.
      skip: names of tensors that nobody will read; a shard with only such tensors may be absent.
    """
    store = TensorStore(root, sub)
    weight_map = _read_index(store)
    present = sorted(p.name for p in (root / sub).glob("*.safetensors"))
    if weight_map is None:
        listed: Iterable[str] = present
        if not present:
            store.incomplete = True
            store.problems.append(
                Problem("missing file", "nothing", f"{SINGLE} or {INDEX}", file=store.relative(""))
            )
    else:
        listed = sorted(set(weight_map.values()))
    strays: list[tuple[StoredTensor, str]] = []
    for name in listed:
        strays += _add_file(store, name, weight_map, skip)
    for stored, other in strays:
        kind = "duplicate tensor" if stored.name in store.tensors else "misplaced tensor"
        found, expected = "it in this file", f"it in {other}, where the index has it"
        store.problems.append(Problem(kind, found, expected, stored.name, stored.file.name))
    if weight_map is not None:
        for name in sorted(set(present) - set(listed)):
            store.problems.append(
                Problem(
                    "file not in index",
                    "a file that the index does not mention",
                    "every safetensors file of the folder in the index",
                    file=store.relative(name),
                )
            )
    return store


def _read_index(store: TensorStore) -> dict[str, str] | None:
    """The index's weight_map; None without an index, or if it is broken."""
    if store.path(INDEX) is None:
        return None
    index = store.read_json(INDEX)
    if index is None:
        return None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        store.problems.append(
            Problem(
                "broken index",
                json.dumps(index)[:60],
                'an object with "weight_map": {tensor: file}',
                file=store.relative(INDEX),
            )
        )
        return None
    metadata = index.get("metadata")
    store.metadata.update(metadata if isinstance(metadata, dict) else {})
    return weight_map


def _add_file(
    store: TensorStore, name: str, weight_map: dict[str, str] | None, skip: Callable[[str], bool]
) -> list[tuple[StoredTensor, str]]:
    """Adds one shard's tensors; returns those that the index puts in another file."""
    shown = store.relative(name)
    wanted = {t for t, f in (weight_map or {}).items() if f == name}
    before = len(store.problems)
    path = store.path(name)
    if path is None:
        store.unavailable |= wanted
        needed = [t for t in wanted if not skip(t)]
        if len(store.problems) == before and needed:
            store.problems.append(
                Problem("missing file", "nothing", f"{len(wanted)} tensors in it", file=shown)
            )
        return []
    file, problems = open_file(path, shown)
    store.problems += problems
    store.incomplete |= weight_map is None and bool(problems) and not file.tensors
    store.files.append(shown)
    for key, value in file.metadata.items():
        store.metadata.setdefault(key, value)
    strays = []
    for tensor, stored in file.tensors.items():
        if weight_map is None and tensor in store.tensors:
            found = f"it in {store.tensors[tensor].file.name} as well"
            store.problems.append(
                Problem("duplicate tensor", found, "each tensor once", tensor, shown)
            )
        elif weight_map is None or tensor in wanted:
            store.tensors[tensor] = stored
        elif tensor in weight_map:
            strays.append((stored, store.relative(weight_map[tensor])))
        else:
            expected = "the index and its files to list the same tensors"
            store.problems.append(Problem("not in index", str(stored), expected, tensor, shown))
    for tensor in sorted(wanted - file.tensors.keys()):
        store.unavailable.add(tensor)
        if file.tensors or not problems:
            store.problems.append(
                Problem("not in file", "nothing", "the tensor the index puts here", tensor, shown)
            )
    return strays
