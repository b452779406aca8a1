"""Attention's part of `python scripts/bench.py kernels`.

Calls follow each other in a loop on the device, each waiting for the output of the one before and
reading other keys and values, so that no cache of the device holds them.  Bytes count the keys and
values that are seen once, operations the pairs of a token and a key that it sees.  Beside the
kernels stand plain XLA and, as far as they can do it, cuDNN (through jax.nn) and the kernels that
come with jax: without sinks, and with heads of one size, which their operations count.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_jobs import Check, Job, supported
from jax.experimental.pallas.ops.gpu import attention_mgpu
from jax.experimental.pallas.ops.gpu import decode_attention as jax_decode

from mimo_jax.portability.timing import chain, error
from pallas_kernels import attention, decode_attention
from pallas_kernels.attention import cases, reference
from pallas_kernels.backends import REFERENCE
from pallas_kernels.decode_attention import cases as decode_cases
from pallas_kernels.decode_attention import reference as decode_reference

ROTATED = 1.2e8  # bytes of keys and values to take in turn: more than a cache holds
SAMPLE = 16  # tokens of a prompt that are compared


def small_checks(args: argparse.Namespace, names: tuple[str, ...]) -> Iterator[Check]:
    """Every small case by every kernel that can do it."""
    for operation, implementations, module, definition in (
        ("attention", attention.IMPLEMENTATIONS, cases, reference.attention),
        (
            "decode_attention",
            decode_attention.IMPLEMENTATIONS,
            decode_cases,
            decode_reference.decode_attention,
        ),
    ):
        for name, case in module.SMALL.items():
            if args.only not in f"{operation} {name}":
                continue
            given, options = module.arrays(case, args.seed)
            sink = options.pop("sink", None)
            for kernel in implementations:
                if kernel.backend in names and not kernel.unsupported(*given[:3], case.window):
                    yield Check(operation, name, kernel, definition, (*given, sink), options)


def _sets(make: Callable[[int], Any], size: float) -> list[Any]:
    return [make(i) for i in range(min(64, max(1, math.ceil(ROTATED / size))))]


def own_jobs(
    operation: str,
    name: str,
    run: Callable[..., Any],
    names: tuple[str, ...],
    given: tuple[Any, Any, list[Any]],
    counts: tuple[float, float],
    check: Callable[..., dict[str, Any]],
    *,
    window: int | None,
    plain: bool,
) -> list[Job]:
    """An operation by every kernel that can do it, and in plain XLA.

    Args:
      operation, name: for the table.
      run: from a backend and what `chain` gives it.
      names: of the kernels.
      given: q, what is the same in all calls, and sets of keys and values.
      counts: bytes and operations.
      check: of a result.
      window: of the operation.
      plain: whether plain XLA takes part.
    """
    implementations = {
        "attention": attention.IMPLEMENTATIONS,
        "decode_attention": decode_attention.IMPLEMENTATIONS,
    }[operation]
    jobs, (q, _, held) = [], given
    for backend in (*names, REFERENCE):
        of_ours = backend != REFERENCE
        if of_ours and not supported(implementations, backend, (q, *held[0], window)):
            continue
        if of_ours or plain:
            program, calls = chain(functools.partial(run, backend), len(held), seconds(*counts))
            label = backend if of_ours else "plain XLA"
            checked = check if of_ours else None
            jobs.append(Job(operation, name, label, program, given, calls, *counts, checked))
    return jobs


def seconds(read: float, flops: float) -> float:
    """What a good kernel takes, about."""
    return read / 2.5e12 + flops / 6e14 + 5e-6


def decode_jobs(args: argparse.Namespace, names: tuple[str, ...]) -> Iterator[list[Job]]:
    """Attention over a cache."""
    for name, case in decode_cases.REAL.items():
        if args.only not in f"decode_attention {name}":
            continue
        batch, window = len(case.lengths), case.window
        looked_at = [min(n, (window or n) + case.queries - 1) for n in case.lengths]
        # Of the tokens of a block each sees one key more than the one before, or all see all.
        pairs = sum(
            min(n - i if case.causal else n, window or n)
            for n in case.lengths
            for i in range(case.queries)
        )
        size = 2.0 * case.kv_heads * (case.head + case.value)
        (q, *_, positions), options = decode_cases.arrays(
            dataclasses.replace(case, slots=case.queries), args.seed
        )
        sink = options.pop("sink", None)
        make = functools.partial(_cache, case, batch, case.slots, args.seed)
        held = _sets(make, size * case.slots * batch)

        def run(backend: str, q: Any, given: Any, kv: Any, options: Any = options) -> Any:
            (positions, sink), (k, v) = given, kv
            return decode_attention.decode_attention(
                q, k, v, positions, sink=sink, kernels=(backend,), **options
            )

        jobs = own_jobs(
            *("decode_attention", name, run, names, (q, (positions, sink), held)),
            (size * sum(looked_at), size * pairs * case.group),
            functools.partial(_decode_check, args=(q, *held[0], positions, sink), options=options),
            window=window,
            plain=batch * case.slots <= 2**17,  # or its scores in float32 are many
        )
        if case.queries == 1 and window is None and len(set(case.lengths)) == 1:
            jobs += _others_decode(name, case, args.seed)
        yield jobs


def _cache(case: Any, batch: int, keys: int, seed: int, i: int) -> tuple[jax.Array, jax.Array]:
    """Keys and values, made on the device."""
    first, second = jax.random.split(jax.random.fold_in(jax.random.key(seed), i))
    shape = (batch, keys, case.kv_heads)
    return _normal(first, (*shape, case.head)), _normal(second, (*shape, case.value))


@functools.partial(jax.jit, static_argnums=1)
def _normal(key: Any, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16)


def _decode_check(y: Any, *, args: tuple, options: dict[str, Any]) -> dict[str, Any]:
    """Against the reference, a sequence at a time."""
    q, k, v, positions, sink = args
    definition: Callable[..., Any] = jax.jit(
        functools.partial(decode_reference.decode_attention, **options)
    )
    expected = [
        definition(
            *(a[i : i + 1].astype(jnp.float32) for a in (q, k, v)), positions[i : i + 1], sink
        )
        for i in range(len(q))
    ]
    return {"error": error(y, np.concatenate(expected))}


def _others_decode(name: str, case: decode_cases.Case, seed: int) -> list[Job]:
    """What others have, of keys and values of 128."""
    case = dataclasses.replace(case, head=128, value=128)
    batch, heads = len(case.lengths), case.kv_heads * case.group
    size = 4.0 * case.kv_heads * 128
    read = size * sum(case.lengths)
    held = _sets(functools.partial(_cache, case, batch, case.slots, seed), read)
    q = _normal(jax.random.key(seed), (batch, 1, heads, 128))

    def cudnn(q: Any, _: Any, kv: Any) -> Any:
        return jax.nn.dot_product_attention(q, *kv, implementation="cudnn")

    def gqa(q: Any, _: Any, kv: Any) -> Any:
        return jax_decode.gqa(q[:, 0], *kv)

    jobs, counts = [], (read, read * case.group)
    for label, call in (("cuDNN, 128/128", cudnn), ("jax gqa, 128/128", gqa)):
        program, calls = chain(call, len(held), seconds(*counts))
        given = (q, None, held)
        jobs.append(Job("decode_attention", name, label, program, given, calls, *counts))
    return jobs


def attention_jobs(args: argparse.Namespace, names: tuple[str, ...]) -> Iterator[list[Job]]:
    """Attention of prompts."""
    for name, case in cases.REAL.items():
        if args.only not in f"attention {name}":
            continue
        [(first, _, newest)] = case.spans
        seen = np.arange(first, newest + 1) + 1
        pairs = float(np.minimum(seen, case.window or newest + 1).sum())
        width = case.head + case.value
        heads = case.kv_heads * case.group
        counts = (
            2.0 * width * (case.tokens * heads + case.keys * case.kv_heads),
            2.0 * pairs * heads * width,
        )
        q = _normal(
            jax.random.key(args.seed), (1, case.tokens, case.kv_heads, case.group, case.head)
        )
        make = functools.partial(_cache, case, 1, case.keys, args.seed)
        held = _sets(make, 2.0 * width * case.keys * case.kv_heads)
        spans = tuple(jnp.asarray([n], jnp.int32) for n in case.spans[0])
        sink = None
        if case.sink is not None:
            sink = jnp.full((case.kv_heads, case.group), case.sink, jnp.float32)
        same = {"spans": spans, "sink": sink, "window": case.window}

        def run(backend: str, q: Any, given: Any, kv: Any, window: Any = case.window) -> Any:
            ((first, begin, newest), sink), (k, v) = given, kv
            return attention.attention(
                q, k, v, first, begin, newest, sink, window=window, kernels=(backend,)
            )

        jobs = own_jobs(
            *("attention", name, run, names, (q, (spans, sink), held), counts),
            functools.partial(_attention_check, q=q, kv=held[0], **same),
            window=case.window,
            plain=case.keys <= 8192,
        )
        if case.tokens == case.keys:
            jobs += _others(name, case, pairs, args.seed)
        yield jobs


def _attention_check(
    y: Any, *, q: Any, kv: Any, spans: Any, sink: Any, window: int | None
) -> dict[str, Any]:
    """Against the reference, some of the tokens of some of the heads."""
    some = np.linspace(0, q.shape[1] - 1, SAMPLE).astype(int)
    sizes = (q.shape[1], kv[0].shape[1])
    seen = _visible(*spans, sizes, window)[:, some]
    definition: Callable[..., Any] = jax.jit(reference.attend)
    errors = []
    for head in {0, q.shape[2] - 1}:
        k, v = (a[:, :, head : head + 1].astype(jnp.float32) for a in kv)
        part = None if sink is None else sink[head : head + 1]
        queries = q[:, some, head : head + 1].astype(jnp.float32)
        expected, _ = definition(queries, k, v, seen, part)
        errors.append(error(y[:, some, head : head + 1], expected))
    return {"error": max(errors)}


@functools.partial(jax.jit, static_argnums=(3, 4))
def _visible(a: Any, b: Any, c: Any, sizes: tuple[int, int], window: int | None) -> jax.Array:
    return reference.visible(a, b, c, sizes, window=window)


def _others(name: str, case: cases.Case, pairs: float, seed: int) -> list[Job]:
    """What others have, of keys and values of 192, causal."""
    case = dataclasses.replace(case, value=case.head)
    heads = case.kv_heads * case.group
    held = [_cache(case, 1, case.keys, seed, 0)]
    q = _normal(jax.random.key(seed), (1, case.tokens, heads, case.head))
    window = None if case.window is None else (case.window - 1, 0)

    def cudnn(q: Any, _: Any, kv: Any) -> Any:
        return jax.nn.dot_product_attention(
            q, *kv, is_causal=True, local_window_size=window, implementation="cudnn"
        )

    def mosaic(q: Any, _: Any, kv: Any) -> Any:
        config = attention_mgpu.TuningConfig(64, 64, 2, causal=True)
        return attention_mgpu.attention(q, *kv, config)

    jobs = []
    each = 4.0 * case.head
    counts = (each * case.tokens * (heads + case.kv_heads), each * pairs * heads)
    others = [("cuDNN, 192/192", cudnn, jnp.bfloat16)]
    if window is None:
        others.append(("jax attention_mgpu, 192/192, float16", mosaic, jnp.float16))
    for label, call, dtype in others:
        program, calls = chain(call, 1, seconds(*counts))
        given = jax.tree.map(lambda a, dtype=dtype: a.astype(dtype), (q, None, held))
        jobs.append(Job("attention", name, label, program, given, calls, *counts))
    return jobs
