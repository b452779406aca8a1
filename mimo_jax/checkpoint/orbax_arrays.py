"""Arrays of parameters in Orbax's format, written and read sharded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from mimo_jax.checkpoint.streaming import PIECE, default_device
from mimo_jax.quant import FP8Array, MXFP4Array

# Billions of bytes of arrays that are on their way between disk and devices, if none is larger.
CONCURRENT_GB = 2

# Arrays, or what has their shapes, by part of a model and by parameter; plain and quantised ones.
ArrayTree = dict[str, dict[str, Any]]


class UnreadableArraysError(ValueError):
    """Arrays that Orbax cannot read; the message is its own."""


def save_arrays(path: Path, arrays: ArrayTree) -> None:
    """Writes arrays into a new folder, in chunks that do not depend much on how they are split."""
    import orbax.checkpoint as ocp

    tree = _as_saved(arrays)
    args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=PIECE), tree)
    largest = max(array.nbytes for array in jax.tree.leaves(tree))
    with _checkpointer(largest) as checkpointer:
        checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(tree, save_args=args))


def _as_saved(arrays: ArrayTree) -> dict[str, dict[str, Any]]:
    """A quantised array as a dictionary; its arrays are the tree's leaves in the same order."""

    def value(held: Any) -> Any:
        if isinstance(held, FP8Array | MXFP4Array):
            return {"codes": held.codes, "scales": held.scales}
        return held

    return {part: {name: value(v) for name, v in own.items()} for part, own in arrays.items()}


def stored_arrays(path: Path) -> ArrayTree:
    """Shapes and types of the arrays in a folder; no weights are read.

    Raises:
      UnreadableArraysError: the folder is damaged.
    """
    with _readable(), _checkpointer(0) as checkpointer:
        tree = checkpointer.metadata(path.absolute()).item_metadata.tree

    def struct(array: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(array.shape), array.dtype)

    def value(stored: Any) -> Any:
        if not isinstance(stored, dict):
            return struct(stored)
        codes, scales = struct(stored["codes"]), struct(stored["scales"])
        return (MXFP4Array if codes.dtype == np.uint8 else FP8Array)(codes, scales)

    return {part: {name: value(s) for name, s in own.items()} for part, own in tree.items()}


def restore_arrays(
    path: Path, values: ArrayTree, shardings: Sequence[Sharding | None]
) -> ArrayTree:
    """The arrays of a tree of shapes, with these shardings, or on jax's default device for None.

    Raises:
      UnreadableArraysError: the folder is damaged.
    """
    import orbax.checkpoint as ocp

    leaves, structure = jax.tree.flatten(values)
    one = SingleDeviceSharding(default_device())
    placed = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or one)
        for leaf, sharding in zip(leaves, shardings, strict=True)
    ]
    wanted = _as_saved(jax.tree.unflatten(structure, placed))
    args = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
    )
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    with _readable(), _checkpointer(largest) as checkpointer:
        restored = checkpointer.restore(path.absolute(), args=args)
    return jax.tree.unflatten(structure, jax.tree.leaves(restored))


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """One kind of exception for all that Orbax and TensorStore raise for damaged files."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        text = (str(error).splitlines() or [repr(error)])[0]
        raise UnreadableArraysError(text) from error


def _checkpointer(largest: int) -> Any:
    """Orbax's checkpointer, with memory for the largest array at least.

    Nothing is compressed: quantised weights hardly become smaller, and it costs most of the time.
    """
    import orbax.checkpoint as ocp  # takes a second, which only those who need it should wait

    limit = max(CONCURRENT_GB, largest // 10**9 + 2)
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(
            use_ocdbt=True,
            use_zarr3=False,
            use_compression=False,
            save_concurrent_gb=limit,
            save_device_host_concurrent_gb=limit,
            restore_concurrent_gb=limit,
        )
    )
