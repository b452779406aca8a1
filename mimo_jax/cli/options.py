"""Options that several commands have, with the same meaning in each."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

Model = Annotated[str, typer.Option(help="Bundled name, folder or hub id.")]
Dtype = Annotated[
    Literal["bfloat16", "float32"] | None,
    typer.Option(help="Compute type instead of the model's."),
]
Dequantize = Annotated[
    bool, typer.Option("--dequantize", help="Expand FP8 and MXFP4 weights when loading.")
]
QKV = Annotated[
    Literal["interleaved", "plain", "split"] | None,
    typer.Option(help="Order of fused QKV rows, where detection is to be overruled."),
]
Mesh = Annotated[
    str | None,
    typer.Option(help="Devices to split it over, such as expert=2,tensor=4; default: one."),
]
Rules = Annotated[
    str,
    typer.Option(
        help="How to split it: latency, latency_experts, throughput, wide_experts or single."
    ),
]
Kernels = Annotated[
    str,
    typer.Option(help="Kernels: auto, triton, mosaic_gpu, mosaic_tpu, or reference (plain XLA)."),
]
Layers = Annotated[int | None, typer.Option(help="Only so many of its first layers.")]
RandomWeights = Annotated[
    int | None,
    typer.Option(
        metavar="SEED",
        help="Make weights up on the devices; MODEL may be a configuration's name.",
    ),
]
Speculative = Annotated[
    Literal["mtp", "dflash"] | None,
    typer.Option(help="What proposes tokens to verify, several at once; default: nothing."),
]
DraftWidth = Annotated[
    str | None,
    typer.Option(help="Tokens to verify at once: a number, or adaptive; default: all there are."),
]
Distributed = Annotated[
    bool,
    typer.Option(
        "--distributed",
        help="Be one process of a job that Slurm, Open MPI, Kubernetes or a TPU pod started.",
    ),
]


def draft_width(text: str | None, speculative: bool) -> Any:
    """A draft width from the command line.

    Args:
      text: what was given.
      speculative: whether something proposes tokens.

    Raises:
      ValueError: it is neither a number nor "adaptive", or nothing proposes tokens.
    """
    if text is None:
        return text
    if not speculative:
        raise ValueError(f"--draft-width {text} is of speculative decoding; give --speculative too")
    if text == "adaptive":
        return text
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"--draft-width {text}: expected a number or adaptive")
    return int(text)


def layers_of(layers: int | None, random_weights: int | None) -> None:
    """Refuses to cut a checkpoint.

    Raises:
      ValueError: only so many layers were asked for of weights that are read.
    """
    if layers is not None and random_weights is None:
        raise ValueError(
            f"--layers {layers} is of models with made-up weights; give --random-weights too"
        )
