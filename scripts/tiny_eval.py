"""Scores mimo-tiny on held-out files: bits a byte, and how evenly its experts are used."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mimo_jax


def expert_counts(chosen: jax.Array, where: jax.Array, n_experts: int) -> jax.Array:
    """How often each expert [E] was chosen [B, T, X] by the tokens marked in `where` [B, T]."""
    picked = (chosen[..., None] == jnp.arange(n_experts)) & where[..., None, None]
    return picked.sum(axis=(0, 1, 2)).astype(jnp.float32)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Nats of each target, float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def held_out_windows(stream: np.ndarray, eot: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows [n, length + 1] over each file on its own and a mask of the targets they score.

    A file longer than a window is scored with at least half a window of context.
    """
    edges = np.flatnonzero(stream == eot)
    windows, masks = [], []
    for begin, end in itertools.pairwise(edges):
        file = stream[begin : end + 1].astype(np.int32)  # from its <|endoftext|> to the next one
        start, scored = 0, 1
        while scored < len(file):
            piece = file[start : start + length + 1]
            window = np.full(length + 1, eot, np.int32)
            window[: len(piece)] = piece
            mask = np.zeros(length, bool)
            mask[scored - start - 1 : len(piece) - 1] = True
            windows.append(window)
            masks.append(mask)
            scored, start = start + len(piece), start + length // 2
    return np.stack(windows), np.stack(masks)


def held_out_nats(
    forward: Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]],
    windows: np.ndarray,
    masks: np.ndarray,
    batch: int,
) -> tuple[float, Any]:
    """Total nats of the scored targets, and the sum of what else `forward` returns.

    `forward(tokens [B, T], scored [B, T])` gives the logits and a tree of numbers to add up.
    """

    @jax.jit
    def part(tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any]:
        logits, other = forward(tokens[:, :-1], mask)
        return (cross_entropy(logits, tokens[:, 1:]) * mask).sum(), other

    total, others = 0.0, None
    for i in range(0, len(windows), batch):
        rows = np.arange(i, i + batch)
        fresh = rows < len(windows)
        mask = masks[rows % len(windows)] & fresh[:, None]
        nats, other = jax.device_get(part(windows[rows % len(windows)], mask))
        total += float(nats)
        others = other if others is None else jax.tree.map(np.add, others, other)
    return total, others


def bits_per_byte(nats: float, scored: int, figures: dict[str, Any], all_scored: int) -> float:
    """Bits a byte of the held-out text, where `scored` of its `all_scored` tokens were scored."""
    return nats / math.log(2) / (figures["held_out_bytes"] * scored / all_scored)


def evaluate(args: argparse.Namespace) -> None:
    """Scores a saved model, as users load it, on the held-out files, and counts experts' loads."""
    figures = json.loads((args.data / "corpus.json").read_text())
    lm = mimo_jax.load(args.model)
    config, model = lm.config, lm.model
    windows, masks = held_out_windows(
        np.load(args.data / "held_out.npy"), figures["eot"], args.eval_len
    )
    moe_layers = [spec.index for spec in config.layers if spec.moe]
    names = [f"experts.{i}" for i in moe_layers]

    def run(tokens: jax.Array, scored: jax.Array) -> tuple[jax.Array, Any]:
        logits, _, taps = model(tokens, taps=names)
        loads = [expert_counts(taps[n], scored, config.n_routed_experts) for n in names]
        return logits, jnp.stack(loads)

    nats, loads = held_out_nats(run, windows, masks, args.eval_batch)
    share = loads / loads.mean(axis=1, keepdims=True)
    scored = int(masks.sum())
    results = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "corpus": figures,
        "held_out_tokens": scored,
        "held_out_bits_per_byte": bits_per_byte(nats, scored, figures, scored),
        "held_out_perplexity_per_token": math.exp(nats / scored),
        "expert_load_over_mean_by_layer": {
            str(i): sorted(row.astype(float).round(3).tolist(), reverse=True)
            for i, row in zip(moe_layers, share, strict=True)
        },
    }
    print(json.dumps(results, indent=2))
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n")
