"""Names, shapes and element types that a parameter's tensors have in a checkpoint.

Everything follows from the parameter's own declaration (`ParamSpec`) and the checkpoint's `Layout`;
the model's modules remain the only list of parameters.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from mimo_jax.checkpoint.layout import SINK, Layout, release_quantization
from mimo_jax.checkpoint.qkv import blocks, fused_scale_rows, kv_scale_rows, total_rows
from mimo_jax.checkpoint.safetensors_file import DTYPE_NAMES
from mimo_jax.config import DFlashConfig, MiMoConfig
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.dflash import DFlash
from mimo_jax.model.mtp import MTP
from mimo_jax.model.parameters import Format, Make, ParamSpec
from mimo_jax.quant import MXFP4_BLOCK

# Towers of the multimodal releases, which the text model has no use for (MODEL_SPEC 5.1).
MULTIMODAL = re.compile(r"(model\.)?(visual|audio\w*|speech_embeddings)\.")
MTP_PREFIX = "model.mtp."
MTP_BLOCK = re.compile(r"model\.mtp\.layers\.(\d{1,2})\.")
MASK_EMBEDDING = "mask_embedding.pt"

FLOATS = ("BF16", "F16", "F32")
CODES: Mapping[str, str] = {"fp8": "F8_E4M3", "mxfp4": "U8"}
SCALES: Mapping[str, str] = {"fp8": "F32", "mxfp4": "U8"}
SCALE_SUFFIX: Mapping[str, str] = {"fp8": "_scale_inv", "mxfp4": "_scale"}

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Shape and element types in which a tensor of a checkpoint can be used."""

    shape: Shape
    dtypes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{' or '.join(self.dtypes)} {list(self.shape)}"


def dtype_name(dtype: str) -> str:
    """What safetensors calls a dtype."""
    return DTYPE_NAMES[np.dtype(jax.numpy.dtype(dtype))]


def declared(build: Callable[[Make], Any]) -> tuple[ParamSpec, ...]:
    """The declarations of all parameters of the module that `build` makes; allocates nothing."""
    specs: list[ParamSpec] = []

    def make(spec: ParamSpec) -> jax.ShapeDtypeStruct:
        specs.append(spec)
        return jax.ShapeDtypeStruct(spec.shape, np.float32)

    build(make)
    return tuple(specs)


@functools.lru_cache(maxsize=8)
def backbone_specs(config: MiMoConfig) -> tuple[ParamSpec, ...]:
    """Declarations of the backbone as in a quantised release, QKV in one chunk."""
    release = _as_release(config)
    return declared(lambda make: MiMo(release, make, qkv_chunks=1))


@functools.lru_cache(maxsize=8)
def mtp_specs(config: MiMoConfig, n_blocks: int) -> tuple[ParamSpec, ...]:
    """Declarations of the MTP blocks as in a quantised release, QKV in one chunk."""
    release = _as_release(config)
    return declared(lambda make: MTP(release, n_blocks, make, qkv_chunks=1))


@functools.lru_cache(maxsize=8)
def drafter_specs(config: DFlashConfig, prefix: str) -> tuple[ParamSpec, ...]:
    """Declarations of the drafter, but for the mask embedding, which has its own file."""
    specs = declared(lambda make: DFlash(config, make))
    return tuple(prefixed(s, prefix) for s in specs if s.name != MASK_EMBEDDING)


def prefixed(spec: ParamSpec, prefix: str) -> ParamSpec:
    """The declaration with a longer tensor name."""
    return dataclasses.replace(spec, name=prefix + spec.name)


def _as_release(config: MiMoConfig) -> MiMoConfig:
    quantization = json.dumps(release_quantization(config))
    return dataclasses.replace(config, quantization_config=quantization)


def weight_shapes(spec: ParamSpec, layout: Layout) -> dict[str, Shape]:
    """The tensors that hold a parameter, with the shapes of the weights they stand for."""
    if spec.qkv is not None:
        rows, width = total_rows(spec.qkv, spec.shape[0]), spec.shape[-1]
        if layout.qkv != "split":
            return {spec.name: (rows.total, width)}
        each = {"q_proj": rows.q, "k_proj": rows.k, "v_proj": rows.v}
        return {spec.name.replace("qkv_proj", p): (n, width) for p, n in each.items()}
    if "{}" in spec.name:
        if layout.stacked_experts:
            return {stacked_name(spec): stacked_shape(spec)}
        return {spec.name.format(e): spec.tensor_shape for e in range(spec.shape[0])}
    if spec.name.endswith(f".{SINK}"):
        return {spec.name.removesuffix(SINK) + layout.sink_name: spec.tensor_shape}
    return {spec.name: spec.tensor_shape}


def stacked_name(spec: ParamSpec) -> str:
    """transformers' own name of the tensor with all experts of a layer."""
    prefix, projection = spec.name.removesuffix(".weight").split(".{}.")
    return f"{prefix}.{'down_proj' if projection == 'down_proj' else 'gate_up_proj'}"


def stacked_shape(spec: ParamSpec) -> Shape:
    """Shape of that tensor: gate and up matrices stand one below the other."""
    experts, out, width = spec.shape
    return (experts, out if spec.name.endswith("down_proj.weight") else 2 * out, width)


def scale_shape(spec: ParamSpec, layout: Layout, fmt: Format, name: str, shape: Shape) -> Shape:
    """Shape of the scales stored with one quantised tensor [rows, columns] of a parameter."""
    rows, columns = shape[-2:]
    if fmt == "mxfp4":
        return (rows, columns // MXFP4_BLOCK)
    if spec.qkv is None:
        return (blocks(rows), blocks(columns))
    total = total_rows(spec.qkv, spec.shape[0])
    if layout.qkv != "split":
        chunks = layout.chunks if layout.qkv == "interleaved" else 1
        return (fused_scale_rows(total, chunks), blocks(columns))
    shared = spec.name in layout.shared_kv_scales
    of_k, of_v = kv_scale_rows(total, layout.chunks, shared=shared)
    projection = name.removesuffix(".weight").rsplit(".", 1)[-1]
    of_rows = {"q_proj": blocks(rows), "k_proj": of_k, "v_proj": of_v}[projection]
    return (of_rows, blocks(columns))


def format_of(spec: ParamSpec, layout: Layout, ignored: frozenset[str]) -> Format:
    """How the checkpoint stores a parameter."""
    if "{}" in spec.name:
        fmt = layout.expert_format
    else:
        fmt = layout.linear_format if spec.format != "plain" else "plain"
    names = weight_shapes(spec, layout)
    exempt = fmt != "plain" and all(n.removesuffix(".weight") in ignored for n in names)
    return "plain" if exempt else fmt


def wanted_tensors(
    spec: ParamSpec, layout: Layout, fmt: Format, plain: tuple[str, ...]
) -> dict[str, Wanted]:
    """Everything a checkpoint has to hold for one parameter.

    Args:
      spec: the parameter.
      layout: the checkpoint's.
      fmt: how the parameter is stored.
      plain: element types accepted for weights that are not quantised.
    """
    shapes = weight_shapes(spec, layout)
    if fmt == "plain":
        dtypes = plain
        if spec.dtype is not None and len(plain) == 1:
            # Routers are in float32 or bfloat16, selection biases in float32 (MODEL_SPEC 5.1).
            dtypes = ("F32",) if len(spec.shape) == 1 else tuple(sorted({"F32", "BF16", *plain}))
        return {name: Wanted(shape, dtypes) for name, shape in shapes.items()}
    wanted = {}
    for name, shape in shapes.items():
        codes = (*shape[:-1], shape[-1] // 2) if fmt == "mxfp4" else shape
        wanted[name] = Wanted(codes, (CODES[fmt],))
        scales = scale_shape(spec, layout, fmt, name, shape)
        wanted[name + SCALE_SUFFIX[fmt]] = Wanted(scales, (SCALES[fmt],))
    return wanted


def skipped(name: str, *, mtp: bool) -> bool:
    """Whether a tensor is for a part of a release that is not being loaded."""
    return bool(MULTIMODAL.match(name)) or (not mtp and name.startswith(MTP_PREFIX))
