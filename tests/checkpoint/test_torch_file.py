"""mask_embedding.pt is read without executing anything that is in it."""

import os
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import golden
import ml_dtypes
import numpy as np
import pytest
from checkpoint.release_bytes import torch_bytes
from checkpoint.release_format import make_release

from mimo_jax import checkpoint
from mimo_jax.checkpoint.torch_file import TorchFileError, read_torch, write_mask_embedding

TORCH_FILE = golden.FOLDER / "mask_embedding_torch.pt"


def archive(
    path: Path,
    code: bytes,
    *,
    compression: int = zipfile.ZIP_STORED,
    byteorder: bytes = b"little",
    storage: bytes = bytes(8),
) -> Path:
    """A torch archive around a pickle."""
    contents = {"data.pkl": code, "byteorder": byteorder, "data/0": storage}
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in contents.items():
            file.writestr(f"m/{name}", content)
    return path


def tensor_pickle(size: bytes = b"K\x02\x85", stride: bytes = b"K\x01\x85", **swap: bytes) -> bytes:
    """{"e": bfloat16 tensor of 4 numbers' storage}, with parts exchanged."""
    parts = {
        "function": b"ctorch._utils\n_rebuild_tensor_v2\n",
        "storage": b"ctorch\nBFloat16Storage\n",
        "key": b"X\x01\x00\x00\x000",
        "count": b"K\x04",
        "offset": b"K\x00",
        "hooks": b"ccollections\nOrderedDict\n)R",
    } | swap
    location = b"X\x03\x00\x00\x00cpu"
    persistent = b"(X\x07\x00\x00\x00storage" + parts["storage"] + parts["key"] + location
    return (
        b"\x80\x02}(X\x01\x00\x00\x00e"
        + parts["function"]
        + b"("
        + persistent
        + parts["count"]
        + b"tQ"
        + parts["offset"]
        + size
        + stride
        + b"\x89"
        + parts["hooks"]
        + b"tRu."
    )


def test_file_that_torch_wrote() -> None:
    content = read_torch(TORCH_FILE)
    assert content.keys() == {"mask_token_id", "embedding"}
    assert content["mask_token_id"] == 7
    assert content["embedding"].dtype == ml_dtypes.bfloat16
    expected = np.load(golden.FOLDER / "mask_embedding_torch.npy")
    np.testing.assert_array_equal(content["embedding"].astype(np.float32), expected)


def test_what_we_write_is_what_torch_writes(tmp_path: Path) -> None:
    """The same pickle but for memo numbers, and the records that torch needs to read it."""
    content = read_torch(TORCH_FILE)
    path = tmp_path / "mask_embedding.pt"
    write_mask_embedding(path, content["mask_token_id"], content["embedding"])
    with zipfile.ZipFile(TORCH_FILE) as theirs, zipfile.ZipFile(path) as ours:
        for name in ("byteorder", "data/0", "version"):
            theirs_at, ours_at = f"mask_embedding_torch/{name}", f"mask_embedding/{name}"
            assert ours.read(ours_at) == theirs.read(theirs_at), name
        assert _instructions(ours.read("mask_embedding/data.pkl")) == _instructions(
            theirs.read("mask_embedding_torch/data.pkl")
        )


def _instructions(code: bytes) -> list[tuple[str, Any]]:
    """Instructions without memoisation, integers of any width being the same."""
    found = []
    for opcode, argument, _ in pickletools.genops(code):
        if "PUT" not in opcode.name:
            name = "INT" if opcode.name.startswith("BININT") else opcode.name
            found.append((name, argument))
    return found


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_round_trip(dtype: Any, tmp_path: Path) -> None:
    embedding = np.random.default_rng(0).standard_normal(300).astype(dtype)
    write_mask_embedding(tmp_path / "a.pt", 151675, embedding)
    write_mask_embedding(tmp_path / "b.pt", 151675, embedding)
    content = read_torch(tmp_path / "a.pt")
    assert content["mask_token_id"] == 151675
    assert content["embedding"].dtype == dtype
    np.testing.assert_array_equal(content["embedding"], embedding)
    with zipfile.ZipFile(tmp_path / "a.pt") as file:
        assert file.testzip() is None


@pytest.mark.parametrize("embedding", [np.zeros(3), np.zeros((1, 3), np.float32)])
def test_writes_vectors_of_floats_only(embedding: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a vector of 16- or 32-bit floats"):
        write_mask_embedding(tmp_path / "m.pt", 1, embedding)


def test_parts_of_a_storage(tmp_path: Path) -> None:
    data = np.arange(4).astype(ml_dtypes.bfloat16).tobytes()
    path = archive(tmp_path / "m.pt", tensor_pickle(offset=b"K\x01"), storage=data)
    np.testing.assert_array_equal(read_torch(path)["e"].astype(np.float32), [1, 2])
    square = tensor_pickle(size=b"K\x02K\x02\x86", stride=b"K\x02K\x01\x86")
    path = archive(tmp_path / "n.pt", square, storage=data)
    np.testing.assert_array_equal(read_torch(path)["e"].astype(np.float32), [[0, 1], [2, 3]])


class Malicious:
    """Runs a command when unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_malicious_pickle_is_refused_and_not_executed(protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    code = pickle.dumps({"mask_token_id": Malicious(marker)}, protocol=protocol)
    with pytest.raises(TorchFileError, match="not allowed"):
        read_torch(archive(tmp_path / "m.pt", code))
    assert not marker.exists()
    pickle.loads(code)
    assert marker.exists(), "the pickle must be able to do harm for this test to mean anything"


def test_malicious_drafter_is_an_error_of_the_checkpoint(tmp_path: Path) -> None:
    release = make_release(mtp=0, drafter=True)
    folder = release.write(tmp_path / "model")
    marker = tmp_path / "executed"
    archive(folder / "dflash" / "mask_embedding.pt", pickle.dumps(Malicious(marker)))
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(folder)
    (problem,) = caught.value.problems
    assert problem.kind == "unreadable torch file"
    assert problem.file == "dflash/mask_embedding.pt"
    assert "posix.system, which is not allowed" in problem.found
    assert not marker.exists()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (b"\x80\x02cbuiltins\neval\n.", "builtins.eval, which is not allowed"),
        (b"\x80\x02ctorch._utils\n_rebuild_parameter\n.", "not allowed"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "instruction NEWOBJ is not allowed"),
        (b"\x80\x02ccollections\nOrderedDict\n)R}b.", "instruction BUILD is not allowed"),
        (b"\x80\x02cos\nsystem\n.", "os.system"),
        (b"\x80\x02cos\n.", "malformed|not allowed|newline|string"),
        (b"\x80\x02(ios\nsystem\n.", "instruction INST is not allowed"),
        (b"\x80\x02\x82\x01.", "instruction EXT1 is not allowed"),
        (b"\x80\x02P1\n.", "instruction PERSID is not allowed"),
        (b"\x80\x02]q\x00h\x00a.", "instruction EMPTY_LIST is not allowed"),
        (b"\x80\x02K\x01K\x02R.", "malformed"),
        (b"\x80\x02ctorch\nBFloat16Storage\n)R.", "malformed"),
        (b"\x80\x02K\x01Q.", "persistent object 1 is not a storage"),
        (b"\x80\x02h\x05.", "malformed"),
        (b"\x80\x02u.", "malformed"),
        (b"\x80\x02.", "malformed"),
        (b"\x80\x02}", "exhausted|STOP|opcode"),
        (b"", "exhausted|STOP|opcode"),
        (b"\xfe", "opcode"),
        (
            tensor_pickle(storage=b"ctorch\nLongStorage\n"),
            "torch.LongStorage, which is not allowed",
        ),
        (tensor_pickle(storage=b"ccollections\nOrderedDict\n"), "is not supported"),
        (tensor_pickle(key=b"X\x04\x00\x00\x00../0"), "is not supported"),
        (tensor_pickle(key=b"X\x01\x00\x00\x009"), "m/data/9 is missing"),
        (tensor_pickle(count=b"K\x05"), "8 bytes for 5 of bfloat16"),
        (tensor_pickle(size=b"K\x05\x85"), "not contiguous"),
        (tensor_pickle(offset=b"K\x03"), "not contiguous"),
        (tensor_pickle(stride=b"K\x02\x85"), "not contiguous"),
        (tensor_pickle(size=b"K\x02K\x01\x86"), "malformed"),
        (tensor_pickle(offset=b"J\xff\xff\xff\xff"), "malformed"),
        (tensor_pickle(size=b"X\x01\x00\x00\x00a\x85"), "malformed"),
        (tensor_pickle(function=b"ccollections\nOrderedDict\n"), "malformed"),
    ],
)
def test_refused_pickles(code: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(TorchFileError, match=reason):
        read_torch(archive(tmp_path / "m.pt", code))


def test_refused_archives(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(pickle.dumps({}))
    with pytest.raises(TorchFileError, match="not a torch zip file"):
        read_torch(tmp_path / "a.pt")
    with pytest.raises(TorchFileError, match="not a torch zip file"):
        read_torch(tmp_path / "none.pt")
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as file:
        file.writestr("m/data/0", b"")
    with pytest.raises(TorchFileError, match=r"found 0 data.pkl"):
        read_torch(tmp_path / "b.pt")
    code = tensor_pickle()
    with pytest.raises(TorchFileError, match="byteorder is not little"):
        read_torch(archive(tmp_path / "c.pt", code, byteorder=b"big"))
    with pytest.raises(TorchFileError, match="compressed"):
        read_torch(archive(tmp_path / "d.pt", code, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(TorchFileError, match="larger than 1048576 bytes"):
        read_torch(archive(tmp_path / "e.pt", code + bytes(1 << 20)))


def test_damaged_archives(tmp_path: Path) -> None:
    """Any byte changed or cut off: read correctly, or TorchFileError, and nothing else."""
    whole = torch_bytes(39, np.arange(4).astype(ml_dtypes.bfloat16).tobytes())
    path = tmp_path / "m.pt"
    refused = 0
    for i in range(0, len(whole), 2):
        for data in (whole[:i], whole[:i] + bytes([whole[i] ^ 0x15]) + whole[i + 1 :]):
            path.write_bytes(data)
            try:
                read_torch(path)
            except TorchFileError:
                refused += 1
    assert refused > len(whole) / 2


def test_damaged_pickles(tmp_path: Path) -> None:
    """Without checksums in the way: any byte of the pickle changed."""
    whole = tensor_pickle()
    refused = 0
    for i in range(len(whole)):
        for flip in (0x01, 0x20, 0xFF):
            code = whole[:i] + bytes([whole[i] ^ flip]) + whole[i + 1 :]
            try:
                read_torch(archive(tmp_path / "m.pt", code))
            except TorchFileError:
                refused += 1
    assert refused > len(whole)
