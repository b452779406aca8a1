"""`mimo-jax convert`: a checkpoint in the form in which a model is held, for faster loading."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mimo_jax.cli import options
from mimo_jax.cli.console import printable, readable_errors


def convert(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Bundled name, folder or hub id.")
    ],
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")],
    mesh: options.Mesh = None,
    rules: options.Rules = "latency",
    dtype: options.Dtype = None,
    dequantize: options.Dequantize = False,
    qkv: options.QKV = None,
) -> None:
    """Write the ready-to-run parameters as a sharded Orbax checkpoint.

    It loads like any other checkpoint, onto any mesh.  The folder appears when it is complete.
    """
    with readable_errors():
        from mimo_jax import checkpoint as checkpoints
        from mimo_jax.checkpoint.converted import check_target
        from mimo_jax.checkpoint.progress import progress_bar
        from mimo_jax.engine.durable import check_writable
        from sharding.mesh import all_devices, make_mesh

        check_target(out)
        check_writable(out, folder=True)
        all_devices()  # or it says why there are none
        with progress_bar(f"loading {checkpoint}") as progress:
            loaded = checkpoints.load(
                checkpoints.resolve(checkpoint),
                dtype=dtype,
                dequantize=dequantize,
                qkv=qkv,
                mesh=None if mesh is None else make_mesh(mesh),
                rules=rules,
                progress=progress,
            )
        with Console(stderr=True).status(f"writing {printable(str(out))}"):
            checkpoints.convert(loaded, out)
        print(f"{out} is complete; load it by that name")
