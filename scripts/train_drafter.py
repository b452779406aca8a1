"""Trains MTP blocks and a DFlash drafter for a checkpoint, on what its own backbone writes.

    python scripts/train_drafter.py generate --model M --data tokens.npy --out continuations.npz
    python scripts/train_drafter.py train --model M --continuations continuations.npz --out FOLDER
    python scripts/train_drafter.py evaluate --model FOLDER --data held_out.npy

`generate` has the backbone continue windows of a file of token ids.  `train` leaves the backbone as
it is and trains drafters to predict the continuations (MODEL_SPEC 3.3, 4.6), with the rounding that
the release's formats bring; it writes a complete checkpoint.  `evaluate` decodes speculatively and
reports how many tokens a round gives.  A full run is for one GPU that holds the backbone; for
example with `--steps 5 --batch 2 --seq 128` it runs anywhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from circumstances import circumstances, write_result
from drafter_forward import Seen, dflash_loss, mtp_loss, observe
from drafter_weights import (
    Part,
    Weights,
    dflash_part,
    frozen,
    mtp_part,
    optimizer,
    save,
)

import mimo_jax as mj
from mimo_jax.checkpoint.saving import SHARD_SIZE
from mimo_jax.cli.console import run_program
from mimo_jax.decoding.autoregressive import Decoder
from mimo_jax.decoding.draft_width import by_position
from mimo_jax.decoding.speculative import SpeculativeDecoder

# A drafter's loss, and what is logged of it, of a dense module, the backbone and a batch.
Loss = Callable[[Any, Any, Seen, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
States = dict[str, tuple[Weights, Any]]


@dataclasses.dataclass(frozen=True)
class Continuations:
    """Sequences [n, T], and which of their tokens the backbone produced [n, T]."""

    tokens: np.ndarray
    mask: np.ndarray

    def batches(
        self, batch: int, seq: int, steps: int, seed: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens and masks [batch, seq]: all sequences in a random order, then in another one.

        Longer sequences are cut at random.
        """
        rng = np.random.default_rng(seed)
        order: list[int] = []
        for _ in range(steps):
            while len(order) < batch:
                order += rng.permutation(len(self.tokens)).tolist()
            rows, order = np.asarray(order[:batch]), order[batch:]
            starts = rng.integers(self.tokens.shape[1] - seq + 1, size=batch)
            at = (rows[:, None], starts[:, None] + np.arange(seq))
            yield self.tokens[at].astype(np.int32), self.mask[at]


def windows(stream: np.ndarray, lengths: np.ndarray, starts: np.ndarray) -> list[list[int]]:
    """Windows of a token stream; start 0 and 1 stand for its begin and the last window there is."""
    begin = (starts * (len(stream) - lengths)).astype(np.int64)
    return [stream[b : b + n].tolist() for b, n in zip(begin, lengths, strict=True)]


def read_stream(file: Path, lm: mj.LanguageModel, longest: int) -> np.ndarray:
    """The token ids in a file.

    Raises:
      ValueError: they are not what prompts of this model can be cut from.
    """
    try:
        stream = np.load(file)
    except ValueError:  # numpy's advice would be to trust it
        raise ValueError(f"{file} is no .npy file of numbers; expected one of token ids") from None
    if stream.ndim != 1 or not np.issubdtype(stream.dtype, np.integer) or len(stream) < longest:
        raise ValueError(
            f"{file} has {stream.dtype} {list(stream.shape)}; expected at least {longest} token "
            "ids in one dimension"
        )
    if stream.max() >= lm.config.vocab_size:
        raise ValueError(
            f"{file} has token {stream.max()}, the model only {lm.config.vocab_size}; encode the "
            "text with the model's own tokenizer"
        )
    return stream


def read_continuations(file: Path) -> Continuations:
    """What `generate` wrote.

    Raises:
      OSError: it can't be read.
      ValueError: it is something else.
    """
    try:
        with np.load(file) as arrays:
            return Continuations(arrays["tokens"], arrays["mask"])
    except (ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile):
        raise ValueError(f"{file} is not what generate writes; give the --out of that") from None


def continued(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    length: int,
    seeds: Sequence[int],
) -> Continuations:
    """Prompts continued to a total length, or to the end that the model gives them."""
    params = [
        mj.SamplingParams(temperature=t, max_tokens=length - len(p))
        for p, t in zip(prompts, temperatures, strict=True)
    ]
    blocks = [b.tokens for b in decoder.blocks(prompts, params, seeds, max_len=length)]
    produced = np.concatenate(blocks, axis=1)
    tokens = np.zeros((len(prompts), length), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, (prompt, new) in enumerate(zip(prompts, produced, strict=True)):
        new = new[new >= 0]
        end = len(prompt) + len(new)
        tokens[row, :end] = [*prompt, *new]
        mask[row, len(prompt) : end] = True
    return Continuations(tokens, mask)


def generate(args: argparse.Namespace) -> None:
    """Continues random windows of a token file and saves them with their masks."""
    lm = mj.load(args.model, kernels=args.kernels)
    shortest, longest = args.prompt_len
    stream = read_stream(args.data, lm, longest)
    rng = np.random.default_rng(args.seed)
    done: list[Continuations] = []
    began = time.time()
    for first in range(0, args.prompts, args.batch):
        n = min(args.batch, args.prompts - first)
        prompts = windows(stream, rng.integers(shortest, longest + 1, size=n), rng.random(n))
        temperatures = [args.temperature[(first + i) % len(args.temperature)] for i in range(n)]
        seeds = rng.integers(2**63, size=n).tolist()
        done.append(continued(lm.decoder, prompts, temperatures, args.length, seeds))
        tokens, seconds = sum(int(c.mask.sum()) for c in done), time.time() - began
        print(f"{first + n}/{args.prompts} prompts  {tokens} tokens  {seconds:.0f} s", flush=True)
    kind = np.uint16 if lm.config.vocab_size <= 2**16 else np.int32
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        args.out,
        tokens=np.concatenate([c.tokens for c in done]).astype(kind),
        mask=np.concatenate([c.mask for c in done]),
    )


def losses(args: argparse.Namespace) -> dict[str, Loss]:
    """The losses by the names of the drafters."""

    def mtp(module: Any, backbone: Any, seen: Seen, key: jax.Array) -> Any:
        return mtp_loss(module, backbone, seen, distill=args.distill, group=args.rows)

    of_blocks = functools.partial(
        dflash_loss,
        distill=args.distill,
        anchors=args.anchors,
        gamma=args.gamma,
        group=args.blocks,
    )
    return {"mtp": mtp, "dflash": of_blocks}


def make_step(
    parts: Sequence[Part],
    losses: dict[str, Loss],
    optimizers: dict[str, optax.GradientTransformation],
    dtype: Any,
) -> Callable[..., tuple[States, dict[str, Any]]]:
    """One compiled step of all drafters on a batch; the backbone runs once.

    Args:
      parts: what is trained.
      losses, optimizers: by their names.
      dtype: in which drafters compute.
    """

    layers = [i for part in parts for i in part.layers]

    @functools.partial(jax.jit, donate_argnames="states")
    def step(
        backbone: Any, states: States, tokens: jax.Array, mask: jax.Array, key: jax.Array
    ) -> tuple[States, dict[str, Any]]:
        seen = observe(backbone, tokens, mask, layers, dtype)
        after, logged = {}, {}
        for part in parts:
            weights, state = states[part.name]

            def loss(weights: Weights, part: Part = part) -> Any:
                return losses[part.name](part.dense(weights, dtype), backbone, seen, key)

            (_, logged[part.name]), grads = jax.value_and_grad(loss, has_aux=True)(weights)
            updates, state = optimizers[part.name].update(grads, state, weights)
            after[part.name] = (optax.apply_updates(weights, updates), state)
        return after, logged

    return step


def train(args: argparse.Namespace) -> None:
    """Trains drafters on continuations and writes a checkpoint that has them."""
    lm = mj.load(args.model, kernels=args.kernels)
    text = read_continuations(args.continuations)
    seq = min(args.seq or text.tokens.shape[1], text.tokens.shape[1])
    parts = []
    if args.what in ("mtp", "both"):
        parts.append(mtp_part(lm, args.mtp_blocks))
    if args.what in ("dflash", "both"):
        parts.append(dflash_part(lm, args.drafter_config))
    key = jax.random.key(args.seed)
    optimizers, states = {}, {}
    for part in parts:
        tx = optimizer(args.optimizer, part.specs, args.lr, args.steps, args.weight_decay)
        weights = jax.jit(part.initial)(key)
        optimizers[part.name], states[part.name] = tx, (weights, jax.jit(tx.init)(weights))
    dtype = jnp.dtype(args.compute or lm.config.dtype)
    step = make_step(parts, losses(args), optimizers, dtype)
    backbone, began = frozen(lm.model), time.time()
    recent, curve = [], []
    batches = text.batches(args.batch, seq, args.steps, args.seed)
    for i, (tokens, mask) in enumerate(batches, 1):
        states, logged = step(backbone, states, tokens, mask, jax.random.fold_in(key, i))
        recent.append(logged)
        if i % args.log_every == 0 or i == args.steps:
            mean = jax.tree.map(lambda *a: np.mean(jax.device_get(a), axis=0), *recent)
            rounded = jax.tree.map(lambda a: np.round(a.astype(float), 4).tolist(), mean)
            curve.append({"step": i, "seconds": round(time.time() - began, 1), **rounded})
            print(json.dumps(curve[-1]), flush=True)
            recent = []
    trained = {part.name: part.stored(states[part.name][0]) for part in parts}
    save(args.out, lm, trained, args.shard_bytes)
    if args.log:
        results = {"benchmark": "train_drafter", **_circumstances(args)}
        write_result(results | {"sequences": len(text.tokens), "curve": curve}, args.log)


def acceptance(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Sequence[int]],
    temperature: float,
    tokens: int,
    batch: int,
) -> dict[str, Any]:
    """Tokens a round when prompts are continued, and how often the n-th proposal is kept.

    A row's last round, which its end may have cut short, does not count.
    """
    params = mj.SamplingParams(temperature=temperature, max_tokens=tokens)
    rounds: list[int] = []
    for first in range(0, len(prompts), batch):
        some = prompts[first : first + batch]
        seeds = range(first, first + len(some))
        blocks = decoder.blocks(some, [params] * len(some), list(seeds))
        lengths = [b.lengths[: len(some)] for b in blocks if b.lengths is not None]
        for row in np.concatenate(lengths, axis=1) if lengths else ():
            rounds += row[row > 0][:-1].tolist()
    each = np.asarray(rounds)
    return {
        "temperature": temperature,
        "rounds": len(each),
        "acceptance_length": round(float(each.mean()), 4) if len(each) else None,
        "accepted_by_position": [
            round(n, 4) for n in by_position(rounds, [1 + decoder.drafter.tokens] * len(rounds))
        ],
    }


def speculating(lm: mj.LanguageModel) -> dict[str, SpeculativeDecoder]:
    """A decoder with each drafter that a checkpoint has, by the drafter's name."""
    decoders = {name: lm.decoder_for(name) for name in lm.drafters}
    return {n: d for n, d in decoders.items() if isinstance(d, SpeculativeDecoder)}


def evaluate(args: argparse.Namespace) -> None:
    """Measures each drafter of a checkpoint on windows evenly spread over a token file."""
    lm = mj.load(args.model, kernels=args.kernels)
    stream = read_stream(args.data, lm, args.prompt_len)
    lengths = np.full(args.prompts, args.prompt_len)
    prompts = windows(stream, lengths, np.linspace(0, 1, args.prompts))
    results: dict[str, Any] = {"benchmark": "acceptance", **_circumstances(args)}
    for name, decoder in speculating(lm).items():
        for temperature in args.temperature:
            found = acceptance(decoder, prompts, temperature, args.tokens, args.batch)
            results.setdefault(name, []).append(found)
            print(json.dumps({"drafter": name, **found}), flush=True)
    if args.out:
        write_result(results, args.out)


def _circumstances(args: argparse.Namespace) -> dict[str, Any]:
    """What a result was made with; the model by its name alone, as it may be a folder."""
    return circumstances(argparse.Namespace(**{**vars(args), "model": Path(args.model).name}))


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Trains drafters for a checkpoint.")
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("generate", help="have the backbone continue prompts")
    p.add_argument("--data", type=Path, required=True, help=".npy of token ids")
    p.add_argument("--out", type=Path, required=True, help=".npz to write")
    p.add_argument("--prompts", type=int, default=8192)
    p.add_argument("--prompt-len", type=int, nargs=2, default=(64, 512), metavar=("MIN", "MAX"))
    p.add_argument("--length", type=int, default=1024, help="of prompt and continuation")
    p.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.7, 1.0])
    p.add_argument("--batch", type=int, default=512)
    p.set_defaults(run=generate, kernels="auto")
    p = commands.add_parser("train", help="train, and save a whole checkpoint")
    p.add_argument("--continuations", type=Path, required=True, help="what generate wrote")
    p.add_argument("--out", type=Path, required=True, help="a new folder")
    p.add_argument("--what", choices=("mtp", "dflash", "both"), default="both")
    p.add_argument("--mtp-blocks", type=int, default=3)
    p.add_argument("--drafter-config", type=Path, help="a dflash/config.json; else derived")
    p.add_argument("--steps", type=int, default=2000)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--seq", type=int, default=0, help="tokens of a sequence; 0: all")
    p.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    p.add_argument("--lr", type=float, default=1.2e-2)
    p.add_argument("--weight-decay", type=float, default=0.1)
    p.add_argument("--distill", type=float, default=0.0, help="part of KL in the loss, 0 to 1")
    p.add_argument("--anchors", type=int, default=128, help="DFlash blocks a sequence")
    p.add_argument("--gamma", type=float, default=7.0, help="decay of the DFlash loss's weights")
    p.add_argument("--blocks", type=int, default=64, help="DFlash blocks held at a time")
    p.add_argument("--rows", type=int, default=512, help="MTP rows held at a time")
    p.add_argument("--compute", choices=("bfloat16", "float32"), help="dtype, else the model's")
    p.add_argument("--log", type=Path, help="a JSON file to write the curve to")
    p.add_argument("--log-every", type=int, default=50)
    p.add_argument("--shard-bytes", type=int, default=SHARD_SIZE)
    # The backbone's whole sequences, of a small model with dense weights, are what plain XLA does.
    p.set_defaults(run=train, kernels="reference")
    p = commands.add_parser("evaluate", help="acceptance on prompts")
    p.add_argument("--data", type=Path, required=True, help=".npy of token ids, not trained on")
    p.add_argument("--prompts", type=int, default=64)
    p.add_argument("--prompt-len", type=int, default=256)
    p.add_argument("--tokens", type=int, default=256, help="to generate after each prompt")
    p.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--out", type=Path, help="a JSON file to write")
    p.set_defaults(run=evaluate, kernels="auto")
    for p in commands.choices.values():
        p.add_argument("--model", default="mimo-tiny")
        p.add_argument("--kernels", help="as for mj.load")
        p.add_argument("--seed", type=int, default=0)
    return parser


def main(arguments_given: Sequence[str] | None = None) -> None:
    """Runs a command."""
    args = arguments().parse_args(arguments_given)
    args.run(args)


if __name__ == "__main__":
    run_program(main)
