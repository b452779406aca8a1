"""Attention of many tokens in Mosaic GPU, for Hopper: two kernels.

Over all keys a program has 128 tokens of one query head, 64 for each of two warpgroups; a third
fills a ring of blocks of keys and values.  The two take turns with the tensor cores: one multiplies
while the other computes its softmax (FlashAttention-3, arXiv 2407.08608, section 3.1).  Programs of
the latest tokens, which see most, come first, and those of heads that read the same keys come
together.

In a window a program has 64 tokens of all heads of a group: the keys and values that they see stay
in shared memory, and two warpgroups go over the heads.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_gpu import ROW, accumulator, bfloat16_transforms

ROWS = 64  # tokens of a warpgroup
TOKENS = 2 * ROWS  # of a program
PART = 64  # columns of queries and results that are copied together
ALIGNED = 8  # rows of a tile in shared memory, where copies begin and arrays end
PRODUCER = 2  # the warpgroup after the two that compute
PRODUCER_REGISTERS, COMPUTE_REGISTERS = 40, 232
SHARED_MEMORY = 232448 - 1024  # bytes that a program may have, less what barriers take
MAX_VALUE = 128  # a head's values; more lack the registers
MAX_SHARED_WINDOW = 128  # positions
WINDOW_KEYS = 192  # that 64 tokens see in such a window
LOG2E = math.log2(math.e)
EMPTY = -1e20  # the largest score so far, before there is one


@dataclasses.dataclass(frozen=True)
class Config:
    """Choices of the kernel over all keys.

    Attributes:
      keys: of a block, a multiple of 64.
      stages: blocks of the ring.
    """

    keys: int = 128
    stages: int = 2


def unsupported(q: Any, k: Any, v: Any, window: int | None = None) -> str | None:
    """Why this kernel can't do a case of arrays, or of their shapes; None if it can."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != jnp.bfloat16:
            return f"{name} is {x.dtype}, not bfloat16"
    head, value = q.shape[-1], v.shape[-1]
    if head % 64 or value % 64:
        return f"head sizes {head} and {value} are not multiples of 64"
    if value > MAX_VALUE:
        return f"values of {value} are larger than {MAX_VALUE}"
    config = Config()
    needed = 2 * (TOKENS * max(head, value) + config.stages * config.keys * (head + value))
    if needed > SHARED_MEMORY:
        return f"head sizes {head} and {value} need {needed} bytes of shared memory"
    if window is not None and window < 1:
        return f"a window of {window} has no positions"
    return None


def attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    first_query: Int[Array, " B"],
    first_key: Int[Array, " B"],
    newest: Int[Array, " B"],
    sink: Float[Array, "K G"] | None = None,
    *,
    window: int | None = None,
    config: Config | None = None,
    interpret: Any = False,
) -> Float[Array, "B T K G V"]:
    """`reference.attention`, of bfloat16; keys and values must be finite, also unseen ones.

    Numbers of tokens and keys that are no multiples of 8 cost copies of the arrays.

    Args:
      config: by default what was fastest.
      interpret: True, or `InterpretGPUParams`, to simulate on a CPU.

    Raises:
      NotImplementedError: with the reason, if it can't.
    """
    if reason := unsupported(q, k, v, window):
        raise NotImplementedError(reason)
    if interpret is True:
        interpret = plgpu.InterpretGPUParams()
    return _attention(
        *(q, k, v, first_query, first_key, newest, sink),
        window=window,
        config=config or Config(),
        interpret=interpret,
    )


@dataclasses.dataclass(frozen=True)
class _Span:
    """What successive tokens see.

    Attributes:
      offset: the first token's index among keys.
      first_key, newest: positions of the first key and of the last token.
      n_keys: keys in memory.
      window: positions that a token sees; None for all.
    """

    offset: Any
    first_key: Any
    newest: Any
    n_keys: int
    window: int | None

    @property
    def first(self) -> Any:
        """Index of the first key that any of them sees."""
        first = lax.max(-self.first_key, 0)
        return first if self.window is None else lax.max(first, self.offset - (self.window - 1))

    @property
    def last(self) -> Any:
        """Index of the last key there is."""
        return lax.min(self.newest - self.first_key, self.n_keys - 1)

    def end(self, tokens: int) -> Any:
        """Index after the last key that any of so many tokens sees; not after `first` if none."""
        end = lax.min(self.last, self.offset + tokens - 1) + 1
        # Tokens after the last one are padding.
        is_token = self.offset + self.first_key <= self.newest
        return lax.select(is_token, end, jnp.zeros_like(end))

    def visible(self, row: Any, key: Any, n_keys: int) -> Any:
        """Which keys from `key` on the 64 tokens from `row` on see: bool[64, n_keys]."""
        own = self._own(row)
        first, last = (jnp.broadcast_to(x, own.shape) for x in (-self.first_key, self.last))
        if self.window is not None:
            first = lax.max(own - (self.window - 1), first)
        shape = (ROWS, n_keys)
        keys = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) + key
        first, last = (lax.broadcast_in_dim(x, shape, [0]) for x in (first, lax.min(own, last)))
        return (keys >= first) & (keys <= last)

    def without_padding(self, row: Any, values: Any) -> Any:
        """float32[64, V] of the tokens from `row` on, zeros after the last token."""
        own = lax.broadcast_in_dim(self._own(row), values.shape, [0])
        return jnp.where(own <= self.newest - self.first_key, values, 0.0)

    def _own(self, row: Any) -> Any:
        """Indices of the own keys of the 64 tokens from `row` on."""
        return plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW) + (self.offset + row)


def _fill_registers(shape: tuple[int, ...], value: Any) -> Any:
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else ROW
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Blocks of keys that a program reads: those that need masks, then those that don't.

    Attributes:
      start: the first key; a multiple of 8.
      count: of blocks.
      whole: how many, from the first one on, have no key after any of the tokens.
      masked: how many are read first.
      keys: of a block.
    """

    start: Any
    count: Any
    whole: Any
    masked: Any
    keys: int

    def first_key(self, step: Any) -> Any:
        """Of the block of a step: first blocks from `whole` on, then those from 0 on."""
        beyond = self.count - self.whole
        block = step + lax.select(step < beyond, self.whole, -beyond)
        return pl.multiple_of(self.start + block * self.keys, ALIGNED)


def _blocks(span: _Span, keys: int) -> _Blocks:
    """For a program's 128 tokens."""
    first = span.first
    start = lax.div(first, ALIGNED) * ALIGNED
    count = lax.div(lax.max(span.end(TOKENS) - start, 0) + keys - 1, keys)
    nothing = jnp.zeros_like(count)
    if span.window is not None:
        return _Blocks(start, count, nothing, count, keys)
    before = lax.min(span.last, span.offset) + 1
    whole = lax.min(lax.div(lax.max(before - start, 0), keys), count)
    # Before the first key there may be up to seven others.
    begins = lax.select(first > start, jnp.ones_like(count), nothing)
    return _Blocks(start, count, whole, lax.min(count - whole + begins, count), keys)


# Within jit, so that the layers of a model share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("window", "config", "interpret"))
def _attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    first_query: Int[Array, " B"],
    first_key: Int[Array, " B"],
    newest: Int[Array, " B"],
    sink: Float[Array, "K G"] | None,
    *,
    window: int | None,
    config: Config,
    interpret: Any,
) -> Float[Array, "B T K G V"]:
    b, t, kv_heads, group, head = q.shape
    n_keys, value = k.shape[1], v.shape[-1]
    scratch = _scratch(head, value, config)
    tiles, shared = -(-t // TOKENS), False
    if window is not None and window <= MAX_SHARED_WINDOW and _fits_window(head, value):
        scratch = _scratch_of_window(head, value)
        tiles, shared = -(-t // _stride(window)), True
    if interpret:  # which doesn't know weights in registers
        keys = WINDOW_KEYS if shared else config.keys
        scratch["weights"] = plgpu.SMEM((2, ROWS, keys), jnp.bfloat16)

    def aligned(x: Array) -> Array:
        padding = -x.shape[1] % ALIGNED
        return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) if padding else x

    q, k, v = aligned(q.reshape(b, t, kv_heads * group, head)), aligned(k), aligned(v)
    operands = [first_query, first_key, newest]
    if sink is not None:
        # Exponents are of 2: scores and the sink are multiplied by log2(e).
        operands.append(sink.astype(jnp.float32).reshape(-1) * LOG2E)

    def body(first_query_ref: Any, first_key_ref: Any, newest_ref: Any, *refs: Any, **scratch: Any):
        refs = refs if sink is not None else (None, *refs)
        sequence = lax.axis_index("sequence")
        position = first_key_ref[sequence]
        offset = first_query_ref[sequence] - position
        span = _Span(offset, position, newest_ref[sequence], n_keys, window)
        if shared:
            _window_program(span, sequence, t, group, refs, scratch)
        else:
            _program(span, sequence, tiles, group, refs, scratch, config)

    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((*q.shape[:3], value), jnp.bfloat16),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        # The last axis varies fastest.
        grid=(tiles, b, kv_heads if shared else kv_heads * group),
        grid_names=("tile", "sequence", "head"),
        num_threads=2 if shared else 3,
        thread_name="warpgroup",
        kernel_name="attention_window" if shared else "attention",
        interpret=interpret or None,
    )(*operands, q, k, v)
    return out[:, :t].reshape(b, t, kv_heads, group, value)


def _tiles(*shape: int) -> Any:
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=bfloat16_transforms())


def _parts(count: int, head: int, value: int) -> Any:
    """Queries of warpgroups in parts of 64 columns, whose places results take afterwards."""
    return _tiles(2, count, max(head, value) // PART, ROWS, PART)


def _columns(part: int) -> Any:
    return pl.ds(part * PART, PART)


def _load_queries(q_ref: Any, parts: Any, arrived: Any) -> None:
    for part in range(q_ref.shape[-1] // PART):
        plgpu.copy_gmem_to_smem(q_ref.at[:, _columns(part)], parts.at[part], arrived)


def _multiply_keys(scores: Any, parts: Any, keys: Any) -> None:
    """Adds products of queries and keys [K, H]."""
    for part in range(keys.shape[-1] // PART):
        plgpu.wgmma(scores, parts.at[part], keys.at[:, _columns(part)].transpose((1, 0)))


def _write(acc: Any, total: Any, parts: Any) -> None:
    """Weighted sums, divided by the sums of weights, into shared memory."""
    share = 1.0 / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    acc = (acc * lax.broadcast_in_dim(share, acc.shape, [0])).astype(jnp.bfloat16)
    for part in range(acc.shape[1] // PART):
        parts.at[part][...] = acc[:, part * PART : (part + 1) * PART]
    plgpu.commit_smem()


def _store(parts: Any, rows: int, out_ref: Any) -> None:
    for part in range(out_ref.shape[-1] // PART):
        plgpu.copy_smem_to_gmem(parts.at[part, pl.ds(0, rows)], out_ref.at[:, _columns(part)])


def _scratch(head: int, value: int, config: Config) -> dict[str, Any]:
    stages = config.stages
    return {
        "tokens": _parts(1, head, value),
        "k": _tiles(stages, config.keys, head),
        "v": _tiles(stages, config.keys, value),
        "queries": plgpu.Barrier(num_arrivals=head // PART, num_barriers=2),
        "k_full": plgpu.Barrier(num_barriers=stages),
        "v_full": plgpu.Barrier(num_barriers=stages),
        "k_empty": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "v_empty": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "turn": plgpu.Barrier(num_barriers=2),
    }


def _program(
    span: _Span,
    sequence: Any,
    tiles: int,
    group: int,
    refs: tuple[Any, ...],
    scratch: dict[str, Any],
    config: Config,
) -> None:
    """128 tokens of a query head, over all keys that they see."""
    sink_ref, q_ref, k_ref, v_ref, out_ref = refs
    q_head, warpgroup = lax.axis_index("head"), lax.axis_index("warpgroup")
    first_token = (tiles - 1 - lax.axis_index("tile")) * TOKENS
    span = dataclasses.replace(span, offset=span.offset + first_token)
    blocks = _blocks(span, config.keys)

    @pl.when(warpgroup == PRODUCER)
    def _() -> None:
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        _fill(blocks, scratch, k_ref, v_ref, (sequence, lax.div(q_head, group)), config)

    @pl.when(warpgroup != PRODUCER)
    def _() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        row = warpgroup * ROWS
        at = (sequence, pl.ds(pl.multiple_of(first_token + row, ROWS), ROWS), q_head)
        parts, arrived = scratch["tokens"].at[warpgroup, 0], scratch["queries"].at[warpgroup]
        _load_queries(q_ref.at[at], parts, arrived)
        top, total = (EMPTY, 0.0) if sink_ref is None else (sink_ref[q_head], 1.0)
        carry = (
            _fill_registers((ROWS, out_ref.shape[-1]), 0.0),
            _fill_registers((ROWS,), top),
            _fill_registers((ROWS,), total),
        )
        plgpu.barrier_wait(arrived)
        acc, total = _over_blocks(blocks, span, row, scratch, parts, carry, config)
        _write(span.without_padding(row, acc), total, parts)
        _store(parts, ROWS, out_ref.at[at])
        plgpu.wait_smem_to_gmem(0)


def _fill(
    blocks: _Blocks,
    scratch: dict[str, Any],
    k_ref: Any,
    v_ref: Any,
    place: tuple[Any, Any],
    config: Config,
) -> None:
    """Copies the blocks of a sequence and a head into the ring."""
    sequence, kv_head = place
    rings = [(k_ref, "k"), (v_ref, "v")]

    @pl.loop(0, blocks.count)
    def _(step: Any) -> None:
        slot = lax.rem(step, config.stages)
        at = (sequence, pl.ds(blocks.first_key(step), config.keys), kv_head)
        for ref, name in rings:
            empty = scratch[f"{name}_empty"].at[slot]
            pl.when(step >= config.stages)(functools.partial(plgpu.barrier_wait, empty))
            full = scratch[f"{name}_full"].at[slot]
            plgpu.copy_gmem_to_smem(ref.at[at], scratch[name].at[slot], full)

    # No barrier may be left halfway.
    @pl.loop(lax.max(blocks.count - config.stages, 0), blocks.count)
    def _(step: Any) -> None:
        for _, name in rings:
            plgpu.barrier_wait(scratch[f"{name}_empty"].at[lax.rem(step, config.stages)])


def _over_blocks(
    blocks: _Blocks,
    span: _Span,
    row: Any,
    scratch: dict[str, Any],
    queries: Any,
    carry: tuple[Any, Any, Any],
    config: Config,
) -> tuple[Any, Any]:
    """A warpgroup's weighted sum of values, float32[64, V], and its sums of weights.

    Args:
      row: its first token among the program's.
      carry: weighted sum, largest score and sum of weights so far.
    """
    warpgroup, turn = lax.div(row, ROWS), scratch["turn"]
    scale = scratch["k"].shape[-1] ** -0.5 * LOG2E

    def take_turn() -> None:
        plgpu.barrier_wait(turn.at[warpgroup])

    def pass_turn() -> None:
        plgpu.barrier_arrive(turn.at[1 - warpgroup])

    def wait_for_keys(step: Any) -> None:
        full = scratch["k_full"].at[lax.rem(step, config.stages)]
        pl.when(step < blocks.count)(lambda: plgpu.barrier_wait(full))

    def update(step: Any, carry: Any, *, masked: bool) -> Any:
        acc, top, total = carry
        slot = lax.rem(step, config.stages)

        def multiply(scores: Any) -> Any:
            _multiply_keys(scores, queries, scratch["k"].at[slot])
            pass_turn()
            return scores[...]

        scores = pl.run_scoped(multiply, accumulator(config.keys))
        plgpu.barrier_arrive(scratch["k_empty"].at[slot])
        if masked:
            visible = span.visible(row, blocks.first_key(step), config.keys)
            scores = jnp.where(visible, scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=1) * scale)
        shrink = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(new_top, scores.shape, [0]))
        acc, total = acc * lax.broadcast_in_dim(shrink, acc.shape, [0]), total * shrink
        rounded = weights.astype(jnp.bfloat16)
        plgpu.barrier_wait(scratch["v_full"].at[slot])
        take_turn()
        # After the turn and not before: 664 TFLOP/s, not 619, in a prototype on an H100.
        total = total + weights.sum(axis=1)
        acc = _add_product(
            acc, rounded, scratch["v"].at[slot], scratch, lambda: wait_for_keys(step + 1)
        )
        plgpu.barrier_arrive(scratch["v_empty"].at[slot])
        return acc, new_top, total

    pl.when(warpgroup == 1)(pass_turn)
    wait_for_keys(jnp.int32(0))
    take_turn()
    carry = lax.fori_loop(0, blocks.masked, functools.partial(update, masked=True), carry)
    acc, _, total = lax.fori_loop(
        blocks.masked, blocks.count, functools.partial(update, masked=False), carry
    )
    pass_turn()
    pl.when(warpgroup == 0)(take_turn)
    return acc, total


def _add_product(
    acc: Any, weights: Any, values: Any, scratch: dict[str, Any], meanwhile: Any = lambda: None
) -> Any:
    """acc plus the product of weights in registers and values in shared memory."""

    def multiply(acc_ref: Any, weights: Any) -> None:
        plgpu.wgmma(acc_ref, weights, values)
        meanwhile()

    if "weights" not in scratch:
        start = plgpu.WGMMAAccumulatorRef.init(acc)
        return pl.run_state(functools.partial(multiply, weights=weights))(start)

    # The simulator knows neither operands in registers nor sums that begin with a value.
    def product(acc_ref: Any) -> Any:
        buffer = scratch["weights"].at[lax.axis_index("warpgroup")]
        buffer[...] = weights
        multiply(acc_ref, buffer)
        return acc_ref[...]

    return acc + pl.run_scoped(product, accumulator(acc.shape[1]))


def _stride(window: int) -> int:
    """Tokens from a program's first one to the next's, if keys begin anywhere."""
    room = WINDOW_KEYS - (window - 1) - (ALIGNED - 1)
    return min(ROWS, room // ALIGNED * ALIGNED)


def _fits_window(head: int, value: int) -> bool:
    return 2 * (4 * ROWS * max(head, value) + WINDOW_KEYS * (head + value)) <= SHARED_MEMORY


def _scratch_of_window(head: int, value: int) -> dict[str, Any]:
    return {
        "tokens": _parts(2, head, value),
        "k": _tiles(WINDOW_KEYS, head),
        "v": _tiles(WINDOW_KEYS, value),
        "queries": plgpu.Barrier(num_arrivals=head // PART, num_barriers=4),
        "k_full": plgpu.Barrier(),
        "v_full": plgpu.Barrier(),
    }


def _window_program(
    span: _Span,
    sequence: Any,
    tokens: int,
    group: int,
    refs: tuple[Any, ...],
    scratch: dict[str, Any],
) -> None:
    """64 tokens of a group of query heads, every other head by one of two warpgroups."""
    assert span.window is not None
    sink_ref, q_ref, k_ref, v_ref, out_ref = refs
    warpgroup, kv_head = lax.axis_index("warpgroup"), lax.axis_index("head")
    # Keys are read from a multiple of 8 on.  If too many are then read before the first one seen,
    # the last ones lack room, and programs have fewer tokens.
    before = lax.rem(span.offset - (span.window - 1) + (1 << 30), ALIGNED)
    fits = before + (span.window - 1) + ROWS <= WINDOW_KEYS
    least = _stride(span.window)
    stride = lax.select(fits, jnp.int32(ROWS), jnp.int32(least))
    first_token = pl.multiple_of(lax.axis_index("tile") * stride, ALIGNED)
    span = dataclasses.replace(span, offset=span.offset + first_token)
    start = pl.multiple_of(lax.div(span.first, ALIGNED) * ALIGNED, ALIGNED)
    mine = lax.div(group - warpgroup + 1, 2)

    def place(i: Any, rows: int) -> Any:
        return sequence, pl.ds(first_token, rows), kv_head * group + warpgroup + 2 * i

    def load(i: Any) -> None:
        slot = lax.rem(i, 2)
        arrived = scratch["queries"].at[2 * warpgroup + slot]
        _load_queries(q_ref.at[place(i, ROWS)], scratch["tokens"].at[warpgroup, slot], arrived)

    def store(i: Any, acc: Any, total: Any) -> None:
        parts = scratch["tokens"].at[warpgroup, lax.rem(i, 2)]
        _write(acc, total, parts)
        for rows in {ROWS, least}:
            pl.when(stride == rows)(
                functools.partial(_store, parts, rows, out_ref.at[place(i, rows)])
            )

    def over_heads() -> None:
        keys = (sequence, pl.ds(start, WINDOW_KEYS), kv_head)
        for i, (name, ref) in enumerate((("k", k_ref), ("v", v_ref))):
            copy = functools.partial(
                plgpu.copy_gmem_to_smem, ref.at[keys], scratch[name], scratch[f"{name}_full"]
            )
            pl.when(warpgroup == i)(copy)
        pl.when(mine > 0)(lambda: load(jnp.int32(0)))
        plgpu.barrier_wait(scratch["k_full"])
        plgpu.barrier_wait(scratch["v_full"])

        @pl.loop(0, mine)
        def _(i: Any) -> None:
            slot = lax.rem(i, 2)
            plgpu.barrier_wait(scratch["queries"].at[2 * warpgroup + slot])

            def multiply(scores: Any) -> Any:
                _multiply_keys(scores, scratch["tokens"].at[warpgroup, slot], scratch["k"])
                return scores[...]

            scores = pl.run_scoped(multiply, accumulator(WINDOW_KEYS))

            # Not during the product: a branch makes the compiler wait for its end.
            @pl.when(i + 1 < mine)
            def _() -> None:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                load(i + 1)

            scores = jnp.where(span.visible(0, start, WINDOW_KEYS), scores, -jnp.inf)
            sink = EMPTY if sink_ref is None else sink_ref[place(i, ROWS)[-1]]
            sink = _fill_registers((ROWS,), sink)
            scale = scratch["k"].shape[-1] ** -0.5 * LOG2E
            top = jnp.maximum(scores.max(axis=1) * scale, sink)
            weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(top, scores.shape, [0]))
            total = weights.sum(axis=1)
            if sink_ref is not None:
                total = total + jnp.exp2(sink - top)
            acc = _add_product(nothing, weights.astype(jnp.bfloat16), scratch["v"], scratch)
            store(i, span.without_padding(0, acc), total)

    nothing = _fill_registers((ROWS, out_ref.shape[-1]), 0.0)
    is_tile, sees = first_token < tokens, span.end(ROWS) > start
    pl.when(is_tile & sees)(over_heads)

    @pl.when(is_tile & ~sees)
    def _() -> None:
        @pl.loop(0, mine)
        def _(i: Any) -> None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            store(i, nothing, _fill_registers((ROWS,), 1.0))

    plgpu.wait_smem_to_gmem(0)
