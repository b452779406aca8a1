"""Times drafting and verifying at every width, and says from what acceptance on they pay.

    python scripts/bench_speculative.py mimo-tiny --out s.json
    python scripts/bench_speculative.py MiMo-V2.6-Flash-RL --layers 18 --random-weights 0 --out f

A round drafts once and verifies `width` tokens of a row at once; plain decoding takes a step each.
The break-even is how many tokens a round has to produce, on average, to be as fast.  With random
weights no proposal is right, so what a model of this size would do with the acceptance lengths that
were published for DFlash (MODEL_SPEC 4.5) is projected from the times: it is labelled so.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tables
from bench_mesh import generate
from bench_model import DISPATCHES, prompts
from circumstances import circumstances, write_result

import mimo_jax as mj
from mimo_jax.cli.console import run_program
from mimo_jax.decoding.autoregressive import STEPS
from mimo_jax.decoding.speculative import SpeculativeDecoder

# Tokens a round, at most 8, of MiMo-V2.5-Pro.
PUBLISHED = {
    "WebDev": 6.30,
    "Math500": 5.56,
    "HumanEval": 4.54,
    "SWE-Bench": 4.29,
    "MT-Bench": 3.18,
}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs everything; writes the result as it grows, and returns it."""
    result: dict[str, Any] = {"benchmark": "speculative", **circumstances(args)}
    how: dict[str, Any] = {"kernels": args.kernels}
    if args.random_weights is not None:
        how |= {"random_weights": args.random_weights, "layers": args.layers, "drafters": True}
    lm = mj.load(args.model, **how)
    result["layers"] = lm.config.num_hidden_layers
    greedy = mj.SamplingParams(temperature=0.0)
    result["rows"] = []
    for rows in args.batch:
        ids, tokens = prompts(rows, args.prompt), 1 + STEPS * DISPATCHES
        max_len = -(-(args.prompt + tokens) // 32) * 32
        generate(lm, ids, tokens, max_len)
        times = [t for _ in range(3) for t in generate(lm, ids, tokens, max_len)[1:]]
        plain = statistics.median(times) / STEPS
        for name in lm.drafters:
            decoder = lm.decoder_for(name)
            assert isinstance(decoder, SpeculativeDecoder)
            most = decoder.drafter.tokens + 1
            widths = [w for w in args.widths or range(2, most + 1) if w <= most]
            times = decoder.phase_seconds(ids, greedy, max_len, widths)
            for width, (verify, draft) in times.items():
                row = {"drafter": name, "rows": rows, "width": width, "plain_s": plain}
                row |= {"verify_s": verify, "draft_s": draft}
                row["break_even"] = (verify + draft) / plain
                if name == "dflash" and width == most:
                    row["projected_tokens_s"] = {
                        what: rows * n / (verify + draft) for what, n in PUBLISHED.items()
                    }
                result["rows"].append(row)
            write_result(result, args.out)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="a checkpoint; with --random-weights also a preset")
    parser.add_argument("--random-weights", type=int, metavar="SEED", help="make them up")
    parser.add_argument("--layers", type=int, help="with --random-weights, only so many")
    parser.add_argument("--kernels", default="auto", help="auto, reference or a backend")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=928, help="tokens before the steps")
    parser.add_argument(
        "--widths", type=int, nargs="+", help="of rounds; by default all, each compiled by itself"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    result = measure(args)
    print(f"{args.model}, {result['layers']} layers, {result['device']}")
    print(tables.speculation(result))


if __name__ == "__main__":
    run_program(main)
