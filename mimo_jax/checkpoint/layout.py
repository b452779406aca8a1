"""How a checkpoint stores its weights: the decisions that its tensor names leave open."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

from mimo_jax.config import MiMoConfig
from mimo_jax.model.backbone import release_formats
from mimo_jax.model.parameters import Format
from mimo_jax.quant import FP8_BLOCK, MXFP4_BLOCK

QKVLayout = Literal["interleaved", "plain", "split"]
SINK = "attention_sink_bias"


def qkv_layout(name: str | None) -> QKVLayout | None:
    """The name of an order of QKV rows, checked.

    Raises:
      ValueError: there is no such order.
    """
    if name is None or name in get_args(QKVLayout):
        return cast(QKVLayout | None, name)
    raise ValueError(f"QKV layout {name!r} is not one of {', '.join(get_args(QKVLayout))}")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The storage layout of a checkpoint.

    Attributes:
      qkv: query, key and value projections are "split" in three tensors, or fused in one whose rows
        are "interleaved" by tensor-parallel rank, or in "plain" order [Q; K; V].
      chunks: chunks of the fused matrix in memory, and in the file where it is interleaved.
      linear_format: storage of QKV, dense feed-forward and MTP matrices.
      expert_format: storage of expert matrices.
      shared_kv_scales: of split FP8 layers, the parameters whose keys and values share scale
        blocks, as in V2-Flash's full layers.
      stacked_experts: experts are stacked, gate and up in one tensor (transformers' own names).
      sink_name: last part of the name of a layer's sinks; transformers' own is "sinks".
      drafter_prefix: "model." where the drafter's names have it.
      reasons: why each of this was decided, in words.
    """

    qkv: QKVLayout
    chunks: int
    linear_format: Format = "plain"
    expert_format: Format = "plain"
    shared_kv_scales: frozenset[str] = frozenset()
    stacked_experts: bool = False
    sink_name: str = SINK
    drafter_prefix: str = ""
    reasons: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    def because(self, *reasons: str) -> Layout:
        """This layout with more reasons."""
        return dataclasses.replace(self, reasons=(*self.reasons, *reasons))

    def dequantized(self) -> Layout:
        """The layout of the same checkpoint with dense weights."""
        return dataclasses.replace(
            self, linear_format="plain", expert_format="plain", shared_kv_scales=frozenset()
        )

    def __str__(self) -> str:
        qkv = {
            "interleaved": f"fused QKV, interleaved in {self.chunks} chunks",
            "plain": "fused QKV in plain [Q; K; V] order",
            "split": "split Q, K and V",
        }[self.qkv]
        if self.shared_kv_scales:
            qkv += f", K and V sharing scale blocks in {len(self.shared_kv_scales)} layers"
        experts = "stacked" if self.stacked_experts else "one by one"
        return (
            f"{qkv}; linear maps {self.linear_format}; experts {self.expert_format}, {experts}; "
            f"sinks called {self.sink_name}"
        )


def release_layout(config: MiMoConfig) -> Layout:
    """The layout in which a release with this config is stored."""
    linear, experts = release_formats(config)
    fused = config.attention_projection_layout == "fused_qkv"
    return Layout("interleaved" if fused else "split", config.qkv_chunks, linear, experts)


def with_formats(config: MiMoConfig, layout: Layout, ignored: Sequence[str] = ()) -> MiMoConfig:
    """The config with `quantization_config` and `attention_projection_layout` as stored.

    Args:
      config: what a config.json says.
      layout: how the weights are stored.
      ignored: further modules that are not quantised although their kind is.
    """
    fused = "split" if layout.qkv == "split" else "fused_qkv"
    config = dataclasses.replace(config, attention_projection_layout=fused)
    if layout.linear_format == layout.expert_format == "plain":
        return dataclasses.replace(config, quantization_config=None)
    quant = json.loads(config.quantization_config or "null") or release_quantization(config)
    if layout.expert_format == "mxfp4":
        quant |= {"store_dtype": "mxfp4", "mxfp4_block_size": MXFP4_BLOCK}
    else:
        quant = {k: v for k, v in quant.items() if k not in ("store_dtype", "mxfp4_block_size")}
    if ignored:
        quant["ignored_layers"] = [
            *quant.get("ignored_layers", ()),
            *(i for i in ignored if i not in quant.get("ignored_layers", ())),
        ]
    return dataclasses.replace(config, quantization_config=json.dumps(quant, sort_keys=True))


def release_quantization(config: MiMoConfig) -> dict[str, Any]:
    """The releases' `quantization_config` for a model of this size (MODEL_SPEC 1.1)."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        "ignored_layers": [
            f"model.layers.{i}.self_attn.o_proj" for i in range(config.num_hidden_layers)
        ],
    }


def ignored_modules(config: MiMoConfig) -> frozenset[str]:
    """Modules that `quantization_config` exempts; some match nothing (MODEL_SPEC 9.6)."""
    if config.quantization_config is None:
        return frozenset()
    return frozenset(json.loads(config.quantization_config).get("ignored_layers") or ())
