"""The operations that have kernels, as a study of portability tries them: sizes and arguments."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mimo_jax.planning.steps import visible_pairs
from pallas_kernels import attention, backends, decode_attention, moe, packed, quantized_matmul
from pallas_kernels.attention import cases as attention_cases
from pallas_kernels.attention import reference as attention_reference
from pallas_kernels.backends import REFERENCE, Implementation
from pallas_kernels.decode_attention import cases as decode_cases
from pallas_kernels.decode_attention import reference as decode_reference
from pallas_kernels.formats import FP8Array, MXFP4Array
from pallas_kernels.moe import cases as moe_cases
from pallas_kernels.moe import reference as moe_reference
from pallas_kernels.quantized_matmul import cases as matmul_cases
from pallas_kernels.quantized_matmul import reference as matmul_reference

Key = Any
TAIL = 16  # tokens that are compared


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation at one size.

    Attributes:
      subject: its name.
      case: that of its sizes.
      small: whether a CPU can interpret its kernels in seconds.
      make: random arguments from a key: what is computed with first, and what is read last, of
        which there may be several sets.  Weights are in the checkpoint's format.
      read: how many arguments at the end are read.
      define: the float32 reference, of the same arguments.
      call: the operation with some kernels, on weights packed for them.
      implementations: the backends that there are.
      looked_at: from the arguments to what decides whether a backend can do them.
      bytes: that have to be read.
      flops: that have to be done.
      axis: of results, the tokens; None where there are few.
      last: from the arguments to those of the last TAIL tokens alone, whose float32 reference fits
        into memory.
    """

    subject: str
    case: str
    small: bool
    make: Callable[[Key], tuple]
    read: int
    define: Callable[..., Any]
    call: Callable[..., Any]
    implementations: tuple[Implementation, ...]
    looked_at: Callable[..., tuple]
    bytes: float
    flops: float
    axis: int | None = None
    last: Callable[[tuple], tuple] = tuple

    @property
    def shapes(self) -> tuple:
        """The arguments as shapes."""
        return jax.eval_shape(self.make, jax.eval_shape(lambda: jax.random.key(0)))

    def packed(self, args: tuple, backend: str, *, native_e2m1: bool = False) -> tuple:
        """The arguments with weights in a backend's order; works on shapes within `eval_shape`."""
        if backend == REFERENCE:
            return args
        pack = functools.partial(packed.pack, kernels=(backend,), native_e2m1=native_e2m1)
        return tuple(pack(a) if isinstance(a, FP8Array | MXFP4Array) else a for a in args)

    def tail(self, result: Any) -> Any:
        """Of a result that of the last tokens."""
        if self.axis is None or result.shape[self.axis] <= TAIL:
            return result
        return result[(slice(None),) * self.axis + (slice(-TAIL, None),)]

    def why_not(self, args: tuple, backend: str) -> str | None:
        """Why a backend can't do this with these arguments or shapes; None if it can."""
        names = {implementation.backend for implementation in self.implementations}
        if backend not in names:
            return f"there is no {backend} form of {self.subject}"
        chosen, refused = backends.choose(self.implementations, (backend,), *self.looked_at(*args))
        if chosen is not None:
            return None
        return "; ".join(dict.fromkeys(why for name, why in refused if name == backend))


def operations() -> tuple[Operation, ...]:
    """All of them: at the sizes of MiMo-V2.5-Pro, and small ones to interpret."""
    return (
        *(_moe(name, moe_cases.REAL[name]) for name in ("pro 1", "pro 8", "pro 64", "pro 4096")),
        *(_moe(f"small {n}", _small_moe(n), small=True) for n in (5, 70)),
        *(_matmul(case, n) for case in matmul_cases.REAL[:1] for n in (1, 16, 4096)),
        *(
            _matmul(case, n)
            for case in matmul_cases.REAL
            if case.name == "pro-expert"
            for n in (8,)
        ),
        *(_matmul(case, 5, small=True) for case in matmul_cases.AWKWARD if case.name in _SMALL),
        *(_attention(n, attention_cases.REAL[n]) for n in _PROMPTS),
        *(_attention(n, attention_cases.SMALL[n], small=True) for n in _SMALL_PROMPTS),
        *(_decode(n, decode_cases.REAL[n]) for n in _DECODED),
        *(_decode(n, decode_cases.SMALL[n], small=True) for n in _SMALL_DECODED),
    )


_SMALL = ("half-block", "stack-mxfp4")
_PROMPTS = ("pro 2048", "pro window 2048", "pro 2048 after 30000")
_SMALL_PROMPTS = ("release heads", "a window after earlier keys")
_DECODED = ("4k x1", "32k x1", "16 of 4k x1", "4k x8", "ring x1", "drafter ring x8")
_SMALL_DECODED = ("a verified block", "a window over a ring's end", "a drafted block")


def _small_moe(tokens: int) -> moe_cases.Case:
    return moe_cases.Case(tokens, 256, 128, 6, 3)


def _mxfp4(key: Key, shape: tuple[int, ...]) -> MXFP4Array:
    codes, scales = jax.random.split(key)
    *lead, rows, columns = shape
    # Scale bytes 119 and 120, as in the releases.
    steps = jax.random.bits(scales, (*lead, rows, columns // 32), jnp.uint8) & 1
    return MXFP4Array(jax.random.bits(codes, (*lead, rows, columns // 2), jnp.uint8), steps + 119)


def _fp8(key: Key, shape: tuple[int, ...]) -> FP8Array:
    codes, scales = jax.random.split(key)
    *lead, rows, columns = shape
    bits = jax.random.bits(codes, shape, jnp.uint8) & 0xBF  # without NaN
    blocks = (*lead, -(-rows // 128), -(-columns // 128))
    return FP8Array(
        jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn),
        jax.random.uniform(scales, blocks, minval=0.01, maxval=0.02),
    )


def _moe(name: str, case: moe_cases.Case, *, small: bool = False) -> Operation:
    e, f, d, n, k = case.experts, case.width, case.dim, case.tokens, case.top_k

    def make(key: Key) -> tuple:
        x, weights, chosen, *stacks = jax.random.split(key, 6)
        return (
            jax.random.normal(x, (n, d), jnp.bfloat16),
            jax.random.uniform(weights, (n, k), minval=0.1),
            jax.lax.top_k(jax.random.uniform(chosen, (n, e)), k)[1],
            *(_mxfp4(s, shape) for s, shape in zip(stacks, ((e, f, d), (e, f, d), (e, d, f)))),
        )

    distinct = e * (1 - (1 - k / e) ** n)  # expected
    return Operation(
        *("moe", name, small, make, 3, moe_reference.moe),
        call=lambda *args, kernels: moe.moe(*args),  # the weights know their kernels
        implementations=moe.IMPLEMENTATIONS,
        looked_at=lambda x, weights, chosen, gate, *_: (x, chosen, gate),
        bytes=3 * d * f * (0.5 + 1 / 32) * distinct,
        flops=6.0 * d * f * n * k,
        axis=0,
        last=lambda args: (*(a[-TAIL:] for a in args[:3]), *args[3:]),
    )


def _matmul(case: matmul_cases.Case, rows: int, *, small: bool = False) -> Operation:
    def make(key: Key) -> tuple:
        x, w = jax.random.split(key)
        weights = (_fp8 if case.format == "fp8" else _mxfp4)(w, case.weights)
        return jax.random.normal(x, (rows, case.weights[-1]), jnp.bfloat16), weights

    size = math.prod(case.weights)
    return Operation(
        *("quantized_matmul", f"{case.name} {rows}", small, make, 1),
        define=matmul_reference.quantized_matmul,
        call=lambda *args, kernels: quantized_matmul.quantized_matmul(*args),
        implementations=quantized_matmul.IMPLEMENTATIONS,
        looked_at=lambda x, w: (x, w),
        bytes=size * (1.0 if case.format == "fp8" else 0.5 + 1 / 32),
        flops=2.0 * size * rows,
        axis=0,
        last=lambda args: (args[0][-TAIL:], args[1]),
    )


def _heads(key: Key, case: Any, batch: int, tokens: int, keys: int) -> tuple:
    q, k, v = jax.random.split(key, 3)
    kv = case.kv_heads
    # Scores are about normal, as after the norms of a model.
    return (
        jax.random.normal(q, (batch, tokens, kv, case.group, case.head), jnp.bfloat16),
        jax.random.normal(k, (batch, keys, kv, case.head), jnp.bfloat16),
        jax.random.normal(v, (batch, keys, kv, case.value), jnp.bfloat16),
    )


def _sink(case: Any) -> Any:
    if case.sink is None:
        return None
    return jnp.full((case.kv_heads, case.group), case.sink, jnp.float32)


def _attention(name: str, case: attention_cases.Case, *, small: bool = False) -> Operation:
    batch, options = len(case.spans), {"window": case.window}

    def make(key: Key) -> tuple:
        q, k, v = _heads(key, case, batch, case.tokens, case.keys)
        return q, jnp.asarray(case.spans, jnp.int32), _sink(case), k, v

    def with_spans(run: Callable[..., Any], **given: Any) -> Callable[..., Any]:
        def attend(q: Any, spans: Any, sink: Any, k: Any, v: Any, **more: Any) -> Any:
            return run(q, k, v, *spans.T, sink=sink, **given, **more)

        return attend

    def last(args: tuple) -> tuple:
        q, spans, *rest = args
        return q[:, -TAIL:], spans.at[:, 0].add(max(0, case.tokens - TAIL)), *rest

    pairs = sum(
        visible_pairs(first - first_key, newest + 1 - first, case.window)
        for first, first_key, newest in case.spans
    )
    return Operation(
        *("attention", name, small, make, 2),
        define=with_spans(attention_reference.attention, **options),
        call=with_spans(attention.attention, **options),
        implementations=attention.IMPLEMENTATIONS,
        looked_at=lambda q, spans, sink, k, v: (q, k, v, case.window),
        bytes=2.0 * case.kv_heads * (case.head + case.value) * batch * case.keys,
        flops=2.0 * pairs * case.kv_heads * case.group * (case.head + case.value),
        axis=1,
        last=last,
    )


def _decode(name: str, case: decode_cases.Case, *, small: bool = False) -> Operation:
    batch = len(case.lengths)
    options: Mapping[str, Any] = {"window": case.window, "causal": case.causal}

    def make(key: Key) -> tuple:
        q, k, v = _heads(key, case, batch, case.queries, case.slots)
        newest = jnp.asarray(case.lengths, jnp.int32)[:, None] - 1
        return q, newest - jnp.arange(case.queries)[::-1], _sink(case), k, v

    def with_positions(run: Callable[..., Any]) -> Callable[..., Any]:
        def attend(q: Any, positions: Any, sink: Any, k: Any, v: Any, **more: Any) -> Any:
            return run(q, k, v, positions, sink=sink, **options, **more)

        return attend

    seen = sum(min(n, (case.window or n) + case.queries - 1) for n in case.lengths)
    pairs = sum(_decode_pairs(n, case) for n in case.lengths)
    head = case.kv_heads * (case.head + case.value)
    return Operation(
        *("decode_attention", name, small, make, 2),
        define=with_positions(decode_reference.decode_attention),
        call=with_positions(decode_attention.decode_attention),
        implementations=decode_attention.IMPLEMENTATIONS,
        looked_at=lambda q, positions, sink, k, v: (q, k, v, case.window),
        bytes=2.0 * head * seen,
        flops=2.0 * head * case.group * pairs,
    )


def _decode_pairs(length: int, case: decode_cases.Case) -> int:
    """(query, key) pairs of a sequence."""
    first = length - case.queries
    if case.causal:
        return visible_pairs(first, case.queries, case.window)
    # Each sees the later ones of its block besides.
    return sum(
        length - (0 if case.window is None else max(0, own - case.window + 1))
        for own in range(first, length)
    )
