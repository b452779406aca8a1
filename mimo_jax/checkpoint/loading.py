"""Building a model from a checkpoint folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.checkpoint.errors import CheckpointError, Problem
from mimo_jax.checkpoint.files import TensorStore
from mimo_jax.checkpoint.layout import Layout, qkv_layout
from mimo_jax.checkpoint.names import MASK_EMBEDDING, SCALE_SUFFIX, prefixed, weight_shapes
from mimo_jax.checkpoint.qkv import (
    aligned,
    chunk_rows,
    dequantize_split,
    fuse,
    fuse_fp8,
    total_rows,
)
from mimo_jax.checkpoint.survey import DrafterSurvey, Survey, survey
from mimo_jax.checkpoint.values import bad_values, dense
from mimo_jax.config import MiMoConfig
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.dflash import DFlash
from mimo_jax.model.mtp import MTP
from mimo_jax.model.parameters import Format, ParamSpec, QKVRows
from mimo_jax.quant import FP8_BLOCK, FP8Array, MXFP4Array

# Activations of the releases overflow float16 (MODEL_SPEC 2.12).
MODEL_DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory.

    Attributes:
      config: of the backbone, as its weights are in memory.
      model: the backbone.
      mtp: its multi-token-prediction blocks, if there are any.
      drafter: its DFlash drafter, if there is one.
      layout: how the folder stores these weights (densely, if they were dequantised).
      folder: where they came from.
    """

    config: MiMoConfig
    model: MiMo
    mtp: MTP | None
    drafter: DFlash | None
    layout: Layout
    folder: Path


def load(
    folder: str | Path,
    *,
    dtype: Any = None,
    dequantize: bool = False,
    qkv: str | None = None,
    mtp: bool = True,
    drafter: bool = True,
) -> Loaded:
    """Loads a local checkpoint of any published layout (MODEL_SPEC 5).

    Configs, index and headers are checked completely before the first weight is read, values while
    they are read.

    Args:
      folder: the checkpoint; see `resolve` for names and hub ids.
      dtype: cast weights that are not quantised to this type, and make it the config's; routers
        and their biases keep theirs.  By default everything stays as stored.
      dequantize: turn quantised weights into dense ones of the config's type.
      qkv: "interleaved", "plain" or "split" overrides what was found out about QKV rows.
      mtp: load the MTP blocks.
      drafter: load the DFlash drafter.

    Raises:
      CheckpointError: with everything that is wrong, or the reason why weights of this layout have
        to be dequantised.
      ValueError: `dtype` or `qkv` is not one of those that exist.
    """
    folder = Path(folder)
    if dtype is not None:
        dtype = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
        if dtype not in MODEL_DTYPES:
            raise ValueError(f"dtype={dtype} is not one of {', '.join(MODEL_DTYPES)}")
    if not folder.is_dir():
        raise CheckpointError(
            folder, [Problem("missing folder", "nothing", "a checkpoint folder", "", str(folder))]
        )
    order = qkv_layout(qkv)
    found = survey(folder, any_float=dtype is not None, qkv=order, mtp=mtp, drafter=drafter)
    config, layout = found.config, found.layout
    if config is None or layout is None or found.problems:
        raise CheckpointError(folder, found.problems)
    if not dequantize and (unheld := _unheld(found, layout)):
        raise CheckpointError(folder, unheld)

    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
    if dequantize:
        config = dataclasses.replace(config, quantization_config=None)
    cast = None if dtype is None else jnp.dtype(dtype)
    make = _Reader(found.store, layout, found.formats, jnp.dtype(config.dtype), cast, dequantize)
    model = MiMo(config, make, qkv_chunks=layout.chunks)
    blocks = found.mtp_blocks
    mtp_module = MTP(config, blocks, make, qkv_chunks=layout.chunks) if blocks else None
    problems = list(make.problems.values())
    drafter_module = None
    if found.drafter is not None:
        drafter_module, more = _load_drafter(found.drafter, cast)
        problems += more
    if problems:
        raise CheckpointError(folder, problems)
    stored = layout.dequantized() if dequantize else layout
    return Loaded(config, model, mtp_module, drafter_module, stored, folder)


def _unheld(found: Survey, layout: Layout) -> list[Problem]:
    """Layers whose quantised QKV cannot be held in chunks without requantising."""
    problems = []
    for spec in found.specs:
        if spec.qkv is None or layout.qkv != "split" or found.formats[spec.name] != "fp8":
            continue
        total = total_rows(spec.qkv, spec.shape[0])
        rows = chunk_rows(total, layout.chunks)
        shared = spec.name in layout.shared_kv_scales
        if rows.q % FP8_BLOCK or not (shared or aligned(total, layout.chunks)):
            has = f"{rows.q} query, {rows.k} key and {rows.v} value rows in {layout.chunks} chunks"
            needs = (
                f"chunks whose parts begin at {FP8_BLOCK}-row scale blocks; load with "
                "dequantize=True for dense weights"
            )
            file = found.store.file_of(spec.name.replace("qkv_proj", "q_proj"))
            problems.append(Problem("cannot stay quantised", has, needs, spec.name, file))
    return problems


def _load_drafter(found: DrafterSurvey, cast: np.dtype | None) -> tuple[DFlash, list[Problem]]:
    config, vector = found.config, found.mask_embedding
    if cast is not None:
        config = dataclasses.replace(config, dtype=cast.name)
        vector = vector.astype(cast)
    read = _Reader(found.store, Layout("plain", 1), {}, jnp.dtype(config.dtype), cast, False)

    def make(spec: ParamSpec) -> Any:
        if spec.name == MASK_EMBEDDING:
            return jnp.array(vector)
        return read(prefixed(spec, found.prefix))

    return DFlash(config, make), list(read.problems.values())


@dataclasses.dataclass
class _Reader:
    """The `Make` that reads a parameter's value; notes bad values and goes on.

    Attributes:
      store: tensors to read.
      layout, formats: how they are stored (plain, where nothing is said).
      dtype: type of dequantised weights.
      cast: type for weights that are not quantised and do not fix their own.
      dequantize: whether to dequantise.
      problems: tensors with bad values found so far.
    """

    store: TensorStore
    layout: Layout
    formats: dict[str, Format]
    dtype: np.dtype
    cast: np.dtype | None
    dequantize: bool
    problems: dict[str, Problem] = dataclasses.field(default_factory=dict)

    def __call__(self, spec: ParamSpec) -> Any:
        fmt = self.formats.get(spec.name, "plain")
        names = list(weight_shapes(spec, self.layout))
        if fmt == "plain":
            value = self._plain(spec, names)
            if self.cast is not None and spec.dtype is None:
                value = value.astype(self.cast)
        elif spec.qkv is not None:
            value = self._fp8_qkv(spec, spec.qkv, names)
        else:
            codes = self._stacked(spec, names)
            scales = self._stacked(spec, [n + SCALE_SUFFIX[fmt] for n in names])
            value = FP8Array(codes, scales) if fmt == "fp8" else MXFP4Array(codes, scales)
        if self.dequantize and not isinstance(value, np.ndarray):
            value = dense(value, self.dtype)
        # Copies: the memory map must not become part of the model.
        return jax.tree.map(jnp.array, value)

    def _read(self, name: str) -> np.ndarray:
        array = self.store.tensors[name].read()
        bad = bad_values(name, array)
        if bad is not None:
            file = self.store.file_of(name)
            self.problems[name] = Problem("bad values", *bad, tensor=name, file=file)
        return array

    def _stacked(self, spec: ParamSpec, names: list[str]) -> np.ndarray:
        """The tensors of one parameter: one an expert, or just one."""
        if "{}" in spec.name:
            return np.stack([self._read(n) for n in names])
        return self._read(names[0])

    def _plain(self, spec: ParamSpec, names: list[str]) -> np.ndarray:
        if spec.qkv is not None and len(names) == 3:
            q, k, v = (self._read(n) for n in names)
            return fuse((q, k, v), spec.shape[0])
        if spec.qkv is not None:
            return self._read(names[0]).reshape(spec.shape)
        if "{}" in spec.name and self.layout.stacked_experts:
            below = spec.shape[1] if spec.name.endswith("up_proj.weight") else 0
            return self._read(names[0])[:, below : below + spec.shape[1]]
        return self._stacked(spec, names)

    def _fp8_qkv(self, spec: ParamSpec, rows: QKVRows, names: list[str]) -> Any:
        chunks = spec.shape[0]
        codes = [self._read(n) for n in names]
        scales = [self._read(n + SCALE_SUFFIX["fp8"]) for n in names]
        if len(names) == 1:
            by_chunk = scales[0].reshape(chunks, -1, scales[0].shape[-1])
            return FP8Array(codes[0].reshape(spec.shape), by_chunk)
        q, k, v = codes
        q_scale, k_scale, v_scale = scales
        if not self.dequantize:
            return fuse_fp8((q, k, v), (q_scale, k_scale, v_scale), chunks)
        shared = spec.name in self.layout.shared_kv_scales
        total = total_rows(rows, chunks)
        parts = dequantize_split(
            (q, k, v), (q_scale, k_scale, v_scale), total, chunks, shared=shared
        )
        return fuse(parts, chunks).astype(self.dtype)
