"""Reading and writing `mask_embedding.pt` without torch and without executing its pickle.

A torch file is a zip archive: `<name>/data.pkl` describes objects, `<name>/data/<key>` has the
bytes of tensors.  The description is pickle, a language that can call anything.  This interpreter
knows the few instructions that dictionaries of numbers and tensors need, "calls" only a fixed list
of names, which it implements itself, and refuses everything else.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

MAX_PICKLE = 1 << 20
MAX_STORAGE = 1 << 30

STORAGES = {
    ("torch", "BFloat16Storage"): np.dtype(ml_dtypes.bfloat16),
    ("torch", "HalfStorage"): np.dtype(np.float16),
    ("torch", "FloatStorage"): np.dtype(np.float32),
}


class TorchFileError(ValueError):
    """A torch file that is broken, or holds more than dictionaries of numbers and tensors."""


def read_torch(path: Path) -> Any:
    """The object in a file written by `torch.save`, tensors as numpy arrays.

    Raises:
      TorchFileError: the file is damaged or needs a name or instruction that is not allowed;
        nothing in it has been executed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_archive(archive)
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise TorchFileError(f"not a torch zip file: {error}") from error


def _read_archive(archive: zipfile.ZipFile) -> Any:
    pickles = [n for n in archive.namelist() if n.count("/") == 1 and n.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise TorchFileError(f"found {len(pickles)} data.pkl, expected one")
    folder = pickles[0].removesuffix("data.pkl")

    def member(name: str, limit: int) -> bytes:
        try:
            info = archive.getinfo(folder + name)
        except KeyError as error:
            raise TorchFileError(f"{folder}{name} is missing") from error
        if info.file_size > limit or info.compress_type != zipfile.ZIP_STORED:
            raise TorchFileError(f"{folder}{name} is compressed or larger than {limit} bytes")
        return archive.read(info)

    if f"{folder}byteorder" in archive.namelist() and member("byteorder", 16) != b"little":
        raise TorchFileError("byteorder is not little")

    def storage(identity: Any) -> np.ndarray:
        if not (isinstance(identity, tuple) and len(identity) == 5 and identity[0] == "storage"):
            raise TorchFileError(f"persistent object {identity!r} is not a storage")
        _, kind, key, _, count = identity
        dtype = STORAGES.get(kind) if isinstance(kind, _Global) else None
        if dtype is None or not (isinstance(key, str) and key.isdigit() and type(count) is int):
            raise TorchFileError(f"storage {identity!r} is not supported")
        raw = member(f"data/{key}", MAX_STORAGE)
        if len(raw) != count * dtype.itemsize:
            raise TorchFileError(f"storage {key} has {len(raw)} bytes for {count} of {dtype}")
        return np.frombuffer(raw, dtype)

    try:
        return _interpret(member("data.pkl", MAX_PICKLE), storage)
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise TorchFileError(f"data.pkl is malformed: {error!r}") from error
    except ValueError as error:
        raise TorchFileError(str(error)) from error


class _Global(tuple[str, str]):
    """A (module, name) that the pickle mentions; only ever compared, never looked up."""


class _Mark:
    """Where the items of a tuple or dictionary begin on the stack."""


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> np.ndarray:
    """torch._utils._rebuild_tensor_v2 for contiguous tensors."""
    sizes = (offset, *size, *stride)
    if (
        not isinstance(storage, np.ndarray)
        or not all(type(x) is int and x >= 0 for x in sizes)
        or len(size) != len(stride)
    ):
        raise TorchFileError(f"tensor of size {size!r} and stride {stride!r} is malformed")
    contiguous = tuple(math.prod(size[i + 1 :]) for i in range(len(size)))
    if stride != contiguous or offset + math.prod(size) > storage.size:
        raise TorchFileError(f"tensor of size {size} and stride {stride} is not contiguous")
    return storage[offset : offset + math.prod(size)].reshape(size)


CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("collections", "OrderedDict"): lambda: {},
}


def _interpret(code: bytes, storage: Callable[[Any], np.ndarray]) -> Any:
    """Runs the allowed part of the pickle language."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}

    def pop_to_mark() -> list[Any]:
        items: list[Any] = []
        while not isinstance(item := stack.pop(), _Mark):
            items.append(item)
        return items[::-1]

    for opcode, argument, _ in pickletools.genops(io.BytesIO(code)):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "MARK":
                stack.append(_Mark())
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(opcode.name[-1])
                stack[-n:] = [tuple(stack[-n:])]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_allowed(*str(argument).split(" ", 1)))
            case "STACK_GLOBAL":
                name = stack.pop()
                stack.append(_allowed(stack.pop(), name))
            case "BINPERSID":
                stack.append(storage(stack.pop()))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(CALLS[stack.pop()](*arguments))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][key] = value
            case "SETITEMS":
                items = pop_to_mark()
                stack[-1].update(zip(items[0::2], items[1::2], strict=True))
            case name:
                raise TorchFileError(f"pickle instruction {name} is not allowed")
    raise TorchFileError("data.pkl ends without STOP")


def _allowed(module: Any, name: Any) -> _Global:
    found = _Global((str(module), str(name)))
    if found not in CALLS and found not in STORAGES:
        raise TorchFileError(f"pickle names {module}.{name}, which is not allowed")
    return found


def write_mask_embedding(path: Path, mask_token_id: int, embedding: np.ndarray) -> None:
    """Writes what `torch.save({"mask_token_id": ..., "embedding": tensor}, path)` writes.

    Args:
      path: the file; the archive's inner folder is called after it, as torch does.
      mask_token_id: below 2 ** 31.
      embedding: bfloat16, float16 or float32 [D].
    """
    kinds = {dtype: kind for kind, dtype in STORAGES.items()}
    if embedding.dtype not in kinds or embedding.ndim != 1:
        raise ValueError(
            f"a mask embedding is a vector of 16- or 32-bit floats, found {embedding.dtype} "
            f"{embedding.shape}"
        )
    folder = path.name.split(".")[0]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in {
            "data.pkl": _mask_pickle(mask_token_id, embedding.size, kinds[embedding.dtype]),
            "byteorder": b"little",
            "data/0": np.ascontiguousarray(embedding).tobytes(),
            "version": b"3\n",
        }.items():
            # A fixed date: the same embedding always gives the same file.
            archive.writestr(zipfile.ZipInfo(f"{folder}/{name}", (1980, 1, 1, 0, 0, 0)), content)


def _mask_pickle(mask_token_id: int, size: int, storage: tuple[str, str]) -> bytes:
    """Protocol-2 pickle of {"mask_token_id": int, "embedding": tensor}."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def name(module: str, attribute: str) -> bytes:
        return f"c{module}\n{attribute}\n".encode()

    persistent = b"(" + text("storage") + name(*storage) + text("0") + text("cpu") + integer(size)
    tensor = b"".join(
        [
            name("torch._utils", "_rebuild_tensor_v2"),
            b"(" + persistent + b"tQ",  # the storage
            integer(0),  # offset
            integer(size) + b"\x85",  # size, a tuple of one
            integer(1) + b"\x85",  # stride
            b"\x89",  # requires_grad
            name("collections", "OrderedDict") + b")R",  # backward hooks
            b"tR",
        ]
    )
    items = text("mask_token_id") + integer(mask_token_id) + text("embedding") + tensor
    return b"\x80\x02}(" + items + b"u."
