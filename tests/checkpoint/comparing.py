"""What tests compare: models with the weights a release stands for, files with its bytes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint.release_bytes import Tensor
from checkpoint.release_format import Release

from mimo_jax.checkpoint import Loaded
from mimo_jax.model.parameters import ParamSpec, parameters
from mimo_jax.quant import numpy_dequantize


def dense_values(module: Any) -> dict[str, tuple[ParamSpec, np.ndarray]]:
    """float32 weights of every parameter of a module, by tensor name."""
    return {p.spec.name: (p.spec, numpy_dequantize(p.get_value())) for _, p in parameters(module)}


def weights_by_module(module: Any) -> dict[str, np.ndarray]:
    """The parameters of a module named as `Release.weights`: QKV in head order, single experts."""
    weights = {}
    for name, (spec, value) in dense_values(module).items():
        if spec.qkv is not None:
            prefix = name.removesuffix(".qkv_proj.weight")
            begin = 0
            for part in "qkv":
                rows = getattr(spec.qkv, part)
                chunks = [chunk[begin : begin + rows] for chunk in value]
                weights[f"{prefix}.{part}"] = np.concatenate(chunks)
                begin += rows
        elif "{}" in name:
            weights |= {name.format(e): w for e, w in enumerate(value)}
        else:
            weights[name] = value.reshape(spec.tensor_shape)
    return weights


def assert_same_weights(loaded: Loaded, release: Release, rounded_to: Any = None) -> None:
    """All weights are exactly those of the release (rounded to a type where one is given)."""
    found = weights_by_module(loaded.model)
    if loaded.mtp is not None:
        found |= weights_by_module(loaded.mtp)
    expected = {n: w for n, w in release.weights.items() if not is_stored_qkv(n)}
    assert found.keys() == expected.keys()
    for name, w in expected.items():
        if rounded_to is not None and not name.endswith("e_score_correction_bias"):
            w = w.astype(rounded_to).astype(np.float32)
        np.testing.assert_array_equal(found[name], w, err_msg=name)


def is_stored_qkv(name: str) -> bool:
    """Whether a weight is listed as stored, beside the q, k and v it is made of."""
    return name.endswith(tuple(f".{p}_proj.weight" for p in ("qkv", "q", "k", "v")))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, parsed here and not by the package."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        assert header.pop("__metadata__") == {"format": "pt"}
        assert not tensors.keys() & header.keys()
        for name, entry in header.items():
            start, end = (8 + length + o for o in entry["data_offsets"])
            tensors[name] = Tensor(entry["dtype"], tuple(entry["shape"]), data[start:end])
    return tensors


def stored_tensors(release: Release) -> dict[str, Tensor]:
    """The tensors of a release by name, whatever file they are in."""
    return {name: t for file in release.tensors.values() for name, t in file.items()}
