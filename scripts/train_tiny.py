"""Trains mimo-tiny, a small MiMo that writes Python, and saves it in the release's own format.

    python scripts/train_tiny.py prepare --data .data        # corpus, split, tokenizer, tokens
    python scripts/train_tiny.py train --data .data --out outputs/mimo-tiny
    python scripts/train_tiny.py evaluate --data .data --model outputs/mimo-tiny

`train` needs a GPU for the full run (about 10 minutes on an H200) and runs small anywhere, for
example with `--steps 20 --batch 2 --seq 256`.  Expert weights are trained through MXFP4 and fused
QKV and dense feed-forward weights through block-FP8 (straight-through rounding), so that the saved
model computes what was trained.  Experts are balanced by moving the router's selection bias after
each step, as DeepSeek-V3 and MiMo do, without an auxiliary loss.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny_corpus
from tiny_eval import (
    bits_per_byte,
    cross_entropy,
    evaluate,
    expert_counts,
    held_out_nats,
    held_out_windows,
)

from mimo_jax import checkpoint
from mimo_jax.cli.console import run_program
from mimo_jax.config import MiMoConfig
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.parameters import ParamSpec, abstract, parameters
from mimo_jax.model.taps import Taps
from mimo_jax.quant import dequantize, quantize_fp8, quantize_mxfp4

Weights = dict[str, jax.Array]


def tiny_config(max_len: int = 4096) -> MiMoConfig:
    """A MiMo with every layout trap of the releases and about 20 M parameters.

    Two key/value heads in full and four in sliding layers, 48-wide keys and 32-wide values, chunks
    of 272 rows (not a multiple of the FP8 block) and ids beyond the tokenizer's.
    """
    pattern = [0, 1, 1, 1, 0, 1, 1, 0]
    raw = {
        "architectures": ["MiMoV2ForCausalLM"],
        "model_type": "mimo_v2",
        "vocab_size": tiny_corpus.VOCAB_SIZE,
        "hidden_size": 256,
        "num_hidden_layers": len(pattern),
        "hybrid_layer_pattern": pattern,
        "moe_layer_freq": [0] + [1] * (len(pattern) - 1),
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "swa_num_attention_heads": 8,
        "swa_num_key_value_heads": 4,
        "head_dim": 48,
        "v_head_dim": 32,
        "swa_head_dim": 48,
        "swa_v_head_dim": 32,
        "partial_rotary_factor": 0.334,
        "rope_theta": 1_000_000,
        "swa_rope_theta": 10_000,
        "sliding_window": 128,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "attention_value_scale": 0.612,
        "attention_projection_layout": "fused_qkv",
        "intermediate_size": 768,
        "moe_intermediate_size": 96,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "hidden_act": "silu",
        "layernorm_epsilon": 1e-5,
        "max_position_embeddings": max_len,
        "moe_router_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": tiny_corpus.VOCAB_SIZE
        - tiny_corpus.PADDING_IDS
        - len(tiny_corpus.SPECIAL_TOKENS),
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "ignored_layers": [f"model.layers.{i}.self_attn.o_proj" for i in range(len(pattern))]
            + ["model.decoder.self_attn.o_proj"],
            "store_dtype": "mxfp4",
            "mxfp4_block_size": 32,
        },
    }
    return MiMoConfig.from_dict(raw)


def specs_of(config: MiMoConfig) -> dict[str, ParamSpec]:
    """Every parameter's declaration by tensor name."""
    module = abstract(lambda make: MiMo(config, make), config.dtype)
    return {param.spec.name: param.spec for _, param in parameters(module)}


def initial_weights(specs: dict[str, ParamSpec], key: jax.Array) -> Weights:
    """Float32 master weights, in the shapes they have in a checkpoint (experts stacked).

    Matrices get a standard deviation of 0.5 / sqrt(inputs).
    """
    weights = {}
    for i, (name, spec) in enumerate(sorted(specs.items())):
        shape = spec.stored_shape or spec.shape
        if spec.init == "normal":
            std = 0.02 if "embed_tokens" in name else 0.5 / math.sqrt(shape[-1])
            weights[name] = std * jax.random.normal(jax.random.fold_in(key, i), shape)
        else:
            weights[name] = (jnp.ones if spec.init == "ones" else jnp.zeros)(shape)
    return weights


def quantize(spec: ParamSpec, w: jax.Array) -> Any:
    """A weight in the form the release stores it in."""
    if spec.format == "mxfp4":
        return quantize_mxfp4(w)
    if spec.format == "fp8":
        return quantize_fp8(w)
    return w.astype(spec.dtype or jnp.bfloat16)


def round_through(spec: ParamSpec, w: jax.Array) -> jax.Array:
    """What `quantize` would store, dense; gradients pass as if nothing were rounded."""
    rounded = dequantize(quantize(spec, w), jnp.float32)
    return w + jax.lax.stop_gradient(rounded - w)


def forward(
    config: MiMoConfig,
    weights: Weights,
    tokens: jax.Array,
    dropout: Callable[[int, jax.Array], jax.Array] = lambda i, x: x,
) -> tuple[jax.Array, jax.Array]:
    """Logits [B, T, vocab] of the dense weights given, and how often experts were chosen [L, E].

    `dropout(i, x)` is applied to the embedding (i = 0) and to what each layer adds (i = 1, ...).
    """
    compute = jnp.dtype(config.dtype)
    model = MiMo(
        config,
        lambda spec: weights[spec.name].astype(spec.dtype or compute).reshape(spec.shape),
    )
    x = dropout(0, model.embed_tokens[...][tokens])
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    loads = []
    for layer, spec in zip(model.layers, config.layers, strict=True):
        tap = f"experts.{spec.index}"

        def block(layer: Any, x: jax.Array, tap: str = tap) -> tuple[jax.Array, Any]:
            taps = Taps([tap])
            return layer(x, positions, None, taps)[0], taps.values.get(tap)

        y, chosen = jax.checkpoint(block)(layer, x)
        x = x + dropout(spec.index + 1, y - x)
        if spec.moe:
            everywhere = jnp.ones(tokens.shape, bool)
            loads.append(expert_counts(chosen, everywhere, config.n_routed_experts))
    return model.logits(x), jnp.stack(loads)


def optimizer(
    specs: dict[str, ParamSpec], peak: float, steps: int, decay: float
) -> optax.GradientTransformation:
    """Muon for hidden matrices (stacks one by one), AdamW for embeddings, head, router, vectors."""

    def muon_axes(params: Any) -> Any:
        matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
        hidden = {
            name: len(spec.stored_shape or spec.shape) > 1
            and not any(k in name for k in ("embed", "lm_head", ".gate."))
            for name, spec in specs.items()
        }
        return {name: matrix if hidden[name] else None for name in params}

    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, min(200, steps // 10), steps, 0.0)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            schedule,
            weight_decay=decay,
            adam_weight_decay=decay,
            muon_weight_dimension_numbers=muon_axes,
            consistent_rms=0.2,
            adam_b2=0.95,
        ),
    )


def make_step(
    config: MiMoConfig,
    specs: dict[str, ParamSpec],
    tx: optax.GradientTransformation,
    batch: int,
    seq: int,
    bias_rate: float,
    dropout_rate: float,
) -> Callable[..., Any]:
    """One compiled training step on random windows of the token stream."""
    bias_names = [n for n in sorted(specs, key=_layer_order) if n.endswith("correction_bias")]

    def loss_fn(weights: Weights, tokens: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        def dropout(i: int, x: jax.Array) -> jax.Array:
            kept = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - dropout_rate, x.shape)
            return jnp.where(kept, x / (1 - dropout_rate), 0).astype(x.dtype)

        rounded = {n: round_through(specs[n], w) for n, w in weights.items()}
        logits, loads = forward(config, rounded, tokens[:, :-1], dropout)
        return cross_entropy(logits, tokens[:, 1:]).mean(), loads

    @jax.jit(donate_argnames=("weights", "state"))
    def step(weights: Weights, state: Any, stream: jax.Array, index: jax.Array) -> Any:
        key, drop_key = jax.random.split(jax.random.fold_in(jax.random.key(1), index))
        starts = jax.random.randint(key, (batch,), 0, stream.shape[0] - seq - 1)
        tokens = stream[starts[:, None] + jnp.arange(seq + 1)].astype(jnp.int32)
        (loss, loads), grads = jax.value_and_grad(loss_fn, has_aux=True)(weights, tokens, drop_key)
        updates, state = tx.update(grads, state, weights)
        weights = jax.tree.map(jnp.add, weights, updates)
        # The selection bias follows the load, not the gradient (which is zero); it is centred so
        # that it keeps meaning relative preference.
        for name, load in zip(bias_names, loads, strict=True):
            bias = weights[name] + bias_rate * jnp.sign(load.mean() - load)
            weights[name] = bias - bias.mean()
        imbalance = (loads.max(axis=1) / loads.mean(axis=1)).max()
        return weights, state, loss, imbalance

    return step


def _layer_order(name: str) -> tuple[int, str]:
    parts = name.split(".")
    return (int(parts[2]) if parts[1] == "layers" else -1, name)


def prepare(args: argparse.Namespace) -> None:
    """Writes the tokenizer, both token streams and the corpus figures to the data folder."""
    corpus = tiny_corpus.read_corpus()
    tokenizer = tiny_corpus.train_tokenizer(list(corpus.train.values()))
    tiny_corpus.save_tokenizer(tokenizer, args.data / "tokenizer")
    for part, texts in (("train", corpus.train), ("held_out", corpus.held_out)):
        np.save(args.data / f"{part}.npy", tiny_corpus.encode_stream(tokenizer, [*texts.values()]))
    figures = {
        "python": ".".join(map(str, sys.version_info[:3])),
        "train_files": len(corpus.train),
        "held_out_files": len(corpus.held_out),
        "train_bytes": sum(len(t.encode()) for t in corpus.train.values()),
        "held_out_bytes": sum(len(t.encode()) for t in corpus.held_out.values()),
        "xz_bits_per_byte": tiny_corpus.xz_bits_per_byte([*corpus.held_out.values()]),
        "eot": tokenizer.token_to_id("<|endoftext|>"),
    }
    (args.data / "corpus.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def train(args: argparse.Namespace) -> None:
    """Trains, evaluates before and after quantisation, and saves a release-format checkpoint."""
    figures = json.loads((args.data / "corpus.json").read_text())
    stream = jnp.asarray(np.load(args.data / "train.npy"))
    windows, masks = held_out_windows(
        np.load(args.data / "held_out.npy"), figures["eot"], args.eval_len
    )
    all_scored = masks.sum()
    if args.eval_windows:
        windows, masks = windows[: args.eval_windows], masks[: args.eval_windows]
    config = tiny_config()
    specs = specs_of(config)

    def held_out(weights: Weights) -> float:
        """Bits a byte of dense weights."""
        nats, _ = held_out_nats(
            lambda tokens, _: (forward(config, weights, tokens)[0], 0),
            windows,
            masks,
            args.eval_batch,
        )
        return bits_per_byte(nats, masks.sum(), figures, all_scored)

    weights = initial_weights(specs, jax.random.key(args.seed))
    tx = optimizer(specs, args.lr, args.steps, args.weight_decay)
    state = jax.jit(tx.init)(weights)
    long_from = args.steps - int(args.steps * args.long_fraction)
    long_batch = max(1, args.batch * args.seq // args.eval_len)
    rates = (args.bias_rate, args.dropout)
    steps = {
        False: make_step(config, specs, tx, args.batch, args.seq, *rates),
        True: make_step(config, specs, tx, long_batch, args.eval_len, *rates),
    }
    began, losses = time.time(), []
    for i in range(args.steps):
        weights, state, loss, imbalance = steps[i >= long_from](
            weights, state, stream, jnp.asarray(i)
        )
        losses.append(loss)
        if (i + 1) % args.log_every == 0 or i + 1 == args.steps:
            recent = float(jnp.stack(losses[-args.log_every :]).mean())
            print(
                f"step {i + 1}/{args.steps}  loss {recent:.4f}  "
                f"max load/mean {float(imbalance):.2f}  {time.time() - began:.0f} s",
                flush=True,
            )
        if args.eval_every and (i + 1) % args.eval_every == 0 and i + 1 < args.steps:
            bits = held_out({n: round_through(specs[n], w) for n, w in weights.items()})
            print(f"  held out: {bits:.4f} bits/byte", flush=True)
    train_seconds = time.time() - began

    stored = {n: quantize(specs[n], w) for n, w in weights.items()}
    dense = {n: dequantize(w, jnp.float32) for n, w in stored.items()}
    results: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "arguments": {k: str(v) for k, v in vars(args).items() if k not in ("run", "data", "out")},
        "corpus": figures,
        "train_seconds": round(train_seconds, 1),
        "final_train_loss_nats_per_token": float(jnp.stack(losses[-100:]).mean()),
        "held_out_bits_per_byte": {"unquantised": held_out(weights), "quantised": held_out(dense)},
    }
    print(json.dumps(results["held_out_bits_per_byte"], indent=2))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "training.json").write_text(json.dumps(results, indent=2) + "\n")

    def make(spec: ParamSpec) -> Any:
        value = stored[spec.name]  # what has another shape in memory is never quantised
        return value.reshape(spec.shape) if spec.stored_shape else value

    model = MiMo(config, make)
    layout = checkpoint.release_layout(config)
    loaded = checkpoint.Loaded(config, model, None, None, layout, args.out)
    checkpoint.save(args.out, loaded, max_shard_size=args.shard_bytes)
    for file in (args.data / "tokenizer").iterdir():
        (args.out / file.name).write_bytes(file.read_bytes())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Trains mimo-tiny, a small MiMo.")
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("prepare", help="read the corpus, train the tokenizer, encode")
    p.add_argument("--data", type=Path, required=True)
    p.set_defaults(run=prepare)
    p = commands.add_parser("train", help="train, evaluate and save")
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--steps", type=int, default=1611)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--seq", type=int, default=1024)
    p.add_argument("--eval-len", type=int, default=4096, help="window of the evaluation")
    p.add_argument("--eval-batch", type=int, default=8)
    p.add_argument("--eval-windows", type=int, default=0, help="score only the first so many")
    p.add_argument("--eval-every", type=int, default=0, help="steps; 0: only at the end")
    p.add_argument("--long-fraction", type=float, default=0.15, help="last part at --eval-len")
    p.add_argument("--lr", type=float, default=8e-3)
    p.add_argument("--weight-decay", type=float, default=0.1)
    p.add_argument("--dropout", type=float, default=0.1)
    p.add_argument("--bias-rate", type=float, default=1e-3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--log-every", type=int, default=100)
    p.add_argument("--shard-bytes", type=int, default=12 * 2**20)
    p.set_defaults(run=train)
    p = commands.add_parser("evaluate", help="score a saved model and count experts' loads")
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--model", default="mimo-tiny")
    p.add_argument("--eval-len", type=int, default=4096)
    p.add_argument("--eval-batch", type=int, default=2)
    p.add_argument("--out", type=Path, help="a JSON file to write")
    p.set_defaults(run=evaluate)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run_program(main)
