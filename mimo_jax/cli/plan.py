"""`mimo-jax plan`: whether a model fits on a mesh, and how fast it could be there."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from mimo_jax.cli import options
from mimo_jax.cli.console import FAILED, printable, readable_errors


def plan(
    device: Annotated[
        str, typer.Option(help="h100, h200, b200, a100, v4, v5e, v5p, v6e, tpu7x or cpu.")
    ],
    model: Annotated[
        str, typer.Option(help="A configuration's name, or a checkpoint's folder.")
    ] = "mimo-tiny",
    mesh: options.Mesh = None,
    rules: options.Rules = "latency",
    batch: Annotated[int, typer.Option(help="Sequences decoded together.")] = 1,
    context: Annotated[int, typer.Option(help="Positions of each sequence.")] = 4096,
    prompt: Annotated[int, typer.Option(help="Prompt tokens that run at once.")] = 512,
    dtype: options.Dtype = None,
    dequantize: options.Dequantize = False,
    layers: options.Layers = None,
    mtp_blocks: Annotated[int, typer.Option(min=0, help="MTP blocks held besides.")] = 0,
    drafter: Annotated[
        bool, typer.Option("--drafter", help="With the model's DFlash drafter.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say how each group of arrays is split.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what a model needs on a mesh of devices that need not be there.

    The exit code is 1 when it does not fit.
    """
    with readable_errors():
        from mimo_jax.checkpoint import bundled
        from mimo_jax.config import DFlashConfig, MiMoConfig
        from mimo_jax.planning import make_plan

        place = bundled().get(model, model)
        made = make_plan(
            MiMoConfig.from_pretrained(place),
            device=device,
            mesh=mesh or "",
            rules=rules,
            batch=batch,
            context=context,
            prompt=prompt,
            dtype=dtype,
            quantized=not dequantize,
            layers=layers,
            mtp_blocks=mtp_blocks,
            drafter=DFlashConfig.from_pretrained(place) if drafter else None,
            name=model,
        )
        if as_json:
            print(json.dumps(made.to_dict(), indent=2))
        else:
            print(printable(str(made)))
            if explain:
                print(made.explain())
    raise typer.Exit(0 if made.fits else FAILED)
