"""`mimo-jax generate`: a completion on stdout as it comes, statistics on stderr."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import mimo_jax
from mimo_jax.cli import options
from mimo_jax.cli.compare import compare, describe
from mimo_jax.cli.console import INTERRUPTED, printable, readable_errors
from sharding import distributed as jobs

if TYPE_CHECKING:
    from mimo_jax.decoding.outputs import GenerationOutput
    from mimo_jax.engine.metrics import CompileClock
    from mimo_jax.language_model import Stream


def generate(
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads it from stdin.")],
    model: options.Model = "mimo-tiny",
    chat: Annotated[bool, typer.Option("--chat", help="Send it as a user's message.")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate [256].")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy decoding [1].")] = None,
    top_p: Annotated[float | None, typer.Option(help="Most probable tokens of this mass.")] = None,
    top_k: Annotated[int | None, typer.Option(help="This many most probable tokens.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Least fraction of the best one's.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text to end before; repeatable.")] = None,
    dtype: options.Dtype = None,
    dequantize: options.Dequantize = False,
    qkv: options.QKV = None,
    mesh: options.Mesh = None,
    rules: options.Rules = "latency",
    random_weights: options.RandomWeights = None,
    layers: options.Layers = None,
    kernels: options.Kernels = "auto",
    speculative: options.Speculative = None,
    draft_width: options.DraftWidth = None,
    compare_speculative: Annotated[
        bool,
        typer.Option(
            "--compare-speculative",
            help="Without and with each drafter there is, side by side, instead of the text.",
        ),
    ] = False,
    distributed: options.Distributed = False,
) -> None:
    """Continue a prompt: its text on stdout as it comes, statistics on stderr.

    A model without a tokenizer reads the prompt's bytes as tokens, and token ids are printed.
    """
    with readable_errors():
        if distributed:
            jobs.initialize()
        quiet = not jobs.is_leader()
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
        width = options.draft_width(draft_width, speculative is not None or compare_speculative)
        options.layers_of(layers, random_weights)
        text = _from_stdin() if prompt == "-" else prompt
        jobs.require_agreement("the command", repr((model, params, text)))
        from mimo_jax.engine.metrics import CompileClock

        err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True, quiet=quiet)
        with CompileClock() as clock:
            lm = mimo_jax.load(
                model,
                progress=not quiet,
                dtype=dtype,
                dequantize=dequantize,
                qkv=qkv,
                mesh=mesh,
                rules=rules,
                random_weights=random_weights,
                layers=layers,
                drafters=random_weights is not None
                and (speculative is not None or compare_speculative),
                kernels=kernels,
            )
            loading = clock.seconds()
            started = time.perf_counter()
            messages = [{"role": "user", "content": text}] if chat else text
            as_bytes = lm.tokenizer is None
            if as_bytes and chat:
                raise ValueError(f"{model} has no tokenizer, which --chat needs; leave it out")
            given = list(text.encode()) if as_bytes else messages
            if compare_speculative:
                compare(lm, lm.encode(given), params, width, err, quiet)
                return
            how: Any = {"speculative": speculative, "draft_width": width}
            stream = lm.stream(given, params, **how)
            with err.status("compiling, and reading the prompt") as status:
                out = Console(highlight=False, markup=False, quiet=quiet)
                interrupted = _write(stream, out, status.stop, "" if chat else text)
        ended, output = time.perf_counter(), stream.output
        if as_bytes and not quiet:
            print(*output.token_ids)
        _print_statistics(err, output, interrupted, clock, loading, (started, ended))
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _from_stdin() -> str:
    if sys.stdin is None:
        raise OSError("there is no stdin to read the prompt from; give it one, or --prompt TEXT")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte {error.start + 1} of the prompt on stdin is {error.object[error.start]:#04x}, "
            f"which is not {error.encoding} ({error.reason}); give text in that encoding"
        ) from None


def _write(stream: Stream, out: Console, before_first: Any, prompt: str) -> bool:
    """Writes text to stdout as it comes; returns whether Ctrl-C ended it.

    A terminal shows the prompt too, dimmed; a pipe gets nothing but the completion.
    """
    interrupted, last = False, "\n"
    try:
        for piece in stream:
            before_first()
            if out.is_terminal:
                out.out(printable(prompt), style="dim", end="", highlight=False)
                prompt, piece = "", printable(piece)
            if not out.quiet:
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
    span: tuple[float, float],
) -> None:
    """Prints counts and rates; compiling is told apart and counts in no rate.

    Args:
      err: where to.
      output: what was generated.
      interrupted: whether Ctrl-C ended it.
      clock: seconds of compilation, of which `loading` belong to loading.
      span: when generation began and ended, of `time.perf_counter`.
    """
    m, (started, ended) = output.metrics, span
    if m.generated_tokens:
        first = clock.seconds(until=started + m.ttft_s) - loading
        later = clock.seconds() - loading - first
        prefill, steps = m.ttft_s - first, m.generated_tokens - 1
        line = f"prefill: {m.prompt_tokens} tokens, {m.prompt_tokens / prefill:.1f} tokens/s; "
        err.print(f"{line}first token after {m.ttft_s:.2f} s, {first:.2f} s of it compiling")
        line = f"decode: {m.generated_tokens} tokens"
        decode = ended - started - m.ttft_s - later
        if steps and decode > 0:
            line += f", {steps / decode:.1f} tokens/s; {later:.2f} s of compiling not counted"
        err.print(line)
    if m.acceptance_lengths:
        err.print(f"speculation: {describe(m)}")
    reason = "interrupted" if interrupted else output.finish_reason
    err.print(f"finish reason: {reason}")
