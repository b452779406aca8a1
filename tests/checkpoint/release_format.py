"""Checkpoints in every published storage format, written from MODEL_SPEC 3.2, 4.3 and 5 alone.

Numpy and the standard library only, and nothing of mimo_jax: codes are drawn as random bytes, and
what they mean is computed by plain loops over rows.  So a loader that agrees with
`Release.weights` reads the format, and not merely what a writer of ours produces.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint.release_bytes import (
    BLOCK,
    E2M1,
    E4M3,
    Tensor,
    ceil,
    encode,
    fp8_rows,
    qkv_places,
    safetensors_bytes,
    torch_bytes,
)

# 8 query heads, 2 full and 4 sliding kv heads of 48 / 32: two chunks of 272 rows in full layers
# (6 scale rows, contiguous 5) and of 352 in sliding ones (6 and 6: shapes cannot tell).
FUSED: dict[str, Any] = {
    "architectures": ["MiMoV2ForCausalLM"],
    "model_type": "mimo_v2",
    "vocab_size": 40,
    "hidden_size": 160,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "swa_num_attention_heads": 8,
    "swa_num_key_value_heads": 4,
    "head_dim": 48,
    "v_head_dim": 32,
    "swa_head_dim": 48,
    "swa_v_head_dim": 32,
    "partial_rotary_factor": 0.334,
    "rope_theta": 10000000,
    "swa_rope_theta": 10000,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "attention_chunk_size": 8,
    "add_swa_attention_sink_bias": True,
    "add_full_attention_sink_bias": False,
    "attention_value_scale": 0.707,
    "layernorm_epsilon": 1e-06,
    "hybrid_layer_pattern": [0, 1, 1],
    "moe_layer_freq": [0, 1, 1],
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "max_position_embeddings": 256,
    "dtype": "bfloat16",
    "eos_token_id": 2,
}

# Head sizes of the releases (192 / 128), 4 query heads: 384 query rows a chunk are whole blocks,
# as the split format of V2-Flash needs.  A full layer's chunk has 192 + 128 key and value rows.
RELEASE_HEADS: dict[str, Any] = FUSED | {
    "num_attention_heads": 4,
    "swa_num_attention_heads": 4,
    "head_dim": 192,
    "swa_head_dim": 192,
    "v_head_dim": 128,
    "swa_v_head_dim": 128,
}

DRAFTER: dict[str, Any] = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "hidden_size": 160,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "v_head_dim": 32,
    "partial_rotary_factor": 0.5,
    "block_size": 8,
    "dflash_config": {
        "target_layer_ids": [0, 1, 2],
        "mask_token_id": 39,
        "block_size": 8,
        "attention_value_scale": 0.612,
        "attention_sink_bias": True,
    },
    "num_target_layers": 3,
    "vocab_size": 32,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "sliding_window": 16,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "bfloat16",
    "is_causal": False,
}


@dataclasses.dataclass
class Release:
    """A checkpoint before it is written; tests damage it by changing these.

    Attributes:
      config: config.json, or its text.
      tensors: by file name, by tensor name.
      weights: the dense float32 weights that the tensors stand for, by module: QKV as `q`, `k` and
        `v` in head order, experts one by one.
      metadata: of the index; None for no index.
      drafter: the dflash folder: its config, tensors and mask embedding (id, bytes).
    """

    config: dict[str, Any] | str
    tensors: dict[str, dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    weights: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    metadata: dict[str, Any] | None = None
    drafter: Release | None = None
    mask: tuple[int, bytes] | None = None

    def find(self, name: str) -> dict[str, Tensor]:
        """The file that holds a tensor."""
        return next(file for file in self.tensors.values() if name in file)

    def rename(self, old: str, new: str) -> None:
        """Renames a tensor."""
        file = self.find(old)
        file[new] = file.pop(old)

    @property
    def names(self) -> set[str]:
        """All tensor names."""
        return {name for file in self.tensors.values() for name in file}

    def write(self, folder: Path) -> Path:
        """Writes the folder and returns it."""
        folder.mkdir(parents=True, exist_ok=True)
        text = self.config if isinstance(self.config, str) else json.dumps(self.config, indent=1)
        (folder / "config.json").write_text(text)
        for name, tensors in self.tensors.items():
            (folder / name).write_bytes(safetensors_bytes(tensors))
        if self.metadata is not None:
            weight_map = {t: f for f, tensors in self.tensors.items() for t in tensors}
            index = {"metadata": self.metadata, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        if self.mask is not None:
            (folder / "mask_embedding.pt").write_bytes(torch_bytes(*self.mask))
        if self.drafter is not None:
            self.drafter.write(folder / "dflash")
        return folder


class Writer:
    """Draws tensors and knows the weights they stand for."""

    def __init__(self, release: Release, seed: int, plain: str):
        self.release = release
        self.rng = np.random.default_rng(seed)
        self.plain = plain

    def put(self, file: str, name: str, tensor: Tensor) -> None:
        self.release.tensors.setdefault(file, {})[name] = tensor

    def dense(
        self,
        file: str,
        name: str,
        shape: tuple[int, ...],
        *,
        dtype: str | None = None,
        at: float = 0.0,
    ) -> np.ndarray:
        """A BF16 or F32 tensor around `at`."""
        values = (at + 0.1 * self.rng.standard_normal(shape)).astype(np.float32)
        tensor, values = encode(values, dtype or self.plain)
        self.put(file, name, tensor)
        self.release.weights[name] = values
        return values

    def codes(self, rows: int, columns: int) -> np.ndarray:
        """Random float8 bytes without NaN."""
        bytes_ = self.rng.integers(0, 256, (rows, columns), np.uint8)
        return np.where(bytes_ & 0x7F == 0x7F, bytes_ - 1, bytes_).astype(np.uint8)

    def scales(self, rows: int, columns: int) -> np.ndarray:
        """Random multipliers, of neighbours that differ by factors."""
        exponents = self.rng.uniform(-5, 5, (rows, columns))
        return (1e-4 * 2.0**exponents).astype(np.float32)

    def fp8(self, file: str, name: str, codes: np.ndarray, scales: np.ndarray) -> None:
        self.put(file, name, Tensor("F8_E4M3", codes.shape, codes.tobytes()))
        self.put(file, f"{name}_scale_inv", Tensor("F32", scales.shape, scales.tobytes()))

    def fp8_matrix(self, file: str, name: str, rows: int, columns: int) -> None:
        """A matrix with a scale for each 128 x 128 block."""
        codes = self.codes(rows, columns)
        scales = self.scales(ceil(rows), ceil(columns))
        self.fp8(file, name, codes, scales)
        where = [r // BLOCK for r in range(rows)]
        self.release.weights[name] = fp8_rows(codes, scales, list(range(rows)), where)

    def mxfp4_matrix(self, file: str, name: str, rows: int, columns: int) -> None:
        """A matrix with an exponent for each 32 columns of a row (MODEL_SPEC 5.3)."""
        codes = self.rng.integers(0, 256, (rows, columns // 2), np.uint8)
        scales = self.rng.integers(0x76, 0x7E, (rows, columns // 32), np.uint8)
        self.put(file, name, Tensor("U8", codes.shape, codes.tobytes()))
        self.put(file, f"{name}_scale", Tensor("U8", scales.shape, scales.tobytes()))
        dense = np.empty((rows, columns), np.float32)
        for r in range(rows):
            for c in range(columns):
                byte = int(codes[r, c // 2])
                nibble = byte & 15 if c % 2 == 0 else byte >> 4
                dense[r, c] = E2M1[nibble] * 2.0 ** (int(scales[r, c // 32]) - 127)
        self.release.weights[name] = dense

    def matrix(self, fmt: str, file: str, name: str, rows: int, columns: int) -> None:
        if fmt == "fp8":
            self.fp8_matrix(file, name, rows, columns)
        elif fmt == "mxfp4":
            self.mxfp4_matrix(file, name, rows, columns)
        else:
            self.dense(file, name, (rows, columns))

    def qkv(
        self, file: str, prefix: str, geometry: tuple[int, int, int, int, int], how: str, fmt: str
    ) -> None:
        """The projections of one layer (MODEL_SPEC 5.2).

        Args:
          file, prefix: where they go.
          geometry: query rows, key rows, value rows, chunks and hidden size.
          how: "interleaved", "plain", "split" (keys and values of a chunk quantised together) or
            "split_own" (each matrix by itself).
          fmt: "fp8", or anything else for dense tensors.
        """
        q, k, v, chunks, width = geometry
        sizes, scale_sizes, places = qkv_places(q, k, v, chunks, how)
        if fmt == "fp8":
            codes = {t: self.codes(n, width) for t, n in sizes.items()}
            scales = {t: self.scales(n, ceil(width)) for t, n in scale_sizes.items()}
            for t in sizes:
                self.fp8(file, f"{prefix}.{t}.weight", codes[t], scales[t])
            for part, of_part in places.items():
                dense = np.empty((len(of_part), width), np.float32)
                for r, ((t, row), (st, srow)) in enumerate(of_part):
                    multiplier = scales[st][srow].repeat(BLOCK)[:width]
                    dense[r] = E4M3[codes[t][row]] * multiplier
                self.release.weights[f"{prefix}.{part}"] = dense
            return
        stored = {t: self.dense(file, f"{prefix}.{t}.weight", (n, width)) for t, n in sizes.items()}
        for part, of_part in places.items():
            dense = np.stack([stored[t][row] for (t, row), _ in of_part])
            self.release.weights[f"{prefix}.{part}"] = dense


def make_release(**options: Any) -> Release:
    """A small checkpoint in one of the published formats; see `build_release` for the options.

    Every call gives a copy of its own, to be damaged freely.
    """
    key = json.dumps(options, sort_keys=True)
    if key not in _BUILT:
        _BUILT[key] = build_release(**options)
    return copy.deepcopy(_BUILT[key])


_BUILT: dict[str, Release] = {}


def build_release(
    *,
    qkv: str = "interleaved",
    linear: str = "fp8",
    experts: str = "mxfp4",
    plain: str = "BF16",
    mtp: int = 1,
    drafter: bool = False,
    towers: bool = False,
    single_file: bool = False,
    tp_size: bool = True,
    seed: int = 0,
    **config: Any,
) -> Release:
    """A small checkpoint in one of the published formats.

    Args:
      qkv: see `Writer.qkv`.
      linear: "fp8" or "plain" for QKV, dense MLP and MTP.
      experts: "mxfp4", "fp8" or "plain".
      plain: element type of everything that is not quantised.
      mtp: MTP blocks; num_nextn_predict_layers stays absent, as in the Pro releases.
      drafter: with a dflash folder.
      towers: with tensors of vision and audio encoders.
      single_file: model.safetensors, without an index.
      tp_size: the index tells in how many chunks QKV is interleaved.
      seed: of all values.
      config: changes to the configuration.
    """
    split = qkv.startswith("split")
    c: dict[str, Any] = (RELEASE_HEADS if split else FUSED) | config
    if not split:
        c = c | {"attention_projection_layout": "fused_qkv"}
    else:
        c = c | {"architectures": ["MiMoV2FlashForCausalLM"], "model_type": "mimo_v2_flash"}
    if "fp8" in (linear, experts) or experts == "mxfp4":
        ignored = [f"model.layers.{i}.self_attn.o_proj" for i in range(c["num_hidden_layers"])]
        c["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "ignored_layers": [*ignored, "model.decoder.self_attn.o_proj"],
        }
        if experts == "mxfp4":
            c["quantization_config"] |= {"store_dtype": "mxfp4", "mxfp4_block_size": 32}
    if plain == "F32":
        c["dtype"] = "float32"
    release = Release(c)
    w = Writer(release, seed, plain)
    first = "model.safetensors" if single_file else "model_pp0_ep0_shard0.safetensors"
    second = "model.safetensors" if single_file else "model_pp0_ep1_shard0.safetensors"
    hidden, wide = c["hidden_size"], c["intermediate_size"]

    def attention(file: str, prefix: str, sliding: bool) -> None:
        swa = "swa_" if sliding else ""
        heads, kv = c[f"{swa}num_attention_heads"], c[f"{swa}num_key_value_heads"]
        qk_dim, v_dim = c[f"{swa}head_dim"], c[f"{swa}v_head_dim"]
        geometry = (heads * qk_dim, kv * qk_dim, kv * v_dim, c["num_key_value_heads"], hidden)
        w.qkv(file, prefix, geometry, qkv, linear)
        w.dense(file, f"{prefix}.o_proj.weight", (hidden, heads * v_dim))
        if sliding:
            w.dense(file, f"{prefix}.attention_sink_bias", (heads,), at=1.0)

    def mlp(fmt: str, file: str, prefix: str, width: int) -> None:
        w.matrix(fmt, file, f"{prefix}.down_proj.weight", hidden, width)
        w.matrix(fmt, file, f"{prefix}.gate_proj.weight", width, hidden)
        w.matrix(fmt, file, f"{prefix}.up_proj.weight", width, hidden)

    w.dense(first, "model.embed_tokens.weight", (c["vocab_size"], hidden))
    w.dense(first, "lm_head.weight", (c["vocab_size"], hidden))
    w.dense(first, "model.norm.weight", (hidden,), at=1.0)
    for i, (sliding, moe) in enumerate(
        zip(c["hybrid_layer_pattern"], c["moe_layer_freq"], strict=True)
    ):
        layer = f"model.layers.{i}"
        w.dense(first, f"{layer}.input_layernorm.weight", (hidden,), at=1.0)
        w.dense(first, f"{layer}.post_attention_layernorm.weight", (hidden,), at=1.0)
        attention(first, f"{layer}.self_attn", bool(sliding))
        if not moe:
            mlp(linear, first, f"{layer}.mlp", wide)
            continue
        n = c["n_routed_experts"]
        w.dense(first, f"{layer}.mlp.gate.weight", (n, hidden))
        w.dense(first, f"{layer}.mlp.gate.e_score_correction_bias", (n,), dtype="F32")
        for e in range(n):
            file = first if 2 * e < n else second
            mlp(experts, file, f"{layer}.mlp.experts.{e}", c["moe_intermediate_size"])
    mtp_file = "model.safetensors" if single_file else "model_mtp.safetensors"
    for i in range(mtp):
        block = f"model.mtp.layers.{i}"
        for norm in ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm"):
            w.dense(mtp_file, f"{block}.{norm}.weight", (hidden,), at=1.0)
        w.dense(mtp_file, f"{block}.eh_proj.weight", (hidden, 2 * hidden))
        attention(mtp_file, f"{block}.self_attn", True)
        mlp(linear, mtp_file, f"{block}.mlp", wide)
    if towers:
        weights = dict(release.weights)
        for name in TOWERS:
            w.dense(second, name, (4, 6))
        release.weights = weights
    if not single_file:
        release.metadata = {"total_size": 1}
        if experts == "mxfp4":
            release.metadata["save_format"] = "mxfp4"
        if tp_size and not split:
            chunks = 1 if qkv == "plain" else c["num_key_value_heads"]
            release.metadata["tp_size"] = chunks
    if drafter:
        release.drafter = make_drafter(seed + 1)
    return release


TOWERS = (
    "visual.patch_embed.proj.weight",
    "visual.blocks.0.attn.qkv.weight",
    "audio_encoder.input_local_transformer.layers.0.input_layernorm.weight",
    "speech_embeddings.0.weight",
)


def make_drafter(seed: int = 0, prefix: str = "", files: int = 2) -> Release:
    """A dflash folder of 63 tensors and a mask embedding (MODEL_SPEC 4.3)."""
    c = DRAFTER
    release = Release(json.loads(json.dumps(c)), metadata={"total_size": 1})
    w = Writer(release, seed, "BF16")
    hidden, wide, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    dim, kv = c["head_dim"], c["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, len(c["dflash_config"]["target_layer_ids"]) * hidden),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
    }
    for i in range(c["num_hidden_layers"]):
        layer = f"layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (heads * dim, hidden),
            f"{layer}.self_attn.k_proj.weight": (kv * dim, hidden),
            f"{layer}.self_attn.v_proj.weight": (kv * dim, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, heads * dim),
            f"{layer}.self_attn.q_norm.weight": (dim,),
            f"{layer}.self_attn.k_norm.weight": (dim,),
            f"{layer}.self_attn.attention_sink_bias": (heads,),
            f"{layer}.mlp.gate_proj.weight": (wide, hidden),
            f"{layer}.mlp.up_proj.weight": (wide, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, wide),
        }
    for i, (name, shape) in enumerate(shapes.items()):
        part = 1 + i * files // len(shapes)
        file = f"dflash_draft_model-{part:05d}-of-{files:05d}.safetensors"
        w.dense(file if files > 1 else "dflash_draft_model.safetensors", prefix + name, shape)
    embedding, values = encode(w.rng.standard_normal(hidden).astype(np.float32), "BF16")
    release.mask = (c["dflash_config"]["mask_token_id"], embedding.data)
    release.weights["mask_embedding"] = values
    return release
