"""What is in the kernels of a program that was lowered for a GPU or a TPU, to read and to count.

A lowered program carries each kernel as MLIR bytecode, in a place and a dialect of its backend's.
jax has no public way to open them.
"""

from __future__ import annotations

import base64
import collections
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from jax._src.interpreters import mlir
from jax._src.lib import (
    mosaic_gpu_dialect,  # pyright: ignore[reportPrivateImportUsage]
    tpu,  # pyright: ignore[reportPrivateImportUsage]
)
from jaxlib.mlir import ir

_BACKENDS = {
    "__gpu$xla.gpu.triton": "triton",
    "mosaic_gpu_v2": "mosaic_gpu",
    "tpu_custom_call": "mosaic_tpu",
}


@dataclasses.dataclass(frozen=True)
class LoweredKernel:
    """One kernel of a lowered program.

    Attributes:
      backend: "triton", "mosaic_gpu" or "mosaic_tpu".
      nbytes: of its bytecode.
      text: its MLIR.
      operations: how many of each operation it has, loop bodies once.
    """

    backend: str
    nbytes: int
    text: str
    operations: collections.Counter[str]


def kernels(lowered: Any) -> list[LoweredKernel]:
    """The kernels of what `pallas_kernels.targets.lower` returned, in the program's order."""
    found = []
    for operation in _inner(lowered.compiler_ir().operation):
        if operation.name != "stablehlo.custom_call":
            continue
        backend = _BACKENDS.get(operation.attributes["call_target_name"].value)
        if backend is not None:
            found.append(_read(backend, _bytecode(operation)))
    return found


def _bytecode(call: Any) -> bytes:
    if "mhlo.backend_config" in call.attributes:
        config = call.attributes["mhlo.backend_config"]
        return config["ir" if "ir" in config else "module"].value_bytes
    config = json.loads(call.attributes["backend_config"].value)
    return base64.b64decode(config["custom_call_config"]["body"])


def _read(backend: str, bytecode: bytes) -> LoweredKernel:
    context = mlir.make_ir_context()
    context.allow_unregistered_dialects = True
    for dialect in (tpu, mosaic_gpu_dialect):
        dialect.register_dialect(context)
    context.load_all_available_dialects()
    with context, ir.Location.unknown():
        module = ir.Module.parse(bytecode)
        names = (_without_version(operation.name) for operation in _inner(module.operation))
        return LoweredKernel(backend, len(bytecode), str(module), collections.Counter(names))


def _without_version(name: str) -> str:
    """The operation's own name: dialects that are kept stable are wrapped in another."""
    for wrapper in ("stable_mosaic_gpu.", "stable_mosaic."):
        name = name.removeprefix(wrapper)
    return name


def _inner(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner
                yield from _inner(inner)
