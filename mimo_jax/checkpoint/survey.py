"""Everything about a checkpoint that can be known without reading a weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jax.checkpoint.detect import detect
from mimo_jax.checkpoint.errors import Problem
from mimo_jax.checkpoint.files import TensorStore, UnsafePathError, inside, open_store
from mimo_jax.checkpoint.layout import Layout, QKVLayout, ignored_modules, with_formats
from mimo_jax.checkpoint.names import (
    FLOATS,
    MASK_EMBEDDING,
    MTP_BLOCK,
    Wanted,
    backbone_specs,
    drafter_specs,
    dtype_name,
    format_of,
    mtp_specs,
    skipped,
    wanted_tensors,
)
from mimo_jax.checkpoint.torch_file import TorchFileError, read_torch
from mimo_jax.config import ConfigError, DFlashConfig, MiMoConfig, loads_lenient
from mimo_jax.model.parameters import Format, ParamSpec

DRAFTER = "dflash"


@dataclasses.dataclass
class DrafterSurvey:
    """The `dflash` folder: its tensors, config, and the mask embedding (already read)."""

    store: TensorStore
    config: DFlashConfig
    prefix: str
    specs: tuple[ParamSpec, ...]
    wanted: dict[str, Wanted]
    mask_embedding: np.ndarray


@dataclasses.dataclass
class Survey:
    """A checkpoint as its headers and configs describe it.

    Attributes:
      folder: the checkpoint.
      store: its tensors.
      problems: everything found wrong.
      config: its config.json, corrected where the tensors say otherwise; None if unusable.
      layout: how weights are stored; None without a config.
      specs: parameters of backbone and MTP, QKV in one chunk, in the releases' formats.
      formats: how each parameter is stored.
      wanted: every tensor that has to be there.
      skipped: names of tensors of parts that are not loaded.
      mtp_blocks: MTP blocks to load.
      drafter: the drafter, if there is one and it is wanted.
    """

    folder: Path
    store: TensorStore
    problems: list[Problem]
    config: MiMoConfig | None = None
    layout: Layout | None = None
    specs: tuple[ParamSpec, ...] = ()
    formats: dict[str, Format] = dataclasses.field(default_factory=dict)
    wanted: dict[str, Wanted] = dataclasses.field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    mtp_blocks: int = 0
    drafter: DrafterSurvey | None = None


def survey(
    folder: Path,
    *,
    any_float: bool = False,
    qkv: QKVLayout | None = None,
    mtp: bool = True,
    drafter: bool = True,
) -> Survey:
    """Reads configs and headers, decides the layout and compares what is there with what must be.

    Args:
      folder: a local checkpoint.
      any_float: accept weights of any float type, not only the config's (they will be cast).
      qkv: overrides the order of QKV rows.
      mtp: look at MTP blocks; else their tensors are skipped.
      drafter: look at the drafter's folder.
    """

    def skip(name: str) -> bool:
        return skipped(name, mtp=mtp)

    store = open_store(folder, skip=skip)
    found = Survey(folder, store, store.problems, skipped=tuple(filter(skip, store.tensors)))
    raw = _read_config(store, found.problems)
    config = None
    if raw is not None:
        try:
            config = MiMoConfig.from_dict(raw)
        except ConfigError as error:
            found.problems.append(
                Problem("unusable config", str(error), "that of a MiMo-V2", "", "config.json")
            )
    if config is not None and raw is not None:
        _survey_backbone(found, raw, config, qkv=qkv, any_float=any_float, mtp=mtp)
    if drafter and (folder / DRAFTER).is_dir():
        _survey_drafter(found, any_float=any_float)
    return found


def compare(
    store: TensorStore, wanted: dict[str, Wanted], skipped_names: Iterable[str] = ()
) -> list[Problem]:
    """Missing, misshapen, mistyped and extra tensors."""
    problems = []
    for name, want in wanted.items():
        stored = store.tensors.get(name)
        file = store.file_of(name)
        if stored is None:
            if name not in store.unavailable and not store.incomplete:
                problems.append(Problem("missing tensor", "nothing", str(want), name, file))
        elif stored.shape != want.shape:
            problems.append(Problem("wrong shape", str(stored), str(want), name, file))
        elif stored.dtype not in want.dtypes:
            problems.append(Problem("wrong dtype", str(stored), str(want), name, file))
    known = wanted.keys() | set(skipped_names)
    for name, stored in store.tensors.items():
        if name not in known:
            expected = "no such tensor in a model with this config.json and layout"
            problems.append(
                Problem("extra tensor", str(stored), expected, name, store.file_of(name))
            )
    return problems


def _read_config(store: TensorStore, problems: list[Problem]) -> dict[str, Any] | None:
    """The folder's config.json as a dictionary, or None and a problem."""
    file = store.relative("config.json")
    before = len(problems)
    path = store.path("config.json")
    if path is None:
        if len(problems) == before:
            problems.append(
                Problem("missing file", "nothing", "the model's configuration", "", file)
            )
        return None
    try:
        raw = loads_lenient(path.read_text(encoding="utf-8"))
    except (ConfigError, UnicodeDecodeError, OSError, RecursionError) as error:
        problems.append(Problem("broken JSON", str(error), "a JSON object", "", file))
        return None
    if not isinstance(raw, dict):
        problems.append(Problem("broken JSON", type(raw).__name__, "a JSON object", "", file))
        return None
    return raw


def _survey_backbone(
    found: Survey,
    raw: dict[str, Any],
    config: MiMoConfig,
    *,
    qkv: QKVLayout | None,
    any_float: bool,
    mtp: bool,
) -> None:
    """Fills in what the survey says of backbone and MTP."""
    store = found.store
    reasons = []
    embedding = store.tensors.get("model.embed_tokens.weight")
    if not (raw.get("dtype") or raw.get("torch_dtype")) and embedding is not None:
        stored = {dtype_name(d): d for d in ("bfloat16", "float32")}.get(embedding.dtype)
        config = dataclasses.replace(config, dtype=stored or config.dtype)
        reasons.append(f"dtype: {config.dtype}, the embedding's; config.json does not say")
    if mtp:
        numbers = [int(m[1]) for m in map(MTP_BLOCK.match, store.names) if m]
        found.mtp_blocks = max(numbers, default=-1) + 1
        said = config.num_nextn_predict_layers
        reasons.append(
            f"MTP blocks: {found.mtp_blocks} by tensor names; num_nextn_predict_layers is "
            + ("absent" if said is None else str(said))
        )
    found.specs = backbone_specs(config) + mtp_specs(config, found.mtp_blocks)
    layout, problems = detect(store, config, found.specs, qkv)
    found.problems += problems
    found.layout = layout.because(*reasons)
    ignored = ignored_modules(config)
    plain = FLOATS if any_float else (dtype_name(config.dtype),)
    for spec in found.specs:
        fmt = found.formats[spec.name] = format_of(spec, layout, ignored)
        found.wanted |= wanted_tensors(spec, layout, fmt, plain)
    found.problems += compare(store, found.wanted, found.skipped)
    found.config = with_formats(config, layout)


def _survey_drafter(found: Survey, *, any_float: bool) -> None:
    """Fills in what the survey says of the drafter (MODEL_SPEC 4.3)."""
    try:
        inside(found.folder, DRAFTER)
    except UnsafePathError as error:
        found.problems.append(Problem("unsafe path", str(error), "a folder inside", "", DRAFTER))
        return
    store = open_store(found.folder, DRAFTER)
    problems = store.problems
    raw = _read_config(store, problems)
    file = store.relative("config.json")
    try:
        config = None if raw is None else DFlashConfig.from_dict(raw)
    except (ConfigError, TypeError, ValueError) as error:
        problems.append(Problem("unusable config", str(error), "a DFlash drafter's", "", file))
        config = None
    if config is not None:
        names = store.tensors.keys()
        prefix = "model." if any(n.startswith("model.") for n in names) else ""
        fc = store.tensors.get(f"{prefix}fc.weight")
        if not (raw or {}).get("dtype") and not (raw or {}).get("torch_dtype") and fc is not None:
            stored = {dtype_name(d): d for d in ("bfloat16", "float32")}.get(fc.dtype)
            config = dataclasses.replace(config, dtype=stored or config.dtype)
        specs = drafter_specs(config, prefix)
        plain = FLOATS if any_float else (dtype_name(config.dtype),)
        layout = Layout("plain", 1)
        wanted: dict[str, Wanted] = {}
        for spec in specs:
            wanted |= wanted_tensors(spec, layout, "plain", plain)
        problems += compare(store, wanted)
        problems += _mismatches(found, config, file)
        embedding = _mask_embedding(store, config)
        found.drafter = DrafterSurvey(store, config, prefix, specs, wanted, embedding)
        if found.layout is not None:
            found.layout = dataclasses.replace(found.layout, drafter_prefix=prefix)
    found.problems += problems


def _mismatches(found: Survey, drafter: DFlashConfig, file: str) -> list[Problem]:
    """Sizes in which drafter and backbone must agree (MODEL_SPEC 9.26); vocabularies need not."""
    if found.config is None:
        return []
    pairs = {
        "hidden_size": (drafter.hidden_size, found.config.hidden_size),
        "num_target_layers": (drafter.num_target_layers, found.config.num_hidden_layers),
    }
    return [
        Problem("drafter of another model", f"{k} {a}", f"{b}, as in the backbone", "", file)
        for k, (a, b) in pairs.items()
        if a != b
    ]


def _mask_embedding(store: TensorStore, config: DFlashConfig) -> np.ndarray:
    """The vector of mask_embedding.pt; an empty one (and a problem) if it cannot be used."""
    file = store.relative(MASK_EMBEDDING)

    def problem(kind: str, found: str, expected: str) -> None:
        store.problems.append(Problem(kind, found, expected, "mask embedding", file))

    wanted = f"mask_token_id {config.mask_token_id} and a vector of {config.hidden_size}"
    nothing = np.zeros(0, np.float32)
    before = len(store.problems)
    path = store.path(MASK_EMBEDDING)
    if path is None:
        if len(store.problems) == before:
            problem("missing file", "nothing", wanted)
        return nothing
    try:
        content = read_torch(path)
    except TorchFileError as error:
        problem("unreadable torch file", str(error), wanted)
        return nothing
    if not isinstance(content, dict) or not isinstance(content.get("embedding"), np.ndarray):
        problem("unreadable torch file", f"{type(content).__name__} without embedding", wanted)
        return nothing
    embedding = content["embedding"]
    if content.get("mask_token_id") != config.mask_token_id:
        problem("wrong mask token", f"mask_token_id {content.get('mask_token_id')!r}", wanted)
    if embedding.shape != (config.hidden_size,):
        problem("wrong shape", f"{embedding.dtype} {list(embedding.shape)}", wanted)
        return nothing
    if not np.isfinite(embedding.astype(np.float32)).all():
        problem("bad values", "NaN or infinity", "finite numbers")
    return embedding
