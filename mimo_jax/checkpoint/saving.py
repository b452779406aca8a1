"""Writing a model to a checkpoint folder that never looks whole before it is."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from mimo_jax.checkpoint.building import Loaded
from mimo_jax.checkpoint.detect import possible_chunks
from mimo_jax.checkpoint.errors import CheckpointError, Problem
from mimo_jax.checkpoint.export import Values, export
from mimo_jax.checkpoint.files import INDEX
from mimo_jax.checkpoint.layout import (
    Layout,
    QKVLayout,
    ignored_modules,
    qkv_layout,
    with_formats,
)
from mimo_jax.checkpoint.names import (
    MASK_EMBEDDING,
    MTP_PREFIX,
    Wanted,
    backbone_specs,
    dtype_name,
    format_of,
    mtp_specs,
    prefixed,
    wanted_tensors,
    weight_shapes,
)
from mimo_jax.checkpoint.qkv import aligned
from mimo_jax.checkpoint.safetensors_file import DTYPE_NAMES, Entry, write_file
from mimo_jax.checkpoint.survey import DRAFTER
from mimo_jax.checkpoint.torch_file import write_mask_embedding
from mimo_jax.checkpoint.values import as_stored, to_host
from mimo_jax.config import MiMoConfig
from mimo_jax.model.dflash import DFlash
from mimo_jax.model.parameters import Format, ParamSpec, parameters, value_format

SHARD_SIZE = 5_000_000_000


def save(
    folder: str | Path,
    loaded: Loaded,
    *,
    layout: Layout | str | None = None,
    max_shard_size: int = SHARD_SIZE,
) -> None:
    """Writes weights, index and config.json, and the drafter in `dflash`.

    Weights are written as they are in memory, quantised or not, on one device or a mesh; what was
    loaded and is saved in the same layout has the same bytes.  Tokenizer files are the caller's to
    copy.  Files appear under their names only when all of them are complete, config.json last.

    Args:
      folder: an empty or new folder, or one whose weights this overwrites.
      loaded: model, MTP blocks and drafter.
      layout: another order of QKV rows ("split", "interleaved", "plain"), or a whole layout; by
        default the one it was loaded from.
      max_shard_size: bytes of tensors a file.

    Raises:
      CheckpointError: the layout would need requantising, values do not fit the config, or several
        processes hold the model.
      ValueError: `layout` is no layout.
      FileExistsError: the folder holds weights that would be left beside the new ones.
    """
    folder = Path(folder)
    if jax.process_count() > 1:
        found = f"{jax.process_count()} processes, each with a part of the weights"
        expected = "one process that holds all of them"
        raise CheckpointError(folder, [Problem("cannot be saved", found, expected)])
    config = loaded.config
    if loaded.mtp is None or config.num_nextn_predict_layers is not None:
        config = dataclasses.replace(config, num_nextn_predict_layers=blocks_of(loaded) or None)
    values = _values(loaded.model) | _values(loaded.mtp)
    specs = backbone_specs(config) + mtp_specs(config, blocks_of(loaded))
    asked = layout if isinstance(layout, Layout) else qkv_layout(layout)
    target = _target(asked, loaded.layout, config, values, specs)
    config = with_formats(config, target, _exempt(target, values, specs))
    entries, problems = export(values, target)
    problems += _misfits(entries, config, target, specs) if not problems else []
    if problems:
        raise CheckpointError(folder, problems)

    backbone = [e for e in entries if not e.name.startswith(MTP_PREFIX)]
    mtp = [e for e in entries if e.name.startswith(MTP_PREFIX)]
    files = _shards(backbone, "model", max_shard_size) | _shards(mtp, "model_mtp", max_shard_size)
    metadata = _metadata(target)
    with Staged(folder) as staged:
        if loaded.drafter is None:
            staged.weights(DRAFTER, {})  # refuses to leave another model's drafter there
        else:
            _stage_drafter(staged, loaded.drafter, target.drafter_prefix, max_shard_size)
        staged.weights("", files)
        if len(files) > 1 or metadata:
            staged.text(INDEX, _index(files, metadata))
        staged.text("config.json", _json(config.to_dict()))


def blocks_of(loaded: Loaded) -> int:
    """Number of MTP blocks."""
    return 0 if loaded.mtp is None else len(loaded.mtp.layers)


def _values(module: nnx.Module | None) -> dict[str, tuple[ParamSpec, Any]]:
    """Declaration and value of every parameter by tensor name."""
    if module is None:
        return {}
    return {p.spec.name: (p.spec, as_stored(p.get_value())) for _, p in parameters(module)}


def _target(
    asked: Layout | QKVLayout | None,
    loaded: Layout,
    config: MiMoConfig,
    values: Values,
    specs: Sequence[ParamSpec],
) -> Layout:
    """The layout to write, with the formats that the values have."""
    layout = asked if isinstance(asked, Layout) else loaded
    held = next((s.shape[0] for s, _ in values.values() if s.qkv is not None), 1)
    if isinstance(asked, str):
        layout = dataclasses.replace(layout, qkv=asked, chunks=max(held, layout.chunks))
        if asked == "interleaved" and layout.chunks == 1:
            layout = dataclasses.replace(layout, chunks=config.qkv_chunks)
    if layout.qkv == "split":
        layout = dataclasses.replace(layout, chunks=held)
    formats: dict[bool, set[Format]] = {False: set(), True: set()}
    for spec in specs:
        if spec.format != "plain":
            formats["{}" in spec.name].add(value_format(values[spec.name][1]))
    shared = frozenset(
        spec.name
        for spec in specs
        if spec.qkv is not None
        and layout.qkv == "split"
        and value_format(values[spec.name][1]) == "fp8"
        and not aligned(spec.qkv, held)
    )
    linear: Format = "fp8" if "fp8" in formats[False] else "plain"
    experts: Format = "fp8" if "fp8" in formats[True] else "plain"
    if "mxfp4" in formats[True]:
        experts = "mxfp4"
    return dataclasses.replace(
        layout, linear_format=linear, expert_format=experts, shared_kv_scales=shared
    )


def _exempt(layout: Layout, values: Values, specs: Sequence[ParamSpec]) -> list[str]:
    """Modules that are dense although their kind is quantised."""
    return [
        name.removesuffix(".weight")
        for spec in specs
        if format_of(spec, layout, frozenset()) != "plain"
        and value_format(values[spec.name][1]) == "plain"
        for name in weight_shapes(spec, layout)
    ]


def _misfits(
    entries: Sequence[Entry], config: MiMoConfig, layout: Layout, specs: Sequence[ParamSpec]
) -> list[Problem]:
    """Tensors that could not be loaded again under the config that is written with them."""
    wanted: dict[str, Wanted] = {}
    ignored, plain = ignored_modules(config), (dtype_name(config.dtype),)
    for spec in specs:
        wanted |= wanted_tensors(spec, layout, format_of(spec, layout, ignored), plain)
    problems = []
    for entry in entries:
        found = f"{DTYPE_NAMES[entry.dtype]} {list(entry.shape)}"
        want = wanted.pop(entry.name, None)
        if want is None or want.shape != entry.shape or DTYPE_NAMES[entry.dtype] not in want.dtypes:
            expected = "no such tensor" if want is None else str(want)
            problems.append(Problem("does not fit the config", found, expected, entry.name))
    for name, want in wanted.items():
        problems.append(Problem("does not fit the config", "nothing", str(want), name))
    if layout.chunks not in possible_chunks(config):
        chunks = possible_chunks(config)
        problems.append(Problem("impossible layout", f"{layout.chunks} chunks", f"one of {chunks}"))
    return problems


def _shards(entries: Sequence[Entry], base: str, limit: int) -> dict[str, list[Entry]]:
    """Entries by file name, in the order of the releases: layer by layer, expert by expert."""
    shards: list[list[Entry]] = []
    room = 0
    for entry in sorted(entries, key=lambda e: _natural(e.name)):
        if not shards or entry.nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(entry)
        room -= entry.nbytes
    if len(shards) == 1:
        return {f"{base}.safetensors": shards[0]}
    return {
        f"{base}-{i:05d}-of-{len(shards):05d}.safetensors": shard
        for i, shard in enumerate(shards, 1)
    }


def _natural(name: str) -> list[tuple[int, str]]:
    """A sorting key in which 10 comes after 9."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name)]


def _metadata(layout: Layout) -> dict[str, Any]:
    """What the index says of a layout, for readers that cannot tell by the scales."""
    metadata: dict[str, Any] = {}
    if layout.qkv != "split":
        metadata["tp_size"] = layout.chunks if layout.qkv == "interleaved" else 1
    elif layout.shared_kv_scales:
        metadata["tp_size"] = layout.chunks
    if layout.expert_format == "mxfp4":
        metadata["save_format"] = "mxfp4"
    return metadata


def _index(files: Mapping[str, Sequence[Entry]], metadata: Mapping[str, Any]) -> str:
    weight_map = {e.name: file for file, entries in files.items() for e in entries}
    total = sum(e.nbytes for entries in files.values() for e in entries)
    ordered = dict(sorted(weight_map.items()))
    return _json({"metadata": {**metadata, "total_size": total}, "weight_map": ordered})


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _stage_drafter(staged: Staged, drafter: DFlash, prefix: str, max_shard_size: int) -> None:
    """Weights, index, mask embedding and config of the `dflash` folder (MODEL_SPEC 4.3)."""
    values = _values(drafter)
    _, embedding = values.pop(MASK_EMBEDDING)
    named = {prefix + n: (prefixed(spec, prefix), value) for n, (spec, value) in values.items()}
    entries, _ = export(named, Layout("plain", 1))
    files = _shards(entries, "dflash_draft_model", max_shard_size)
    staged.weights(DRAFTER, files)
    staged.text(f"{DRAFTER}/{INDEX}", _index(files, {}))
    target = staged.path(f"{DRAFTER}/{MASK_EMBEDDING}")
    write_mask_embedding(target, drafter.config.mask_token_id, to_host(embedding))
    staged.text(f"{DRAFTER}/config.json", _json(drafter.config.to_dict()))


class Staged:
    """Files written under temporary names, which all get their own names at the end or not at all.

    While names change, the folder has neither config.json nor index: if the program dies then, it
    cannot be taken for a checkpoint.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.names: list[str] = []

    def __enter__(self) -> Staged:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def path(self, name: str) -> Path:
        """The temporary path of a file of the folder."""
        self.names.append(name)
        path = self._temporary(name)
        path.parent.mkdir(exist_ok=True)
        return path

    def text(self, name: str, text: str) -> None:
        """Stages a text file."""
        with open(self.path(name), "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())

    def weights(self, sub: str, files: Mapping[str, Sequence[Entry]]) -> None:
        """Stages safetensors files.

        Raises:
          FileExistsError: others are there already.
        """
        present = {p.name for p in (self.folder / sub).glob("*.safetensors")}
        left = sorted(present - files.keys())
        if left:
            raise FileExistsError(
                f"{self.folder / sub} holds {len(left)} weight files ({left[0]}, ...) that would "
                "stay beside the new ones; save to an empty folder"
            )
        for name, entries in files.items():
            name = f"{sub}/{name}" if sub else name
            write_file(self.path(name), entries, {"format": "pt"})

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            for name in self.names:
                self._temporary(name).unlink(missing_ok=True)
            return
        for sub in (self.folder, self.folder / DRAFTER):
            for name in ("config.json", INDEX):
                (sub / name).unlink(missing_ok=True)
        for name in self.names:
            os.replace(self._temporary(name), self.folder / name)

    def _temporary(self, name: str) -> Path:
        head, tail = os.path.split(name)
        return self.folder / head / f".{tail}.{os.getpid()}.partial"
