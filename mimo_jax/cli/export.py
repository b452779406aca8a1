"""`mimo-jax export`: a model as programs and weights that run without its code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mimo_jax.cli import options
from mimo_jax.cli.console import readable_errors


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Bundled name, folder or hub id.")],
    out: Annotated[Path, typer.Argument(help="A new folder.", metavar="FOLDER")],
    platforms: Annotated[
        str, typer.Option(help="What the programs run on, of these.")
    ] = "cpu,cuda,rocm,tpu",
    batch: Annotated[int, typer.Option(help="Rows that are decoded together.")] = 1,
    max_len: Annotated[
        int | None,
        typer.Option(help="Positions of the cache; default: chosen when the programs run."),
    ] = None,
    prompt_len: Annotated[int, typer.Option(help="Tokens of a prompt that are read at once.")] = 64,
    dtype: options.Dtype = None,
    dequantize: options.Dequantize = False,
) -> None:
    """Write programs for several platforms and the weights, to be run without mimo-jax.

    scripts/run_exported.py runs the folder; it needs jax, numpy and safetensors.
    """
    with readable_errors():
        import mimo_jax
        from mimo_jax.engine.durable import check_writable
        from mimo_jax.portability.artifact import check_target, export_model

        names = [name.strip() for name in platforms.split(",") if name.strip()]
        check_target(out, names)
        check_writable(out, folder=True)
        lm = mimo_jax.load(
            model, dtype=dtype, dequantize=dequantize, kernels="reference", progress=True
        )
        with Console(stderr=True).status(f"lowering for {', '.join(names)}"):
            manifest = export_model(
                lm,
                out,
                name=Path(model).resolve().name,
                platforms=names,
                batch=batch,
                max_len=max_len,
                prompt_len=prompt_len,
            )
        sizes = [manifest["weights"], *manifest["programs"].values()]
        for file in sizes:
            print(f"{file['bytes'] / 1e6:8.2f} MB  {file['file']}")
        print(f"{out} is complete, for {', '.join(manifest['platforms'])}")
