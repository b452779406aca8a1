r"""Compares the greedy tokens of speculative decoding with those of plain decoding.

    python scripts/bench_agreement.py mimo-tiny --data held_out.npy --dtype bfloat16 --out a.json
    python scripts/bench_agreement.py mimo-tiny --data held_out.npy --dtype float32 --prompts 200 \
        --tokens 128 --rows 1 8 --widths 2 3 4 5 6 7 8 --out b.json

In float32 they are the same.  In bfloat16 a product of several tokens rounds differently from one
of a single token, and where two tokens are about as probable the other one may win; from there on
the texts part.  So each comparison says where rows part, and how far apart the logits of the two
tokens are there.  Plain decoding of another number of rows at a time is compared too: it differs
for the same reason.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from circumstances import circumstances, write_result
from train_drafter import read_stream, windows

import mimo_jax as mj
from mimo_jax.cli.console import run_program
from mimo_jax.decoding.speculative import SpeculativeDecoder


def differences(
    lm: mj.LanguageModel, prompts: Sequence[list[int]], plain: Sequence[list[int]], other: Any
) -> dict[str, Any]:
    """Of rows of tokens: how many are the same, and what is known of where the others part.

    A gap is how much greater the logit of plain decoding's token is than that of the other one, as
    `LanguageModel.logits` of what precedes them has it.
    """
    parted, gaps = [], []
    for prompt, a, b in zip(prompts, plain, other, strict=True):
        if a == b:
            continue
        at = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
        logits = np.asarray(lm.logits([[*prompt, *a[:at]]]))[0, -1]
        parted.append(at)
        gaps.append(float(logits[a[at]] - logits[b[at]]))
    result: dict[str, Any] = {"prompts": len(plain), "same": len(plain) - len(parted)}
    if gaps:
        result["same_tokens_before_median"] = float(np.median(parted))
        result["gap_median"] = round(float(np.median(np.abs(gaps))), 4)
        result["gap_largest"] = round(float(np.abs(gaps).max()), 4)
    return result


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs everything; writes the result as it grows, and returns it."""
    lm = mj.load(args.model, kernels=args.kernels, mesh=args.mesh, dtype=args.dtype)
    if args.data is None:
        rng = np.random.default_rng(0)
        prompts = rng.integers(lm.config.vocab_size // 2, size=(args.prompts, 16)).tolist()
    else:
        stream = read_stream(args.data, lm, args.prompt_len)
        lengths = np.full(args.prompts, args.prompt_len)
        prompts = windows(stream, lengths, np.linspace(0, 1, args.prompts))
    greedy = mj.SamplingParams(temperature=0.0, max_tokens=args.tokens, ignore_eos=True)

    def tokens(rows: int, **decoding: Any) -> list[list[int]]:
        outputs = lm.generate(prompts, greedy, batch_size=rows, **decoding)
        return [output.token_ids for output in outputs]

    result: dict[str, Any] = {"benchmark": "agreement", **circumstances(args), "cases": []}
    plain = tokens(args.rows[-1])
    cases: list[dict[str, Any]] = [{"rows": rows} for rows in args.rows[:-1]]
    for name in lm.drafters:
        decoder = lm.decoder_for(name)
        assert isinstance(decoder, SpeculativeDecoder)
        most = decoder.width
        cases += [
            {"rows": rows, "speculative": name, "draft_width": width}
            for rows in args.rows
            for width in args.widths or [most]
            if width <= most
        ]
    for case in cases:
        result["cases"].append(case | differences(lm, prompts, plain, tokens(**case)))
        print(json.dumps(result["cases"][-1]), flush=True)
        write_result(result, args.out)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="a checkpoint with drafters")
    parser.add_argument("--data", type=Path, help=".npy of token ids; else prompts are random")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--kernels", default="auto", help="auto, reference or a backend")
    parser.add_argument("--mesh", help="devices to split the model over, such as tensor=2")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-len", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128, help="to generate after each prompt")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64], help="decoded together")
    parser.add_argument("--widths", type=int, nargs="+", help="draft widths; else the widest")
    parser.add_argument("--out", type=Path, required=True)
    measure(parser.parse_args(argv))


if __name__ == "__main__":
    run_program(main)
