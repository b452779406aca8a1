"""Writes the tables in README.md, benchmarks/README.md and docs from benchmarks/results.

    python scripts/tables.py            # after `bench.py kernels` or bench_model.py
    python scripts/tables.py --check    # are they as the results say?

A table stands between the lines `<!-- table: NAME FILE ... -->` and `<!-- end of table -->`, where
NAME is one of TABLES and FILE a result.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import portability_tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "docs" / "portability.md",
)
BLOCK = re.compile(r"(<!-- table: (\S+)((?: \S+)*) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
PLAIN = "plain XLA"
FLASH, PRO = "MiMo-V2.6-Flash-RL", "MiMo-V2.5-Pro-FP4-DFlash"
OPERATIONS = (
    *("moe", "quantized_matmul", "attention", "decode_attention"),
    *("rotate_and_store", "routing", "residual_matmul"),
)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its first column to the left and all others to the right."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def duration(seconds: float) -> str:
    """A time in us, or in ms from ten on."""
    us = seconds * 1e6
    return f"{us / 1e3:.1f} ms" if us >= 1e4 else f"{us:.0f} us" if us >= 100 else f"{us:.1f} us"


def by_case(result: dict[str, Any], operation: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Rows of an operation, by case and backend."""
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["operation"] == operation:
            cases.setdefault(row["case"], {})[row["backend"]] = row
    return cases


def kernels(result: dict[str, Any], operation: str) -> str:
    """Every case of an operation: each backend's time, and what the fastest makes of the device."""
    cases = by_case(result, operation)
    checked = {row["backend"] for row in result["rows"] if "error" in row}
    backends = sorted(
        {b for rows in cases.values() for b in rows},
        key=lambda b: (b not in checked, b != PLAIN, b),
    )
    limits = result["ceilings"]
    lines = []
    for case, rows in cases.items():
        ours = [row for row in rows.values() if "error" in row]
        best = min(ours, key=lambda row: row["seconds"])
        bytes_s, flops_s = best["bytes"] / best["seconds"], best["flops"] / best["seconds"]
        lines.append(
            [
                case,
                *(duration(rows[b]["seconds"]) if b in rows else "" for b in backends),
                f"{bytes_s / 1e12:.2f} ({bytes_s / limits['copy_bytes_s']:.0%})",
                f"{flops_s / 1e12:.0f} ({flops_s / limits['matmul_flops_s']:.0%})",
                f"{max(row['error'] for row in ours):.1e}",
            ]
        )
    header = ["case", *backends, "TB/s (of a copy)", "TFLOP/s (of 8192³)", "error"]
    return table(header, lines)


def highlights(result: dict[str, Any]) -> str:
    """The experts of Pro, few and many tokens, beside plain XLA."""
    lines = []
    for case, rows in by_case(result, "moe").items():
        model, tokens = case.split()
        if model != "pro":
            continue
        name, best = min(
            ((b, row) for b, row in rows.items() if b != PLAIN), key=lambda item: item[1]["seconds"]
        )
        plain = rows.get(PLAIN)
        lines.append(
            [
                tokens,
                duration(best["seconds"]),
                name,
                f"{best['bytes'] / best['seconds'] / result['ceilings']['copy_bytes_s']:.0%}",
                f"{best['flops'] / best['seconds'] / 1e12:.0f}",
                f"{plain['seconds'] / best['seconds']:.0f}" if plain else "",
            ]
        )
    header = ["tokens", "time", "kernels", "of a copy's bytes/s", "TFLOP/s"]
    return table([*header, "times as fast as plain XLA"], lines)


def steps(*results: dict[str, Any]) -> str:
    """Whole steps and prompts of `bench_model.py`, by layer, beside roofline and transformers."""
    lines = []
    for result in results:
        beside = result.get("transformers")
        others = (beside, *beside.get("fewer", ())) if beside else ()
        for i, row in enumerate(result["steps"]):
            step = "step_ms" in row
            kind = "step_ms" if step else "prefill_ms"
            limit = row.get("roofline_ms" if step else "prefill_roofline_ms")
            runs = (result, *result.get("fewer", ()))
            ours = [(run["layers"], run["steps"][i][kind]) for run in runs]
            theirs = [
                (run["layers"], run[kind][str(row["rows"])] if step else run[kind])
                for run in others
            ]
            lines.append(
                [
                    f"step, rows: {row['rows']}" if step else f"prompt of {row['prompt']}",
                    str(result["layers"]),
                    f"{row[kind]:.2f}",
                    f"{limit / row[kind]:.0%}" if limit else "",
                    *_beside(_shared(ours), _shared(theirs)),
                    *_beside(_added(ours), _added(theirs)),
                ]
            )
    header = ["", "layers", "ms", "of the roofline", "ms a layer", "transformers", "times"]
    return table([*header, "ms a layer adds", "transformers", "times"], lines)


def _beside(ours: float | None, theirs: float | None) -> tuple[str, str, str]:
    """Two times of a layer, and how many times longer the second is."""
    return (
        f"{ours:.3f}" if ours else "",
        f"{theirs:.2f}" if theirs else "",
        f"{theirs / ours:.1f}" if ours and theirs else "",
    )


def _shared(times: list[tuple[int, float]]) -> float | None:
    """Of layers and milliseconds, the first, divided."""
    return times[0][1] / times[0][0] if times else None


def _added(times: list[tuple[int, float]]) -> float | None:
    """What a layer adds, from the first two numbers of layers."""
    if len(times) < 2:
        return None
    (more, longer), (fewer, shorter) = times[:2]
    return (longer - shorter) / (more - fewer)


def speculation(*results: dict[str, Any]) -> str:
    """Rounds of `bench_speculative.py`: times, break-even, and what is projected from them."""
    lines = []
    for row in (row for result in results for row in result["rows"]):
        projected = row.get("projected_tokens_s", {})
        lines.append(
            [
                f"{row['drafter']}, rows: {row['rows']}",
                str(row["width"]),
                *(f"{row[key] * 1e3:.2f}" for key in ("plain_s", "draft_s", "verify_s")),
                f"{row['break_even']:.2f}",
                ", ".join(f"{what} {n:.0f}" for what, n in projected.items()),
            ]
        )
    header = [
        "",
        "width",
        "plain step, ms",
        "draft, ms",
        "verify, ms",
        "break-even, tokens a round",
    ]
    return table([*header, "projected tokens/s at published acceptance"], lines)


def engine(*results: dict[str, Any]) -> str:
    """Runs of `bench_engine.py`: output tokens a second, and where the engine's time goes."""
    lines = []
    for result in results:
        beside = result.get("transformers")
        for row in result["rows"]:
            tokens, shares = result["output_tokens"], row.get("shares", {})
            reading = sum(share for name, share in shares.items() if name.startswith("read"))
            rate = tokens / row["seconds"]
            others = [tokens / row["static_s"], tokens / row["static_whole_s"]]
            if beside is not None and beside["batch"] == row["batch"]:
                others.append(beside["output_tokens"] / beside["seconds"])
            compared = [f"{other:.0f} ({rate / other:.1f}x)" for other in others]
            lines.append(
                [
                    f"{result['layers']} layers, {row['batch']}",
                    f"{rate:.0f}",
                    *compared,
                    *[""] * (3 - len(compared)),
                    f"{shares.get('decode', 0):.0%}",
                    f"{reading + shares.get('insert', 0):.0%}",
                    f"{shares.get('host', 0):.0%}",
                    f"{row['repeated_same']} of {row['repeated']}",
                ]
            )
    header = ["layers, completions together", "engine, tokens/s", "static batches"]
    header += [
        "static, all rows to the end",
        "transformers",
        "steps",
        "reading prompts",
        "host",
        "the same with other neighbours",
    ]
    return table(header, lines)


def serving(*results: dict[str, Any]) -> str:
    """Runs of `mimo-jax bench`: throughput and latency by concurrency."""
    lines = []
    for row in (row for result in results for row in result["rows"]):
        cells = [str(row["concurrency"]), str(row["requests"])]
        cells += [f"{row[key]:.0f}" for key in ("output_tokens_s", "total_tokens_s")]
        for name, scale, digits in (("ttft_s", 1, 2), ("tpot_s", 1e3, 1), ("e2e_s", 1, 2)):
            found = [row[name][p] for p in ("p50", "p90", "p99")]
            cells.append(" / ".join("" if x is None else f"{x * scale:.{digits}f}" for x in found))
        lines.append([*cells, f"{row['peak_bytes'] / 2**30:.1f}"])
    header = ["at once", "requests", "output tokens/s", "tokens/s in all", "first token, s"]
    header += ["a token, ms", "request, s", "peak memory, GiB"]
    return table(header, lines)


def sums(result: dict[str, Any]) -> str:
    """Sums over devices: the kernel beside XLA's all-reduce with an addition."""
    rows = []
    for row in result["rows"]:
        ours, xla = (row["seconds"][name] for name in ("mosaic_gpu", "reference"))
        errors = (f"{row['errors'][name]:.1e}" for name in ("mosaic_gpu", "reference"))
        times = duration(ours), duration(xla), duration(row["seconds"]["conversion"])
        rows.append([str(row["tokens"]), *times, *errors])
    header = ("tokens", "mosaic_gpu", PLAIN, "conversion alone", "error", f"error, {PLAIN}")
    return table(header, rows)


TABLES: dict[str, Callable[..., str]] = {
    **{name: functools.partial(kernels, operation=name) for name in OPERATIONS},
    "all_reduce": sums,
    "highlights": highlights,
    "steps": steps,
    "speculation": speculation,
    "engine": engine,
    "serving": serving,
    "support": lambda result: table(*portability_tables.support(result)),
    "flash_steps": lambda result: table(*portability_tables.steps(result, FLASH)),
    "pro_steps": lambda result: table(*portability_tables.steps(result, PRO)),
    "h100_h200": lambda result: table(*portability_tables.hardware(result, "h100", "h200")),
}


def written(text: str) -> str:
    """A document with its tables anew."""

    def block(found: re.Match[str]) -> str:
        begin, name, files, _, end = found.groups()
        results = [json.loads((RESULTS / file).read_text()) for file in files.split()]
        return begin + TABLES[name](*results) + end

    return BLOCK.sub(block, text)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if one is old")
    args = parser.parse_args()
    for document in DOCUMENTS:
        text = document.read_text()
        new = written(text)
        if args.check and new != text:
            sys.exit(f"{document.relative_to(ROOT)} is not as the results say: run {__file__}")
        document.write_text(new)


if __name__ == "__main__":
    main()
