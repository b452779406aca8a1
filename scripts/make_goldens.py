"""Write tests/goldens/*.npz and the checkpoint folders beside them with torch and transformers.

Usage, from the repository root, in an environment with torch 2.13 and transformers 5.23 (neither
is needed to run the tests):

    python scripts/make_goldens.py [case ...]

Every case of `tests/goldens/recipe.py` is written as a hub-named safetensors file and read back by
transformers' own loader, so that its conversion mapping does the renaming and stacking; every
parameter and buffer is then compared with what an independent mapping expects. Runs are eager, on
the CPU, on one thread.

Arrays of a golden (B rows, T columns, K kept columns, C cached columns, V vocabulary):
    tokens, mask, positions     int [B, T], as `recipe.make_inputs` gives them
    keep                        int32 [K], the columns of `logits`
    logits                      float32 [B, K, V], parallel forward of the float32 model
    logits_bf16                 float32 [B, K, V], the same of the bfloat16 model
    router_margin               float32 [B, T], smallest distance over the MoE layers between the
                                last chosen and the first rejected selection score (inf if no MoE)
    steps, cached_columns       int32, lengths of the cached forwards and the columns kept of them
    cached_logits               float32 [B, C, V], from the last column of the prefill on
    logits_f32_of_bf16_weights  float32 [B, K, V], bfloat16-rounded weights computed in float32
                                (transformers_checkpoint only)
    weights_crc32, *_version    what the numbers were made from and with
Logits where `mask` is 0 are finite and mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
import unittest.mock
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file
from transformers import MiMoV2FlashConfig, MiMoV2FlashForCausalLM
from transformers.models.mimo_v2_flash import modeling_mimo_v2_flash as native

GOLDENS = Path(__file__).resolve().parents[1] / "tests" / "goldens"
sys.path.insert(0, str(GOLDENS))

import recipe  # noqa: E402

CHECKPOINT_CASE = "transformers_checkpoint"
LAYER_TYPES = {recipe.FULL: "full_attention", recipe.SLIDING: "sliding_attention"}
SAME_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim"),
    *("attention_value_scale", "attention_dropout", "max_position_embeddings"),
    *("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"),
    *("norm_topk_prob", "routed_scaling_factor", "tie_word_embeddings", "initializer_range"),
    *("use_cache", "pad_token_id", "bos_token_id", "eos_token_id"),
)
# Float32 logits of one model on two routes (padded or not, cached or not) agree to about 1e-5.
SAME_MODEL_ATOL = 1e-4
# A golden that moves by less than this without a feature would not notice that it is missing.
LEAST_EFFECT = 0.05
# Closer selection scores could be ordered differently by another float32 implementation.
LEAST_ROUTER_MARGIN = 5e-6


def native_config(config: dict[str, Any]) -> MiMoV2FlashConfig:
    """Translate hub-style keys, which the native class mostly ignores, to its own.

    Raises:
        ValueError: if `config` asks for something that the native class cannot compute.
    """
    required = {
        "attention_bias": False,
        "add_full_attention_sink_bias": False,
        "add_swa_attention_sink_bias": True,
        "n_shared_experts": None,
        "rope_scaling": None,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "swa_head_dim": config["head_dim"],
        "swa_v_head_dim": config["v_head_dim"],
        "swa_num_attention_heads": config["num_attention_heads"],
    }
    for key, value in required.items():
        if config[key] != value:
            raise ValueError(f"transformers' native class computes only {key} = {value!r}")
    thetas = {"full_attention": "rope_theta", "sliding_attention": "swa_rope_theta"}
    return MiMoV2FlashConfig(
        **{key: config[key] for key in SAME_KEYS},
        rms_norm_eps=config["layernorm_epsilon"],
        layer_types=[LAYER_TYPES[pattern] for pattern in config["hybrid_layer_pattern"]],
        mlp_layer_types=["sparse" if moe else "dense" for moe in config["moe_layer_freq"]],
        # Keys visible including the query's own, here as there: see `check_window_convention`.
        sliding_window=config["sliding_window"],
        rope_parameters={
            layer_type: {
                "rope_type": "default",
                "rope_theta": float(config[theta]),
                "partial_rotary_factor": config["partial_rotary_factor"],
            }
            for layer_type, theta in thetas.items()
        },
    )


def sliding_kv_heads(config: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
    """Context in which sliding layers are built with `swa_num_key_value_heads` kv heads.

    The native class has no such key: it doubles `num_key_value_heads`. Where that is not what the
    config says (Pro: equal numbers), sliding layers get their key and value projections rebuilt.
    """
    kv_heads = config["swa_num_key_value_heads"]
    if kv_heads == 2 * config["num_key_value_heads"]:
        return contextlib.nullcontext()

    class Attention(native.MiMoV2FlashAttention):
        def __init__(self, config: MiMoV2FlashConfig, layer_idx: int) -> None:
            super().__init__(config, layer_idx)
            if self.layer_type == "sliding_attention":
                sizes = (kv_heads * config.head_dim, kv_heads * config.v_head_dim)
                self.k_proj = torch.nn.Linear(config.hidden_size, sizes[0], bias=False)
                self.v_proj = torch.nn.Linear(config.hidden_size, sizes[1], bias=False)
                self.num_key_value_groups = config.num_attention_heads // kv_heads

    return unittest.mock.patch.object(native, "MiMoV2FlashAttention", Attention)


def native_state(weights: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The native class's names and stacked experts, written down apart from its own mapping."""
    state: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[tuple[int, str], torch.Tensor]] = {}
    for name, array in weights.items():
        tensor = torch.from_numpy(array)
        if ".mlp.experts." in name:
            layer, rest = name.split(".mlp.experts.")
            index, projection, _ = rest.split(".")
            experts.setdefault(layer, {})[int(index), projection] = tensor
        else:
            state[name.replace(".attention_sink_bias", ".sinks")] = tensor
    for layer, parts in experts.items():
        count = 1 + max(index for index, _ in parts)
        gate, up, down = (
            torch.stack([parts[index, projection] for index in range(count)])
            for projection in ("gate_proj", "up_proj", "down_proj")
        )
        state[f"{layer}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        state[f"{layer}.mlp.experts.down_proj"] = down
    return state


def build_model(
    config: dict[str, Any], weights: dict[str, np.ndarray], dtype: torch.dtype
) -> MiMoV2FlashForCausalLM:
    """Load hub-named `weights` through transformers and check that all of them arrived."""
    with tempfile.TemporaryDirectory() as folder, sliding_kv_heads(config):
        save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        native_config(config).save_pretrained(folder)
        model, info = MiMoV2FlashForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
    problems = {key: value for key, value in info.items() if value}
    if problems:
        raise RuntimeError(f"transformers did not load the weights cleanly: {problems}")
    check_state(model, native_state(weights), dtype)
    return model.eval()


def check_state(
    model: MiMoV2FlashForCausalLM, expected: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Every parameter and buffer holds exactly what the recipe says, in the dtype it should."""
    state = model.state_dict()
    if set(state) != set(expected):
        raise RuntimeError(f"names differ: {sorted(set(state) ^ set(expected))}")
    for name, tensor in state.items():
        wanted = torch.float32 if name.endswith("e_score_correction_bias") else dtype
        if tensor.dtype != wanted or not torch.equal(tensor, expected[name].to(wanted)):
            raise RuntimeError(f"{name} ({tensor.dtype}) is not the recipe's tensor in {wanted}")
    for name, buffer in model.named_buffers():
        if name not in state and (not name.endswith("inv_freq") or buffer.dtype != torch.float32):
            raise RuntimeError(f"unexpected buffer {name} {buffer.dtype}")


def as_torch(inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """`inputs` as int64 tensors, which embedding and mask code of torch want."""
    return {name: torch.from_numpy(array).long() for name, array in inputs.items()}


def parallel_logits(model: MiMoV2FlashForCausalLM, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """float32 [B, T, V] of one forward over whole rows."""
    data = as_torch(inputs)
    with torch.no_grad():
        output = model(
            data["tokens"],
            attention_mask=data["mask"],
            position_ids=data["positions"],
            use_cache=False,
        )
    return output.logits.float().numpy()


def cached_logits(
    model: MiMoV2FlashForCausalLM, inputs: dict[str, np.ndarray], steps: tuple[int, ...]
) -> np.ndarray:
    """float32 [B, sum(steps), V] of consecutive forwards through one cache."""
    data = as_torch(inputs)
    cache, start, parts = None, 0, []
    for step in steps:
        end = start + step
        with torch.no_grad():
            output = model(
                data["tokens"][:, start:end],
                attention_mask=data["mask"][:, :end],
                position_ids=data["positions"][:, start:end],
                past_key_values=cache,
                use_cache=True,
            )
        cache, start = output.past_key_values, end
        parts.append(output.logits.float().numpy())
    return np.concatenate(parts, axis=1)


def routing(
    model: MiMoV2FlashForCausalLM, inputs: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Selection margins float32 [B, T] and sorted chosen experts int [layers, B * T, k]."""
    margins, chosen, handles = [], [], []

    def hook(gate: torch.nn.Module, _: Any, output: tuple[torch.Tensor, ...]) -> None:
        logits, _, indices = output
        scores = logits.sigmoid() + gate.e_score_correction_bias
        ranked = scores.sort(dim=-1, descending=True).values
        margins.append((ranked[:, gate.top_k - 1] - ranked[:, gate.top_k]).numpy())
        chosen.append(indices.sort(dim=-1).values.numpy())

    for module in model.modules():
        if isinstance(module, native.MiMoV2FlashTopkRouter):
            handles.append(module.register_forward_hook(hook))
    parallel_logits(model, inputs)
    for handle in handles:
        handle.remove()
    shape = inputs["tokens"].shape
    if not margins:
        return np.full(shape, np.inf, np.float32), np.zeros((0, inputs["tokens"].size, 0), int)
    return np.min(margins, axis=0).reshape(shape).astype(np.float32), np.stack(chosen)


def check_effects(case: recipe.Case, inputs: dict[str, np.ndarray], logits: np.ndarray) -> str:
    """Take each feature away in turn and require that the logits at real tokens move."""
    config, weights = case.config, recipe.make_weights(case)
    real = inputs["mask"].astype(bool)
    sliding = recipe.SLIDING in config["hybrid_layer_pattern"]

    def without(suffix: str, value: float) -> dict[str, np.ndarray]:
        return {k: np.full_like(v, value) if k.endswith(suffix) else v for k, v in weights.items()}

    variants: dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]] = {
        "rope": ({**config, "rope_theta": 3e2, "swa_rope_theta": 3e2}, weights),
        "value_scale": ({**config, "attention_value_scale": 0.65}, weights),
    }
    if sliding:
        variants["sinks"] = config, without("attention_sink_bias", -1e4)
    if sliding and recipe.FULL in config["hybrid_layer_pattern"]:
        variants["thetas"] = {**config, "swa_rope_theta": config["rope_theta"]}, weights
    if sliding and max(case.lengths) > config["sliding_window"]:
        for change in (-1, 1):
            window = config["sliding_window"] + change
            variants[f"window{change:+d}"] = {**config, "sliding_window": window}, weights
    if any(config["moe_layer_freq"]):
        variants["bias"] = config, without("e_score_correction_bias", 0.0)

    report = []
    for name, (changed_config, changed_weights) in variants.items():
        model = build_model(changed_config, changed_weights, torch.float32)
        effect = np.abs(parallel_logits(model, inputs) - logits)[real].max()
        if effect < LEAST_EFFECT:
            raise RuntimeError(f"{name} moves the logits by {effect:.2e} only")
        report.append(f"{name} {effect:.2f}")
    return ", ".join(report)


def check_bias(case: recipe.Case, inputs: dict[str, np.ndarray], chosen: np.ndarray) -> str:
    """Share of real tokens whose expert set the selection bias changes."""
    weights = {
        name: np.zeros_like(array) if name.endswith("e_score_correction_bias") else array
        for name, array in recipe.make_weights(case).items()
    }
    _, plain = routing(build_model(case.config, weights, torch.float32), inputs)
    # The first MoE layer alone sees the same hidden states with and without the bias.
    changed = (plain[0] != chosen[0]).any(axis=-1)[inputs["mask"].astype(bool).ravel()]
    if not changed.any():
        raise RuntimeError("the selection bias changes no expert set of the first MoE layer")
    return f"bias changes {changed.mean():.0%} of the first MoE layer's expert sets"


def check_rows_alone(case: recipe.Case, model: MiMoV2FlashForCausalLM, logits: np.ndarray) -> None:
    """A padded row gives at its real tokens what it gives alone and without padding."""
    for row, length in enumerate(case.lengths):
        inputs = {name: array[row : row + 1] for name, array in recipe.make_inputs(case).items()}
        real = inputs["mask"][0].astype(bool)
        alone = {name: array[:, real] for name, array in inputs.items()}
        error = np.abs(parallel_logits(model, alone)[0] - logits[row, real]).max()
        if error > SAME_MODEL_ATOL:
            raise RuntimeError(f"row {row} of {length} tokens differs by {error:.1e} when padded")


def check_window_convention() -> str:
    """Find how many keys a query of the native class sees, from which tokens move its logits."""
    window, length = 5, 16
    config = recipe.make_config(
        hybrid_layer_pattern=[recipe.SLIDING], moe_layer_freq=[0], sliding_window=window
    )
    case = recipe.Case(covers="", config=config, seed=1, lengths=(length,))
    inputs = recipe.make_inputs(case)
    model = build_model(config, recipe.make_weights(case), torch.float32)
    base = parallel_logits(model, inputs)[0, -1]
    visible = []
    for column in range(length):
        changed = {**inputs, "tokens": inputs["tokens"].copy()}
        changed["tokens"][0, column] = 3 + changed["tokens"][0, column] % 50
        if np.abs(parallel_logits(model, changed)[0, -1] - base).max() > 1e-3:
            visible.append(length - 1 - column)
    if sorted(visible) != list(range(window)):
        raise RuntimeError(f"sliding_window = {window} shows distances {sorted(visible)}")
    by_size = MiMoV2FlashConfig(sliding_window_size=window).sliding_window
    return (
        f"native sliding_window = {window}: distances 0 to {max(visible)} are visible, "
        f"{window} keys with the query's own; the hub key sliding_window_size = {window} becomes "
        f"sliding_window = {by_size}"
    )


def make_golden(name: str, case: recipe.Case) -> str:
    """Run one case, check it and write its npz; return a line about it."""
    weights, inputs = recipe.make_weights(case), recipe.make_inputs(case)
    real = inputs["mask"].astype(bool)
    model = build_model(case.config, weights, torch.float32)
    logits = parallel_logits(model, inputs)
    logits_bf16 = parallel_logits(build_model(case.config, weights, torch.bfloat16), inputs)
    margin, chosen = routing(model, inputs)
    keep = np.array(case.keep or range(logits.shape[1]), np.int32)
    arrays: dict[str, Any] = {
        **inputs,
        "keep": keep,
        "logits": logits[:, keep],
        "logits_bf16": logits_bf16[:, keep],
        "router_margin": margin,
        "weights_crc32": np.int64(recipe.fingerprint(weights)),
        "torch_version": np.str_(torch.__version__),
        "transformers_version": np.str_(transformers.__version__),
        "numpy_version": np.str_(np.__version__),
    }
    notes = [f"std {logits[real].std():.1f}, max {np.abs(logits[real]).max():.1f}"]
    notes.append(f"bf16 off by {np.abs(logits_bf16 - logits)[real].max():.2f} at most")
    if margin[real].min() < LEAST_ROUTER_MARGIN:
        raise RuntimeError(f"{name}: router margin {margin[real].min():.1e}; take another seed")
    notes.append(f"router margin {margin[real].min():.1e}")
    if case.steps:
        cached = cached_logits(model, inputs, case.steps)
        columns = np.arange(case.steps[0] - 1, sum(case.steps), dtype=np.int32)
        error = np.abs(cached - logits[:, : cached.shape[1]])[real[:, : cached.shape[1]]].max()
        if error > SAME_MODEL_ATOL:
            raise RuntimeError(f"{name}: cached and parallel logits differ by {error:.1e}")
        notes.append(f"cached off by {error:.0e}")
        arrays["steps"] = np.array(case.steps, np.int32)
        arrays["cached_columns"] = columns
        arrays["cached_logits"] = cached[:, columns]
    if len(set(case.lengths)) > 1:
        check_rows_alone(case, model, logits)
    if name == CHECKPOINT_CASE:
        arrays["logits_f32_of_bf16_weights"] = save_checkpoints(case, weights, inputs)[:, keep]
    notes.append(check_effects(case, inputs, logits))
    if len(chosen):
        notes.append(check_bias(case, inputs, chosen))
    for key, array in arrays.items():
        if "logits" in key and not np.isfinite(array).all():
            raise RuntimeError(f"{name}: {key} is not finite")
    path = GOLDENS / f"{name}.npz"
    np.savez_compressed(path, **arrays)
    return f"{name} ({path.stat().st_size / 1e3:.0f} kB): " + "; ".join(notes)


def save_checkpoints(
    case: recipe.Case, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]
) -> np.ndarray:
    """Write what `save_pretrained` makes of the case; return logits of its bfloat16 weights.

    The float32 model goes to two shards with an index, the bfloat16 model to a single file.
    """
    folder, single = GOLDENS / CHECKPOINT_CASE, GOLDENS / f"{CHECKPOINT_CASE}_single"
    results = []
    for path, dtype, shard in (
        (folder, torch.float32, "120KB"),
        (single, torch.bfloat16, "1GB"),
    ):
        shutil.rmtree(path, ignore_errors=True)
        build_model(case.config, weights, dtype).save_pretrained(path, max_shard_size=shard)
        model = MiMoV2FlashForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
        )
        check_state(model, native_state(weights), dtype)
        model = MiMoV2FlashForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
        results.append(parallel_logits(model.eval(), inputs))
    return results[1]


def save_mask_embedding() -> None:
    """A file of the kind that the drafter's `mask_embedding.pt` is (MODEL_SPEC 4.2.5)."""
    rng = np.random.Generator(np.random.Philox(key=7))
    embedding = torch.from_numpy(rng.standard_normal(64).astype(np.float32)).bfloat16()
    torch.save({"mask_token_id": 7, "embedding": embedding}, GOLDENS / "mask_embedding_torch.pt")
    np.save(GOLDENS / "mask_embedding_torch.npy", embedding.float().numpy())


def main() -> None:
    """Write the goldens of the cases named on the command line, and the mask embedding."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("case", nargs="*", help=f"of {', '.join(recipe.CASES)}; all by default")
    names = parser.parse_args().case or list(recipe.CASES)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    print(check_window_convention())
    save_mask_embedding()
    for name in names:
        print(make_golden(name, recipe.CASES[name]), flush=True)


if __name__ == "__main__":
    main()
