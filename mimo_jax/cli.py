"""The command line: `mimo-jax`, which is also `python -m mimo_jax`.

Nothing heavy is imported here: JAX is, where a command runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

import mimo_jax

if TYPE_CHECKING:
    from mimo_jax.api import Stream
    from mimo_jax.checkpoint import Report
    from mimo_jax.decoding.outputs import GenerationOutput
    from mimo_jax.engine.metrics import CompileClock

USAGE, FAILED, INTERRUPTED = 2, 1, 130
_TRACEBACK_VARIABLE = "MIMO_JAX_TRACEBACK"
# Control characters except tab and line feed, which a terminal would obey, as visible pictures.
_PICTURES = {c: 0x2400 + c for c in range(32) if chr(c) not in "\t\n"} | {127: 0x2421}
_PICTURES |= dict.fromkeys(range(128, 160), 0xFFFD)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
QKV = Annotated[
    Literal["interleaved", "plain", "split"] | None,
    typer.Option(help="Order of fused QKV rows, where detection is to be overruled."),
]


def main() -> None:
    """Runs the command line."""
    app(prog_name="mimo-jax")


def printable(text: str) -> str:
    """Text that is safe to show in a terminal: control characters become visible."""
    return text.translate(_PICTURES)


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Turns expected errors into one message on stderr and an exit code, and Ctrl-C into 130.

    2 says that the command asks for something impossible, 1 that a file or the machine is at fault.
    MIMO_JAX_TRACEBACK=1 shows where an error comes from.
    """
    try:
        yield
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        raise  # the reader of stdout has gone: typer ends quietly
    except (ValueError, OSError) as error:
        from mimo_jax.checkpoint import CheckpointError
        from mimo_jax.config import ConfigError

        if os.environ.get(_TRACEBACK_VARIABLE, "0") not in ("", "0"):
            raise
        theirs = isinstance(error, ValueError | FileNotFoundError)
        damaged = isinstance(error, CheckpointError | ConfigError)
        _fail(f"error: {error}", USAGE if theirs and not damaged else FAILED)


def _fail(message: str, code: int) -> None:
    print(printable(message), file=sys.stderr)
    raise typer.Exit(code) from None


def _print_version(wanted: bool) -> bool:
    if wanted:
        print(f"mimo-jax {mimo_jax.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Xiaomi's MiMo-V2 family of language models in JAX."""


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads it from stdin.")],
    model: Annotated[str, typer.Option(help="Bundled name, folder or hub id.")] = "mimo-tiny",
    chat: Annotated[bool, typer.Option("--chat", help="Send it as a user's message.")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate [256].")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy decoding [1].")] = None,
    top_p: Annotated[float | None, typer.Option(help="Most probable tokens of this mass.")] = None,
    top_k: Annotated[int | None, typer.Option(help="This many most probable tokens.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Least fraction of the best one's.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text to end before; repeatable.")] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(help="Compute type instead of the model's."),
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Expand FP8 and MXFP4 weights when loading.")
    ] = False,
    qkv: QKV = None,
) -> None:
    """Continue a prompt: its text on stdout as it comes, statistics on stderr."""
    with readable_errors():
        fields = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "seed": seed,
            "stop": stop,
        }
        params = mimo_jax.SamplingParams.from_dict(fields)
        text = sys.stdin.read() if prompt == "-" else prompt
        from mimo_jax.engine.metrics import CompileClock

        err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        with CompileClock() as clock, err.status(f"loading {model}") as status:
            lm = mimo_jax.load(model, dtype=dtype, dequantize=dequantize, qkv=qkv)
            status.update("compiling, and reading the prompt")
            loading = clock.seconds()
            started = time.perf_counter()
            stream = lm.stream([{"role": "user", "content": text}] if chat else text, params)
            interrupted = _write(stream, status.stop, "" if chat else text)
        output = stream.output
        _print_statistics(err, output, interrupted, clock, loading, started)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _write(stream: Stream, before_first: Any, prompt: str) -> bool:
    """Writes text to stdout as it comes; returns whether Ctrl-C ended it.

    A terminal shows the prompt too, dimmed; a pipe gets nothing but the completion.
    """
    out = Console(highlight=False, markup=False)
    interrupted, last = False, "\n"
    try:
        for piece in stream:
            before_first()
            if out.is_terminal:
                out.out(printable(prompt), style="dim", end="", highlight=False)
                prompt, piece = "", printable(piece)
            out.file.write(piece)  # rich would drop some characters
            out.file.flush()
            last = piece[-1]
    except KeyboardInterrupt:
        interrupted = True
    before_first()
    if out.is_terminal and last != "\n":
        out.file.write("\n")
    return interrupted


def _print_statistics(
    err: Console,
    output: GenerationOutput,
    interrupted: bool,
    clock: CompileClock,
    loading: float,
    started: float,
) -> None:
    """Prints counts and rates; compiling is told apart and counts in no rate.

    Args:
      err: where to.
      output: what was generated.
      interrupted: whether Ctrl-C ended it.
      clock: seconds of compilation, of which `loading` belong to loading.
      started: when generation began, of `time.perf_counter`.
    """
    m = output.metrics
    if m.generated_tokens:
        first = clock.seconds(until=started + m.ttft_s) - loading
        later = clock.seconds() - loading - first
        prefill, steps = m.ttft_s - first, m.generated_tokens - 1
        line = f"prefill: {m.prompt_tokens} tokens, {m.prompt_tokens / prefill:.1f} tokens/s; "
        err.print(f"{line}first token after {m.ttft_s:.2f} s, {first:.2f} s of it compiling")
        line = f"decode: {m.generated_tokens} tokens"
        decode = m.tpot_s * steps - later
        if steps and decode > 0:
            line += f", {steps / decode:.1f} tokens/s; {later:.2f} s of compiling not counted"
        err.print(line)
    reason = "interrupted" if interrupted else output.finish_reason
    err.print(f"finish reason: {reason}")


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A bundled name or a folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    qkv: QKV = None,
) -> None:
    """Describe a checkpoint without loading it; the exit code is 1 when it has problems."""
    with readable_errors():
        from mimo_jax import checkpoint as checkpoints

        # Not `resolve` for hub ids: that would download the weights.
        is_path = "/" in checkpoint or Path(checkpoint).is_dir()
        folder = Path(checkpoint).expanduser() if is_path else checkpoints.resolve(checkpoint)
        report = checkpoints.inspect(folder, qkv=qkv)
        print(_report_json(report) if as_json else printable(str(report)))
    raise typer.Exit(FAILED if report.problems else 0)


def _report_json(report: Report) -> str:
    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, frozenset) else str(value)

    fields = dataclasses.asdict(report)
    for name in ("config", "drafter"):
        config = getattr(report, name)
        fields[name] = None if config is None else config.to_dict()
    return json.dumps(fields, default=plain, indent=2)
