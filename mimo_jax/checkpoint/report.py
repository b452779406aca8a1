"""What `mimo-jax inspect` says of a checkpoint."""

from __future__ import annotations

import collections
import dataclasses
import math
import os
from collections.abc import Iterable
from pathlib import Path

import jax

from mimo_jax.checkpoint.converted import Description, is_converted
from mimo_jax.checkpoint.converted import describe as describe_converted
from mimo_jax.checkpoint.errors import Problem, describe
from mimo_jax.checkpoint.layout import Layout, qkv_layout
from mimo_jax.checkpoint.names import MTP_PREFIX, MULTIMODAL
from mimo_jax.checkpoint.safetensors_file import DTYPE_NAMES
from mimo_jax.checkpoint.survey import Survey, survey
from mimo_jax.config import DFlashConfig, MiMoConfig

# Group of a backbone tensor by a part of its name; the first that matches.
GROUPS = (
    (MTP_PREFIX, "MTP"),
    (".experts.", "experts"),
    (".mlp.gate.", "router"),
    (".mlp.", "dense MLP"),
    ("norm.", "norms"),
    (".o_proj.", "attention output"),
    (".self_attn.", "attention QKV and sinks"),
    ("", "embedding and head"),
)


@dataclasses.dataclass(frozen=True)
class Tensors:
    """Tensors of one group and element type."""

    group: str
    dtype: str
    count: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Report:
    """A checkpoint described without loading it; `str(report)` is for people.

    Attributes:
      folder: the checkpoint.
      config: None where config.json is unusable.
      layout: None there too.
      groups: what its bytes are spent on.
      parameters: number of weights of the backbone.
      mtp_parameters: and of its MTP blocks.
      mtp_blocks: MTP blocks found.
      drafter: the drafter's config, if there is a drafter.
      drafter_parameters: its number of weights.
      files: number of safetensors files.
      skipped: number of tensors of multimodal towers, which are not loaded.
      problems: what would keep it from loading.
    """

    folder: Path
    config: MiMoConfig | None
    layout: Layout | None
    groups: tuple[Tensors, ...]
    parameters: int
    mtp_parameters: int
    mtp_blocks: int
    drafter: DFlashConfig | None
    drafter_parameters: int
    files: int
    skipped: int
    problems: tuple[Problem, ...]

    def __str__(self) -> str:
        lines = [f"{self.folder}: {self.files} files"]
        if self.config is not None and self.layout is not None:
            c = self.config
            lines += [
                f"model: {', '.join(c.architectures)}, {c.num_hidden_layers} layers, "
                f"hidden size {c.hidden_size}, {c.dtype}",
                f"layers: {c.pattern}",
                f"parameters: {_count(self.parameters)}",
                f"MTP: {self.mtp_blocks} blocks, {_count(self.mtp_parameters)}",
            ]
            lines.append(
                "drafter: none"
                if self.drafter is None
                else f"drafter: DFlash, {self.drafter.num_hidden_layers} layers, blocks of "
                f"{self.drafter.block_size}, {_count(self.drafter_parameters)}"
            )
            lines += [f"layout: {self.layout}", *(f"  {r}" for r in self.layout.reasons)]
        lines.append("tensors:")
        for t in self.groups:
            lines.append(f"  {t.group:<24} {t.dtype:<8} {t.count:>8} {_bytes(t.nbytes):>10}")
        if self.skipped:
            lines.append(f"not loaded: {self.skipped} tensors of vision and audio towers")
        lines.append(describe(self.problems) if self.problems else "no problems found")
        return "\n".join(lines)


def inspect(folder: str | Path, *, qkv: str | None = None) -> Report:
    """Describes a local checkpoint from its configs and headers; reads no weights.

    Nothing is raised for what is wrong with it: see `Report.problems`.

    Args:
      folder: the checkpoint.
      qkv: overrides the order of QKV rows, as in `load`.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: `qkv` is not an order of rows.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):  # a name that no file can have isn't one, and raises nothing
        raise FileNotFoundError(f"{folder} is not a folder; give the folder of a checkpoint")
    order = qkv_layout(qkv)
    if is_converted(folder):
        return _of_converted(describe_converted(folder))
    found = survey(folder, qkv=order)
    drafter = found.drafter
    of_mtp = [s.size for s in found.specs if s.name.startswith(MTP_PREFIX)]
    return Report(
        folder=folder,
        config=found.config,
        layout=found.layout,
        groups=_groups(found),
        parameters=sum(s.size for s in found.specs) - sum(of_mtp),
        mtp_parameters=sum(of_mtp),
        mtp_blocks=found.mtp_blocks,
        drafter=None if drafter is None else drafter.config,
        drafter_parameters=(
            0
            if drafter is None
            else sum(s.size for s in drafter.specs) + drafter.mask_embedding.size
        ),
        files=len(found.store.files) + (0 if drafter is None else len(drafter.store.files)),
        skipped=len(found.skipped),
        problems=tuple(found.problems),
    )


def _of_converted(found: Description) -> Report:
    """The same of a checkpoint that `convert` made, whose tensors are arrays as in memory."""
    weights: collections.Counter[str] = collections.Counter()
    arrays = []
    for part, own in found.arrays.items():
        for name, value in own.items():
            weights[part] += math.prod(value.shape)
            group = part if part == "drafter" else _group(name)
            for array in jax.tree.leaves(value):
                size = array.size * array.dtype.itemsize
                arrays.append((group, DTYPE_NAMES[array.dtype], size))
    return Report(
        folder=found.folder,
        config=found.config,
        layout=found.layout,
        groups=_sums(arrays),
        parameters=weights["backbone"],
        mtp_parameters=weights["mtp"],
        mtp_blocks=found.mtp_blocks,
        drafter=found.drafter,
        drafter_parameters=weights["drafter"],
        files=len(found.files),
        skipped=0,
        problems=tuple(found.problems),
    )


def _groups(found: Survey) -> tuple[Tensors, ...]:
    tensors = [(_group(t.name), t) for t in found.store.tensors.values()]
    if found.drafter is not None:
        tensors += [("drafter", t) for t in found.drafter.store.tensors.values()]
    return _sums((group, t.dtype, t.nbytes) for group, t in tensors)


def _sums(tensors: Iterable[tuple[str, str, int]]) -> tuple[Tensors, ...]:
    """Numbers and bytes of tensors by group and element type."""
    sizes: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
    for group, dtype, nbytes in tensors:
        sizes[group, dtype].append(nbytes)
    return tuple(Tensors(*key, len(sizes[key]), sum(sizes[key])) for key in sorted(sizes))


def _group(name: str) -> str:
    if MULTIMODAL.match(name):
        return "vision and audio"
    return next(group for part, group in GROUPS if part in name)


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e8 else f"{n:,}"


def _bytes(n: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n} B"
