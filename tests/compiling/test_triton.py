"""The Triton kernels at the models' sizes compile for Hopper, and no register spills."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import clock, targets, words
from pallas_kernels.attention import cases as attention_cases
from pallas_kernels.attention.triton import attention
from pallas_kernels.decode_attention import cases as decode_cases
from pallas_kernels.decode_attention.triton import decode_attention
from pallas_kernels.formats import FP8Array, MXFP4Array
from pallas_kernels.moe import cases as moe_cases
from pallas_kernels.moe import triton, triton_many, triton_one, triton_route, triton_scores
from pallas_kernels.quantized_matmul import cases as matmul_cases
from pallas_kernels.quantized_matmul import triton_one as matmul_one
from pallas_kernels.quantized_matmul.triton import quantized_matmul
from pallas_kernels.rms_norm.triton import rms_norm
from pallas_kernels.rotate_and_store import cases as rotate_cases
from pallas_kernels.rotate_and_store.triton import rotate_and_store

pytestmark = pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
ShapeDtype = jax.ShapeDtypeStruct


def mxfp4(*shape: int) -> words.MXFP4Words:
    *lead, rows, columns = shape
    codes = ShapeDtype((*lead, rows, columns // 2), jnp.uint8)
    scales = ShapeDtype((*lead, rows, columns // 32), jnp.uint8)
    return jax.eval_shape(words.pack, MXFP4Array(codes, scales))


def fp8(*shape: int) -> words.FP8Words:
    *lead, rows, columns = shape
    scales = ShapeDtype((*lead, -(-rows // 128), -(-columns // 128)), jnp.float32)
    return jax.eval_shape(words.pack, FP8Array(ShapeDtype(shape, jnp.float8_e4m3fn), scales))


def moe_arguments(case: moe_cases.Case) -> tuple:
    e, f, d = case.experts, case.width, case.dim
    return (
        ShapeDtype((case.tokens, d), jnp.bfloat16),
        ShapeDtype((case.tokens, case.top_k), jnp.float32),
        ShapeDtype((case.tokens, case.top_k), jnp.int32),
        *(mxfp4(e, f, d), mxfp4(e, f, d), mxfp4(e, d, f)),
    )


@pytest.mark.parametrize("name", moe_cases.REAL)
def test_moe(name):
    case = moe_cases.REAL[name]
    few = triton_one if case.tokens == 1 else triton
    form = few if case.tokens <= triton.MAX_TOKENS else triton_many
    targets.compile(targets.HOPPER, form.moe, *moe_arguments(case))


def test_moe_in_one_kernel():
    config = triton.Config(triton.Tiling(), triton.Tiling(), together=True)
    moe = functools.partial(triton.moe, config=config)
    targets.compile(targets.HOPPER, moe, *moe_arguments(moe_cases.REAL["pro 8"]))


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [
        *((n, jnp.float32) for n in (1, 8, 16, 64, triton_scores.MAX_TOKENS_FLOAT32)),
        *((n, jnp.bfloat16) for n in (1, 64, triton_scores.MAX_TOKENS)),
    ],
)
def test_routing(tokens, dtype):
    def route(x, router, bias):
        scores = triton_scores.scores(x, router)
        return triton_route.route(scores, bias, 8, normalize=True, scale=None)

    targets.compile(
        targets.HOPPER,
        route,
        ShapeDtype((tokens, 6144), jnp.bfloat16),
        ShapeDtype((384, 6144), dtype),
        ShapeDtype((384,), jnp.float32),
    )


@pytest.mark.parametrize("case", matmul_cases.REAL, ids=lambda c: c.name)
def test_quantized_matmul(case):
    w = (fp8 if case.format == "fp8" else mxfp4)(*case.weights)
    for rows in (1, 16, 64, 128, 4096):
        x = ShapeDtype((rows, case.weights[-1]), jnp.bfloat16)
        targets.compile(targets.HOPPER, lambda x, w: quantized_matmul(x, w), x, w)


@pytest.mark.parametrize(
    "w",
    [
        *[fp8(rows, 6144) for rows in (6784, 3392)],
        *[fp8(6144, 16384), fp8(8, 424, 6144)],
    ],
    ids=lambda w: f"{type(w).__name__} {w.shape}",
)
def test_quantized_matmul_of_one_row(w):
    x = ShapeDtype((1, w.shape[-1]), jnp.bfloat16)
    compiled = targets.compile(targets.HOPPER, matmul_one.quantized_matmul, x, w)
    assert compiled.program.as_text().count(" custom-call(") == 1


@pytest.mark.parametrize("case", decode_cases.REAL.values(), ids=decode_cases.REAL.keys())
def test_decode_attention(case):
    b, t, kv = len(case.lengths), case.queries, case.kv_heads
    attend = functools.partial(decode_attention, window=case.window, causal=case.causal)
    targets.compile(
        targets.HOPPER,
        attend,
        ShapeDtype((b, t, kv, case.group, case.head), jnp.bfloat16),
        ShapeDtype((b, case.slots, kv, case.head), jnp.bfloat16),
        ShapeDtype((b, case.slots, kv, case.value), jnp.bfloat16),
        ShapeDtype((b, t), jnp.int32),
        ShapeDtype((kv, case.group), jnp.float32),
    )


@pytest.mark.parametrize("case", attention_cases.REAL.values(), ids=attention_cases.REAL.keys())
def test_attention(case):
    b, kv = len(case.spans), case.kv_heads
    targets.compile(
        targets.HOPPER,
        functools.partial(attention, window=case.window),
        ShapeDtype((b, case.tokens, kv, case.group, case.head), jnp.bfloat16),
        ShapeDtype((b, case.keys, kv, case.head), jnp.bfloat16),
        ShapeDtype((b, case.keys, kv, case.value), jnp.bfloat16),
        *[ShapeDtype((b,), jnp.int32)] * 3,
        ShapeDtype((kv, case.group), jnp.float32),
    )


@pytest.mark.parametrize("rows", [1, 64])
def test_rms_norm(rows):
    given = ShapeDtype((rows, 6144), jnp.bfloat16), ShapeDtype((6144,), jnp.bfloat16)
    targets.compile(targets.HOPPER, functools.partial(rms_norm, eps=1e-5), *given)


def test_the_clock_is_read_between_what_is_computed_before_and_after():
    def twice(x):
        first, began = clock.read(x)
        second, ended = clock.read(first * 3)
        return second, clock.elapsed(began, ended)

    compiled = targets.compile(targets.HOPPER, twice, ShapeDtype((3,), jnp.int32))
    assert compiled.program.as_text().count(" custom-call(") == 2


@pytest.mark.parametrize("case", rotate_cases.REAL.values(), ids=rotate_cases.REAL.keys())
def test_rotate_and_store(case):
    """In place: a cache that is given away is not copied."""
    given = rotate_cases.shapes(case)
    step = functools.partial(rotate_and_store, heads=case.heads, ring=case.ring)
    step = jax.jit(step, donate_argnums=(2, 3))
    compiled = targets.compile(targets.HOPPER, step, *given)
    memory = compiled.program.memory_analysis()
    assert memory.alias_size_in_bytes == sum(2 * a.size for a in given[2:])
    assert memory.temp_size_in_bytes < 2**17
