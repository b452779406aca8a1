"""`mimo-jax inspect`: what a checkpoint holds, without its weights."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mimo_jax.cli import options
from mimo_jax.cli.console import FAILED, printable, readable_errors

if TYPE_CHECKING:
    from mimo_jax.checkpoint import Report


def inspect(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A bundled name or a folder.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    qkv: options.QKV = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="List the kernels its operations use, and why.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            help="With --kernels, on such a device (h100, a100, v5e, ...); default: this one."
        ),
    ] = None,
) -> None:
    """Describe a checkpoint without loading it; the exit code is 1 when it has problems.

    With --kernels, CHECKPOINT may also be the name of a configuration.
    """
    with readable_errors():
        if device is not None and not kernels:
            raise ValueError(f"--device {device} is of --kernels; give that too")
        if qkv is not None and kernels:
            raise ValueError(f"--qkv {qkv} is of a checkpoint's weights; leave out --kernels")
        if kernels:
            _print_kernels(checkpoint, device, as_json)
            return
        from mimo_jax import checkpoint as checkpoints

        # Not `resolve` for hub ids: that would download the weights.
        is_path = "/" in checkpoint
        folder = (
            Path(os.path.expanduser(checkpoint)) if is_path else checkpoints.resolve(checkpoint)
        )
        report = checkpoints.inspect(folder, qkv=qkv)
        print(_report_json(report) if as_json else printable(str(report)))
    raise typer.Exit(FAILED if report.problems else 0)


def _print_kernels(name: str, device: str | None, as_json: bool) -> None:
    from mimo_jax.checkpoint import bundled
    from mimo_jax.config import MiMoConfig
    from mimo_jax.planning.kernels import TARGETS, kernel_choices, show
    from pallas_kernels.backends import Target
    from sharding.mesh import all_devices

    if device is not None and device not in TARGETS:
        raise ValueError(f"there is no device {device!r}; choose one of {', '.join(TARGETS)}")
    target = Target.of(all_devices()[0]) if device is None else TARGETS[device]
    choices = kernel_choices(MiMoConfig.from_pretrained(bundled().get(name, name)), target)
    if as_json:
        print(json.dumps([dataclasses.asdict(choice) for choice in choices], indent=2))
    else:
        print(show(choices, target))


def _report_json(report: Report) -> str:
    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, frozenset) else str(value)

    fields = dataclasses.asdict(report)
    for name in ("config", "drafter"):
        config = getattr(report, name)
        fields[name] = None if config is None else config.to_dict()
    return json.dumps(fields, default=plain, indent=2)
