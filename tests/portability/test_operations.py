"""What a study's operations say of themselves, beside what is counted on their arrays."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.portability import measuring
from mimo_jax.portability.operations import TAIL, Operation, operations
from mimo_jax.portability.places import HARDWARE, find_place
from mimo_jax.portability.study import SUBJECTS
from pallas_kernels import packed
from pallas_kernels.attention.reference import visible
from pallas_kernels.backends import NAMES, REFERENCE, interpreted
from pallas_kernels.decode_attention import cases as decode_cases
from pallas_kernels.decode_attention.reference import visible_slots
from pallas_kernels.formats import FP8Array, MXFP4Array

ALL = operations()
SMALL = tuple(o for o in ALL if o.small)


def name(operation: Operation) -> str:
    return f"{operation.subject} {operation.case}"


every = pytest.mark.parametrize("operation", ALL, ids=name)
small = pytest.mark.parametrize("operation", SMALL, ids=name)


def of(*subjects: str):
    return pytest.mark.parametrize("operation", [o for o in ALL if o.subject in subjects], ids=name)


@functools.cache
def made(operation: Operation) -> tuple:
    return operation.make(jax.random.key(0))


def nbytes(arrays: Any) -> int:
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(arrays))


def described(arrays: Any) -> Any:
    leaves, tree = jax.tree.flatten(arrays)
    return [(a.shape, a.dtype) for a in leaves], tree


def test_every_subject_has_large_and_small_cases():
    names = [(o.subject, o.case) for o in ALL]
    assert len(set(names)) == len(names)
    for wanted in (True, False):
        assert {o.subject for o in ALL if o.small == wanted} == set(SUBJECTS)


@small
def test_shapes_are_those_of_the_arguments(operation):
    assert described(operation.shapes) == described(made(operation))


@every
def test_what_is_read_is_the_weights_or_keys_and_values(operation):
    """As many arguments at the end; what is before them is small beside a device's cache."""
    read = operation.shapes[-operation.read :]
    if operation.subject in ("moe", "quantized_matmul"):
        assert all(isinstance(a, FP8Array | MXFP4Array) for a in read)
    else:
        assert len(read) == 2
    rest = operation.shapes[: -operation.read]
    assert not any(isinstance(a, FP8Array | MXFP4Array) for a in rest)


@small
@pytest.mark.parametrize("backend", [REFERENCE, *NAMES])
def test_packed_arguments(operation, backend):
    """Weights that hold the same in the backend's order, and nothing else changes."""
    args = made(operation)

    def pack(args: tuple) -> tuple:
        return operation.packed(args, backend)

    got = jax.jit(pack)(args)
    assert described(jax.eval_shape(pack, operation.shapes)) == described(got)
    for before, after in zip(args, got, strict=True):
        if backend != REFERENCE and isinstance(before, FP8Array | MXFP4Array):
            assert after.kernels == (backend,)
            after = jax.jit(packed.unpack)(after)
        assert described(after) == described(before)
        pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        assert all(np.array_equal(*pair) for pair in pairs)


@every
@pytest.mark.parametrize("backend", [REFERENCE, *NAMES])
def test_a_backend_does_what_it_does_not_refuse(operation, backend):
    """`why_not` says beforehand what tracing the call would say."""
    with interpreted():
        shapes = jax.eval_shape(lambda a: operation.packed(a, backend), operation.shapes)
        reason = operation.why_not(shapes, backend)
        call = measuring.called(operation, backend)
        if reason is None:
            result = jax.eval_shape(call, *shapes)
            assert result.shape == jax.eval_shape(operation.define, *operation.shapes).shape
        else:
            with pytest.raises(NotImplementedError):
                jax.eval_shape(call, *shapes)


@pytest.mark.parametrize("target", HARDWARE)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_each_operation_has_a_kernel_on_each_kind_of_device(subject, target):
    place = find_place(target)

    def why_not(operation: Operation, backend: str) -> str | None:
        def pack(args: tuple) -> tuple:
            return operation.packed(args, backend, native_e2m1=place.native_e2m1)

        return operation.why_not(jax.eval_shape(pack, operation.shapes), backend)

    kernels = [b for b in place.allowed("auto") if b != REFERENCE]
    for operation in (o for o in ALL if o.subject == subject and not o.small):
        reasons = [why_not(operation, backend) for backend in kernels]
        assert None in reasons, (operation.case, reasons)


def test_why_not_names_what_there_is_no_form_of():
    one = next(o for o in SMALL if o.subject == "quantized_matmul")
    assert (
        one.why_not(one.shapes, "mosaic_gpu") == "there is no mosaic_gpu form of quantized_matmul"
    )
    assert "not packed" in (one.why_not(one.shapes, "triton") or "")  # nor are they
    assert one.why_not(one.shapes, REFERENCE) is None


@small
def test_a_reference_is_what_the_call_computes(operation):
    """On float32, both with plain jnp."""
    args = exact(made(operation))
    got = jax.jit(measuring.called(operation, REFERENCE))(*args)
    np.testing.assert_array_equal(got, jax.jit(operation.define)(*args))


def exact(args: tuple) -> tuple:
    bf16 = jnp.bfloat16
    return tuple(a.astype(jnp.float32) if getattr(a, "dtype", None) == bf16 else a for a in args)


@small
def test_the_tail_of_all_is_the_last_alone(operation):
    """Each of the last tokens' results is as it is among all of them."""
    args = exact(made(operation))
    define = jax.jit(operation.define)
    with jax.default_matmul_precision("highest"):
        whole, last = define(*args), define(*operation.last(args))
    tail = operation.tail(whole)
    np.testing.assert_allclose(tail, last, rtol=2e-5, atol=2e-6)
    if operation.axis is None:
        assert tail is whole
        return
    tokens = whole.shape[operation.axis]
    assert tail.shape[operation.axis] == min(tokens, TAIL)
    end = np.take(np.asarray(whole), range(max(0, tokens - TAIL), tokens), operation.axis)
    np.testing.assert_array_equal(tail, end)


def test_some_small_cases_have_more_tokens_than_are_compared():
    cut = {
        o.subject
        for o in SMALL
        if o.axis is not None and jax.eval_shape(o.define, *o.shapes).shape[o.axis] > TAIL
    }
    assert {"moe", "attention"} <= cut


# Bytes and FLOPs.


def matmuls(shape: tuple[int, ...], rows: int) -> int:
    """FLOPs of products of so many rows with matrices."""
    return 2 * rows * math.prod(shape)


@of("quantized_matmul")
def test_bytes_and_flops_of_a_product(operation):
    x, w = operation.shapes
    assert operation.flops == matmuls(w.shape, x.shape[0])
    # FP8 codes have a float32 scale for each block of 128 x 128, which is left out.
    assert operation.bytes == pytest.approx(nbytes(w), rel=5e-4)
    assert operation.bytes <= nbytes(w)
    if isinstance(w, MXFP4Array):
        assert operation.bytes == nbytes(w)


def expected_distinct(experts: int, chosen: int, tokens: int) -> float:
    """Mean number of experts that some token chooses: by how likely each number is, a token after
    the other."""
    likely = {0: 1.0}
    for _ in range(tokens):
        after: dict[int, float] = {}
        for there, p in likely.items():
            for new in range(min(chosen, experts - there) + 1):
                ways = math.comb(experts - there, new) * math.comb(there, chosen - new)
                part = p * ways / math.comb(experts, chosen)
                after[there + new] = after.get(there + new, 0.0) + part
        likely = {n: p for n, p in after.items() if p > 1e-18}
    return sum(n * p for n, p in likely.items())


@of("moe")
def test_bytes_and_flops_of_experts(operation):
    _, _, chosen, *stacks = operation.shapes
    (tokens, top_k), (experts, *_) = chosen.shape, stacks[0].shape
    one = nbytes(stacks) / experts
    if tokens <= 100:
        distinct = expected_distinct(experts, top_k, tokens)
        assert operation.bytes == pytest.approx(one * distinct, rel=1e-6)
    assert one * top_k <= operation.bytes <= nbytes(stacks)
    pairs = chosen.size  # each with one expert's three matrices
    assert operation.flops == sum(matmuls(s.shape[1:], pairs) for s in stacks)


def test_experts_are_chosen_as_is_expected():
    """By the arguments themselves: distinct ones, uniformly."""
    one = next(o for o in SMALL if (o.subject, o.case) == ("moe", "small 5"))
    keys = jax.random.split(jax.random.key(0), 400)
    chosen = np.asarray(jax.jit(jax.vmap(lambda key: one.make(key)[2]))(keys))
    assert (np.diff(np.sort(chosen, axis=-1)) > 0).all()
    stacks = one.shapes[3:]
    each = one.bytes / (nbytes(stacks) / stacks[0].shape[0])
    assert np.mean([len(np.unique(c)) for c in chosen]) == pytest.approx(each, rel=0.01)


def counted(operation: Operation) -> tuple[int, int]:
    """(token, key) pairs that the definition's mask lets see, and keys that any token sees."""
    q, _, _, k, _ = operation.shapes
    sizes, window = (q.shape[1], k.shape[1]), operation.looked_at(*operation.shapes)[-1]

    def count() -> Any:
        where = operation.make(jax.random.key(0))[1]
        if operation.subject == "attention":
            first, first_key, newest = where.T
            mask = visible(first, first_key, newest, sizes, window=window)
        else:
            case = {**decode_cases.REAL, **decode_cases.SMALL}[operation.case]
            mask = visible_slots(where, sizes, window=window, causal=case.causal)
        assert mask.shape == (q.shape[0], *sizes)
        return mask.sum(), mask.any(axis=1).sum()

    pairs, keys = jax.jit(count)()
    return int(pairs), int(keys)


@of("attention", "decode_attention")
def test_bytes_and_flops_of_attention(operation):
    q, _, _, k, v = operation.shapes
    pairs, keys = counted(operation)
    width = k.shape[-1] + v.shape[-1]
    # For each query head a product of the key's width, and one of the value's.
    assert operation.flops == 2 * pairs * k.shape[2] * q.shape[3] * width
    assert operation.bytes == keys * k.shape[2] * width * k.dtype.itemsize


@every
def test_nothing_is_free(operation):
    assert operation.bytes > 0
    assert operation.flops > 0
    whole = nbytes(operation.shapes[-operation.read :])
    assert operation.bytes <= whole
    assert measuring.bound(find_place("cpu"), operation) is None
    assert 0 < (measuring.bound(find_place("hopper"), operation) or 0) < 0.1
