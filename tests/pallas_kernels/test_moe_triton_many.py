"""The Triton kernels of `moe` for many tokens, interpreted, against the reference."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mimo_jax.quant import quantize_mxfp4
from pallas_kernels.moe import reference, triton_many
from pallas_kernels.moe.triton_many import Config, Tiling
from pallas_kernels.words import pack

NARROW = Config(8, Tiling(64), Tiling(128))


def experts(count: int, width: int, dim: int):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((count, width, dim), (count, width, dim), (count, dim, width))
    return [quantize_mxfp4(jax.random.normal(k, s) * 0.1) for k, s in zip(keys, shapes)]


def routing(tokens: int, top_k: int, dim: int, low: int, high: int):
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (tokens, dim), jnp.bfloat16)
    weights = jax.random.uniform(keys[1], (tokens, top_k))
    return x, weights, jax.random.randint(keys[2], (tokens, top_k), low, high)


def packed(stacks) -> list[Any]:
    return [pack(s) for s in stacks]


def check(x, weights, chosen, stacks, config):
    y = triton_many.moe(x, weights, chosen, *packed(stacks), config=config, interpret=True)
    expected = reference.moe(x.astype(jnp.float32), weights, chosen, *stacks)
    assert y.dtype == jnp.float32
    assert y.shape == expected.shape
    assert float(jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected)) < 5e-3


@pytest.mark.parametrize("config", [None, NARROW, Config(16, Tiling(128), Tiling(64))], ids=str)
def test_with_experts_that_are_elsewhere(config):
    check(*routing(20, 3, 256, -1, 6), experts(5, 128, 256), config)


def test_one_expert_gets_all():
    check(*routing(21, 2, 128, 3, 4), experts(5, 128, 128), NARROW)


def test_sizes_off_the_tiles():
    check(*routing(13, 2, 96, 0, 3), experts(3, 160, 96), NARROW)


def test_what_it_cannot_do():
    x, weights, chosen = routing(4, 2, 128, 0, 3)
    stacks = experts(3, 128, 128)
    assert "not packed" in (triton_many.unsupported(x, chosen, stacks[0]) or "")
    with pytest.raises(NotImplementedError, match="float32"):
        triton_many.moe(x.astype(jnp.float32), weights, chosen, *packed(stacks))
