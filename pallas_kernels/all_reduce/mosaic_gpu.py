"""All devices' sums in one kernel: each value goes straight to every other device, and no device
waits for more than what the others send.

A value travels with the number of the sum it belongs to, in one store of which no device sees a
part; so whoever waits for a value waits for its number, and there is no other signal (NCCL's LL
protocol does so too).  Sums take turns with two places for values: before a device can write into a
place again, it has needed the sum in between, to which the place's owner has contributed after it
had read it.  Every device adds up in the order of the devices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm
from jaxtyping import Array, Float

from pallas_kernels import backends
from pallas_kernels.all_reduce.exchange import BLOCK, Exchange

THREADS = 128
EACH = BLOCK // THREADS  # values of a thread
WORD = 4  # bytes
# A thread's values are in two stores of 16 bytes: two values with a number beside each.
STORES = 2
STORE = 16 * THREADS  # bytes of a block's


def unsupported(
    y: Any, residual: Any, exchange: Exchange | None, axes: tuple[str, ...]
) -> str | None:
    """Why the kernel can't do this; None if it can."""
    if exchange is None:
        return "there is no memory that the devices share (pallas_kernels.all_reduce.exchange)"
    if {axis for axis in axes if lax.axis_size(axis) > 1} != set(exchange.axes):
        return f"the exchange is for sums over {exchange.axes}, and this one is over {axes}"
    if backends.is_interpreted():
        return "the simulator has no memory of other devices"
    if y.dtype != jnp.float32 or residual.dtype != jnp.bfloat16:
        return f"{y.dtype} is added to {residual.dtype}; the kernel adds float32 to bfloat16"
    if y.size % BLOCK:
        return f"{y.size} values are not a multiple of {BLOCK}"
    if y.size > exchange.values:
        return f"{y.size} values are more than the exchange's {exchange.values}: XLA's is as fast"
    return None


def all_reduce(
    y: Float[Array, "*b D"],
    residual: Float[Array, "*b D"],
    exchange: Exchange,
    *,
    axes: tuple[str, ...],
    interpret: Any = False,
) -> Float[Array, "*b D"]:
    """As `reference.all_reduce`, but that only the result is rounded; see `unsupported`."""
    assert not interpret
    del axes  # the exchange's, in its order
    sizes = [lax.axis_size(axis) for axis in exchange.axes]
    n = math.prod(sizes)

    def body(y_ref: Any, residual_ref: Any, words_ref: Any, out_ref: Any) -> None:
        rank = jnp.int32(0)
        for axis, axis_size in zip(exchange.axes, sizes, strict=True):
            rank = rank * axis_size + lax.axis_index(axis)

        def of_device(device: int) -> Any:
            at = zip(exchange.axes, np.unravel_index(device, sizes), strict=True)
            where: Any = {axis: jnp.int32(i) for axis, i in at}
            return plgpu.remote_ref(words_ref, where)

        everyones = [of_device(device) for device in range(n)]
        ref = plgpu.RefType()
        types = (ref, ref, ref, [ref] * n, ref, plgpu.Layout.WG_SPLAT)
        inlined: Any = plgpu.inline_mgpu(arg_types=types)
        thread = functools.partial(_thread, blocks=exchange.values // BLOCK)
        inlined(thread)(y_ref, residual_ref, words_ref, everyones, out_ref, rank)

    call = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((y.size,), residual.dtype),
        grid=(y.size // BLOCK,),
        grid_names=("block",),
        kernel_name="all_reduce",
        compiler_params=plgpu.CompilerParams(
            skip_device_barrier=True,  # values come with their numbers
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )
    out = call(y.reshape(-1), residual.reshape(-1), exchange.words.reshape(-1))
    return out.reshape(residual.shape)


def _thread(
    ctx: Any,
    y: Any,
    residual: Any,
    words: Any,
    everyones: list[Any],
    out: Any,
    rank: Any,
    *,
    blocks: int,
) -> None:
    """What a thread does with its values.

    Arguments are memory references, the own rank, and how many blocks the exchange is for.
    """
    del ctx
    i64, f32 = ir.IntegerType.get_signless(64), ir.F32Type.get()
    n = len(everyones)
    thread = arith.index_cast(i64, gpu.thread_id(gpu.Dimension.x))
    block = arith.index_cast(i64, gpu.block_id(gpu.Dimension.x))
    own = arith.extsi(i64, rank.registers.item())
    index = _sum(_times(block, THREADS), thread)

    values = _load("ld.global.v4.b32 {$0,$1,$2,$3}, [$4];", 4, _at(y, index, EACH * WORD))
    counter = _sum(_at(words, block, WORD), _i64(2 * n * blocks * STORES * STORE))
    [before] = _load("ld.volatile.global.u32 $0, [$1];", 1, counter)
    number = arith.addi(before, _i32(1))
    turn = arith.extui(i64, arith.andi(number, _i32(1)))

    def place(words: Any, device: ir.Value) -> ir.Value:
        """Where a device's values of this thread are in someone's memory."""
        region = _sum(_times(turn, n), device)
        at = _sum(_times(region, blocks), block)
        return _sum(_address(words), _times(at, STORES * STORE), _times(thread, 16))

    for theirs in everyones:  # the own one as well, to add up in the same order everywhere
        for k in range(STORES):
            pair = values[2 * k], values[2 * k + 1]
            store = f"st.volatile.global.v4.u32 [$0+{k * STORE}], {{$1,$3,$2,$3}};"
            _do(store, place(theirs, own), *pair, number)

    held = _load("ld.global.v2.b32 {$0,$1}, [$2];", 2, _at(residual, index, EACH * 2))
    total: list[ir.Value] = []
    for device in range(n):
        sent = place(words, _i64(device))
        got = []
        for k in range(STORES):
            got += _load(
                "{ .reg .pred late, any; .reg .b32 first, second;\n"
                f"again: ld.volatile.global.v4.u32 {{$0,first,$1,second}}, [$2+{k * STORE}];\n"
                "setp.ne.u32 late, first, $3; setp.ne.or.u32 any, second, $3, late;\n"
                "@any bra again; }",
                2, sent, number,
            )  # fmt: skip
        floats = [arith.bitcast(f32, v) for v in got]
        total = [arith.addf(a, b) for a, b in zip(total, floats, strict=True)] if total else floats

    results = []
    for k, pair in enumerate(held):
        low = arith.bitcast(f32, arith.shli(pair, _i32(16)))
        high = arith.bitcast(f32, arith.andi(pair, _i32(-(1 << 16))))
        sums = arith.addf(low, total[2 * k]), arith.addf(high, total[2 * k + 1])
        results += _load("cvt.rn.bf16x2.f32 $0, $2, $1;", 1, *sums)
    _do("st.global.v2.b32 [$0], {$1,$2};", _at(out, index, EACH * 2), *results)

    mgpu.utils.warpgroup_barrier()  # all threads of the block have read the counter
    with mgpu.utils.single_thread(scope=mgpu.utils.ThreadSubset.WARPGROUP):
        _do("st.volatile.global.u32 [$0], $1;", counter, number)


def _i32(value: int) -> ir.Value:
    return arith.constant(ir.IntegerType.get_signless(32), value)


def _i64(value: int) -> ir.Value:
    return arith.constant(ir.IntegerType.get_signless(64), value)


def _sum(*terms: ir.Value) -> ir.Value:
    return functools.reduce(arith.addi, terms)


def _times(a: ir.Value, factor: int) -> ir.Value:
    return arith.muli(a, _i64(factor))


def _address(ref: Any) -> ir.Value:
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), mgpu.utils.memref_ptr(ref))


def _at(ref: Any, index: ir.Value, stride: int) -> ir.Value:
    return _sum(_address(ref), _times(index, stride))


def _load(code: str, results: int, *operands: ir.Value) -> Sequence[ir.Value]:
    """PTX that gives so many 32-bit words; results have registers of their own, for loops."""
    i32 = ir.IntegerType.get_signless(32)
    constraints = ",".join(["=&r"] * results + [_constraint(v) for v in operands])
    if results == 1:
        return [llvm.inline_asm(i32, list(operands), code, constraints, has_side_effects=True)]
    struct = llvm.StructType.get_literal([i32] * results)
    held = llvm.inline_asm(struct, list(operands), code, constraints, has_side_effects=True)
    return [llvm.extractvalue(i32, held, [k]) for k in range(results)]


def _do(code: str, *operands: ir.Value) -> None:
    """PTX that gives nothing."""
    constraints = ",".join(map(_constraint, operands))
    void = ir.Type.parse("!llvm.void")
    llvm.inline_asm(void, list(operands), code, constraints, has_side_effects=True)


def _constraint(value: ir.Value) -> str:
    return {"i32": "r", "i64": "l", "f32": "f"}[str(value.type)]
