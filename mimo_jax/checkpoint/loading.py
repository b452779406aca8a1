"""Loading a model from a checkpoint folder."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from mimo_jax.checkpoint.building import Loaded, Part, build_parts
from mimo_jax.checkpoint.converted import is_converted, restore
from mimo_jax.checkpoint.errors import CheckpointError, Problem
from mimo_jax.checkpoint.layout import Layout, qkv_layout
from mimo_jax.checkpoint.names import MASK_EMBEDDING, prefixed
from mimo_jax.checkpoint.parameter_sources import ParameterSources
from mimo_jax.checkpoint.qkv import aligned, chunk_rows, total_rows
from mimo_jax.checkpoint.safetensors_file import StoredTensor
from mimo_jax.checkpoint.sources import Held
from mimo_jax.checkpoint.streaming import Progress, stream
from mimo_jax.checkpoint.survey import DrafterSurvey, Survey, survey
from mimo_jax.checkpoint.values import bad_values
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.dflash import DFlash
from mimo_jax.model.mtp import MTP
from mimo_jax.model.parameters import ParamSpec
from mimo_jax.quant import FP8_BLOCK
from sharding.distributed import DistributedError, agree_on_failure
from sharding.rules import ShardingRules

# Activations of the releases overflow float16 (MODEL_SPEC 2.12).
MODEL_DTYPES = ("bfloat16", "float32")


@contextlib.contextmanager
def _failing_together() -> Iterator[None]:
    """Lets all processes fail if one does: they would wait for it in the first computation."""
    try:
        yield
    except Exception as error:
        with contextlib.suppress(DistributedError):  # this process raises its own error
            agree_on_failure(str(error))
        raise
    agree_on_failure(None)


@_failing_together()
def load(
    folder: str | Path,
    *,
    dtype: Any = None,
    dequantize: bool = False,
    qkv: str | None = None,
    mtp: bool = True,
    drafter: bool = True,
    mesh: Mesh | None = None,
    rules: str | ShardingRules = "latency",
    progress: Progress | None = None,
) -> Loaded:
    """Loads a local checkpoint of any published layout, or one that `convert` made.

    Configs, index and headers are checked completely before the first weight is read, values while
    they are read.  Each process reads only what its devices hold, and needs at most
    `streaming.BUDGET` bytes of the host's memory for it.

    Args:
      folder: the checkpoint; see `resolve` for names and hub ids.
      dtype: cast weights that are not quantised to this type, and make it the config's; routers
        and their biases keep theirs.  By default everything stays as stored.
      dequantize: turn quantised weights into dense ones of the config's type.
      qkv: "interleaved", "plain" or "split" overrides what was found out about QKV rows.
      mtp: load the MTP blocks.
      drafter: load the DFlash drafter.
      mesh: the devices, in explicit mode; jax's default device without one.
      rules: how parameters are split over the mesh: a name of `sharding.rules.PRESETS`, which is
        fitted to the model and the mesh, or rules.
      progress: called after every piece with the bytes read so far and in all.

    Raises:
      CheckpointError: with everything that is wrong, or the reason why weights of this layout have
        to be dequantised.
      ValueError: `dtype` or `qkv` is not one of those that exist.
      ShardingError: no rules are called so, or the mesh does not divide the model.
      NotEnoughMemoryError: the weights do not fit; nothing has been allocated.
      DistributedError: another process of the job has failed.
    """
    folder = Path(folder)
    if isinstance(rules, str):
        ShardingRules.preset(rules)  # or it says which there are, without a mesh too
    if dtype is not None:
        dtype = model_dtype(dtype)
    if not folder.is_dir():
        raise CheckpointError(
            folder, [Problem("missing folder", "nothing", "a checkpoint folder", "", str(folder))]
        )
    order = qkv_layout(qkv)
    if is_converted(folder):
        if dequantize or qkv is not None or dtype is not None:
            asked = f"dtype={dtype}, dequantize={dequantize}, qkv={qkv}"
            expected = "nothing of these; give them when converting, or load the original"
            raise CheckpointError(folder, [Problem("already converted", asked, expected)])
        return restore(folder, mtp=mtp, drafter=drafter, mesh=mesh, rules=rules)
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
    damaged: set[StoredTensor] = set()
    sources = ParameterSources(
        found.store, layout, found.formats, jnp.dtype(config.dtype), cast, dequantize, damaged
    )
    blocks, chunks = found.mtp_blocks, layout.chunks
    parts = {"backbone": Part(lambda make: MiMo(config, make, chunks), sources)}
    if blocks:
        parts["mtp"] = Part(lambda make: MTP(config, blocks, make, chunks), sources)
    if found.drafter is not None:
        parts["drafter"] = _drafter(found.drafter, cast, damaged)

    def fill(values: Any, shardings: Sequence[Sharding | None]) -> Any:
        leaves, structure = jax.tree.flatten(values)
        arrays = stream(list(zip(leaves, shardings, strict=True)), progress)
        return jax.tree.unflatten(structure, arrays)

    try:
        built, placement = build_parts(parts, mesh, rules, fill)
        problems = [bad_values(t) for t in sorted(damaged, key=lambda t: (t.file.name, t.start))]
    except OSError as error:
        expected = "files that can be read and do not change meanwhile"
        problems = [Problem("unreadable file", str(error), expected)]
    if problems:
        raise CheckpointError(folder, [p for p in problems if p is not None])
    stored = layout.dequantized() if dequantize else layout
    mtp_module, drafter_module = built.get("mtp"), built.get("drafter")
    return Loaded(config, built["backbone"], mtp_module, drafter_module, stored, folder, placement)


def model_dtype(dtype: Any) -> str:
    """The name of a dtype that models can compute in.

    Raises:
      ValueError: it is none.
    """
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in MODEL_DTYPES:
        raise ValueError(f"dtype={name} is not one of {', '.join(MODEL_DTYPES)}")
    return name


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


def _drafter(found: DrafterSurvey, cast: np.dtype | None, damaged: set[StoredTensor]) -> Part:
    config, vector = found.config, found.mask_embedding
    if cast is not None:
        config = dataclasses.replace(config, dtype=cast.name)
        vector = vector.astype(cast)
    layout, dtype = Layout("plain", 1), jnp.dtype(config.dtype)
    read = ParameterSources(found.store, layout, {}, dtype, cast, False, damaged)

    def sources(spec: ParamSpec) -> Any:
        if spec.name == MASK_EMBEDDING:
            return Held(vector)
        return read(prefixed(spec, found.prefix))

    return Part(lambda make: DFlash(config, make), sources)
