"""What `mimo-jax bench` shows of its results: a table, and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mimo_jax.cli.console import printable

# Columns of text that the table needs.
WIDTH = 110
FORMATS = (".png", ".svg")
# Latencies of the plot: field, name, and colour (of a palette that the colour-blind can tell).
_LATENCIES = (
    ("ttft_s", "TTFT", "#0072B2"),
    ("tpot_s", "TPOT", "#D55E00"),
    ("e2e_s", "end to end", "#009E73"),
)


def check_plot(path: Path) -> None:
    """Refuses a plot that can't be made, before anything is measured.

    Raises:
      ValueError: its name ends otherwise than a format's, or matplotlib isn't installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"--plot {path}: expected a name that ends in {' or '.join(FORMATS)}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--plot needs matplotlib ({error}): pip install 'mimo-jax[bench]', or leave it out"
        ) from None


def print_table(result: dict[str, Any]) -> None:
    """Prints the rows of a result on stdout; the file has p90 too."""
    speculative = result["arguments"]["speculative"] is not None
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title=printable(title(result)))
    for heading in (
        "at\nonce",
        "output\ntokens/s",
        "total\ntokens/s",
        "requests\n/s",
        *("TTFT\np50 s", "\np99 s", "TPOT\np50 ms", "\np99 ms", "e2e\np50 s", "\np99 s"),
        *(["tokens\n/round"] if speculative else []),
        "peak\nGiB",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result["rows"]:
        table.add_row(
            str(row["concurrency"]),
            _number(row["output_tokens_s"], 1, 1),
            _number(row["total_tokens_s"], 1, 1),
            _number(row["requests_s"], 1, 2),
            *(
                _number(row[field][p], scale, digits)
                for field, scale, digits in (("ttft_s", 1, 2), ("tpot_s", 1000, 1), ("e2e_s", 1, 2))
                for p in ("p50", "p99")
            ),
            *([_number(row["tokens_per_round"], 1, 2)] if speculative else []),
            _number(row["peak_bytes"], 2**-30, 2),
        )
    console = Console(highlight=False, markup=False)
    console.width = max(console.width, WIDTH)  # numbers that are cut short are of no use
    console.print(table)


def title(result: dict[str, Any]) -> str:
    """Model, device and workload in two lines."""
    workload, how = result["workload"], result["arguments"]
    devices = f"{result['devices']} x {result['device']}"
    model = f"{result['model']}, {result['layers']} layers"
    if how["speculative"] is not None:
        model += f", {how['speculative']}"
    rate = workload["requests_per_s"]
    arrival = "all at once" if rate is None else f"Poisson, {rate:g} requests/s"
    lengths = f"prompts {workload['prompt_tokens']}, outputs {workload['output_tokens']} tokens"
    return f"{model}, on {devices}\n{lengths}; {arrival}"


def write_plot(result: dict[str, Any], path: Path) -> None:
    """Draws throughput and latency by concurrency; the format is the name's.

    Raises:
      ImportError: matplotlib isn't installed (`check_plot` says it in time).
      OSError: the file can't be written; what was there is as it was.
    """
    from matplotlib.figure import Figure

    from mimo_jax.engine.durable import replacing

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(title(result).replace("$", r"\$"), fontsize=10)
    left, right = figure.subplots(1, 2)
    _draw_throughput(left, result["rows"])
    _draw_latency(right, result["rows"])
    for axes in (left, right):
        _name_concurrency(axes, result["rows"])
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix.lower().lstrip("."), dpi=150)


def _draw_throughput(axes: Any, rows: list[dict[str, Any]]) -> None:
    values = [row["output_tokens_s"] for row in rows]
    axes.plot([row["concurrency"] for row in rows], values, "o-", color="#0072B2")
    axes.set_ylim(0, 1.1 * max(values))
    axes.set_ylabel("output tokens/s")
    axes.set_title("throughput", fontsize=10)


def _draw_latency(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Each latency's median as a line, and what lies between it and p99 as a band."""
    for field, name, color in _LATENCIES:
        known = [row for row in rows if row[field]["p50"] is not None]
        if not known:
            continue
        at = [row["concurrency"] for row in known]
        p50, p90, p99 = ([row[field][p] for row in known] for p in ("p50", "p90", "p99"))
        axes.plot(at, p50, "o-", color=color, label=f"{name} p50")
        axes.plot(at, p90, "--", color=color, linewidth=1, label="p90")
        axes.plot(at, p99, ":", color=color, linewidth=1, label="p99")
        axes.fill_between(at, p50, p99, color=color, alpha=0.12, linewidth=0)
    axes.set_yscale("log")
    axes.set_ylabel("seconds")
    axes.set_title("latency", fontsize=10)
    axes.legend(fontsize=8, ncols=len(_LATENCIES), loc="best")


def _name_concurrency(axes: Any, rows: list[dict[str, Any]]) -> None:
    at = [row["concurrency"] for row in rows]
    axes.set_xscale("log", base=2)
    axes.set_xticks(at, [str(n) for n in at])
    axes.minorticks_off()
    axes.set_xlabel("concurrency (requests decoded together)")
    axes.grid(alpha=0.3)


def _number(value: float | int | None, scale: float | int, digits: int) -> str:
    return "-" if value is None else f"{value * scale:.{digits}f}"
