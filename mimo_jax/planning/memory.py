"""Bytes of the key/value cache, exactly, and of a program's workspace, roughly."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mimo_jax.config import MiMoConfig
from mimo_jax.model.cache import CACHE_AXES, init_cache
from mimo_jax.model.placement import Placement
from mimo_jax.planning.inventory import Placed, layer_kinds
from mimo_jax.planning.steps import qkv_rows
from pallas_kernels.attention.reference import QUERY_BLOCK
from pallas_kernels.moe.reference import GATHER_PAIRS, TILE_BYTES
from sharding import plan


@dataclasses.dataclass(frozen=True)
class Cache:
    """The key/value cache; bytes on each device, but for `once`.

    Attributes:
      dtype: of keys and values.
      rings: bytes of a row of the batch whatever the context: what sliding layers hold.
      per_token: bytes of a row's further token: what full layers hold.
      once: the same two, unsplit.
      ways: into how many parts the batch is split, whose rows are so many times fewer a device.
    """

    dtype: str
    rings: int
    per_token: int
    once: tuple[int, int]
    ways: int

    @classmethod
    def of(cls, config: MiMoConfig, placement: Placement, dtype: str) -> Cache:
        """The cache of a model on a mesh.

        Raises:
          ShardingError: the mesh does not divide it.
        """
        ways = placement.batch_ways
        step = placement.rules.ways("slot", placement.mesh)
        rings, tokens = [0, 0], [0, 0]  # on a device, in all
        for (shape, per_token), count in _cache_arrays(config, dtype).items():
            slots = step if per_token else shape[1]
            array = jax.ShapeDtypeStruct((ways, slots, *shape[2:]), jnp.dtype(dtype))
            sharding = placement.sharding("cache", CACHE_AXES, array.shape)
            for i, nbytes in enumerate(plan.array_bytes(array, sharding)):
                (tokens if per_token else rings)[i] += count * nbytes
        once = (rings[1] // ways, tokens[1] // ways // step)
        return cls(dtype, rings[0], tokens[0] // step, once, ways)

    def per_device(self, batch: int, context: int) -> int:
        """Bytes on each device for a batch, a multiple of `ways`."""
        return batch // self.ways * self.per_sequence(context)

    def per_sequence(self, context: int) -> int:
        """Bytes of one row, on a device that holds it."""
        return self.rings + context * self.per_token


@functools.lru_cache(maxsize=8)
def _cache_arrays(
    config: MiMoConfig, dtype: str
) -> collections.Counter[tuple[tuple[int, ...], bool]]:
    """How many arrays a cache has of each shape for one row and one position, and whether they
    have a slot for each further position."""
    shapes = [
        jax.tree.leaves(jax.eval_shape(lambda n=n: init_cache(config, 1, n, dtype))) for n in (1, 2)
    ]
    return collections.Counter(
        (one.shape, two.shape != one.shape) for one, two in zip(*shapes, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class Workspace:
    """Temporary memory of the largest program on each device, bytes.

    Attributes:
      parts: what it is for.
      estimated: it was not given but worked out.
    """

    parts: tuple[tuple[str, int], ...]
    estimated: bool

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(n for _, n in self.parts)


def workspace(
    config: MiMoConfig,
    placement: Placement,
    placed: Sequence[Placed],
    cache: Cache,
    *,
    batch: int,
    context: int,
    prompt: int,
) -> Workspace:
    """An estimate of what the plain XLA path needs besides weights and cache.

    What lives throughout:

    - activations: the residual stream, thrice, and a layer's fused queries, keys and values, in
      float32 and in the model's dtype;
    - keys and values of one full layer, which XLA copies;

    and the largest of what takes turns:

    - linear: two quantised matrices, dequantised;
    - attention: scores of a full layer, in float32 and in the model's dtype, of QUERY_BLOCK queries
      at a time;
    - experts: more than GATHER_PAIRS (token, expert) pairs are sorted into tiles, which makes about
      twice as many rows and 8 more an expert; five copies of these, and TILE_BYTES of weights;
    - logits: two copies in float32, of one token a row.

    Of what XLA (jax 0.11.2) allocates for an H100 in twelve programs (4 layers of Pro and of Flash,
    1 to 64 rows, prompts of 1 to 4096, one to eight devices) it is between 89% and 208%: most too
    large for a single token, where nothing but one matrix is live.  XLA for TPUs copies whole
    stacks of experts besides, which is not in it.

    Args:
      config, placement, placed, cache: of the model.
      batch: rows.
      context: cache slots of a full layer.
      prompt: tokens of a prompt, which are run at once.
    """
    rules, mesh = placement.rules, placement.mesh
    itemsize = jnp.dtype(config.dtype).itemsize
    rows = batch // cache.ways
    tokens = rows * prompt
    kv_ways = rules.ways("kv_heads", mesh)
    head_ways = kv_ways * rules.ways("group", mesh)
    kinds = layer_kinds(config)
    qkv = max(map(qkv_rows, kinds)) // kv_ways
    full = {s: count for s, count in kinds.items() if s.window is None}
    heads = max((s.num_heads for s in full), default=0) // head_ways
    scores = rows * min(prompt, QUERY_BLOCK) * context * heads
    stream = tokens * (3 * config.hidden_size * itemsize + qkv * (4 + itemsize))
    phases = {
        "linear": 2 * itemsize * max(p.dequantized for p in placed if p.group != "experts"),
        "attention": scores * (4 + itemsize),
        "experts": _experts(config, placement, tokens, itemsize),
        "logits": 2 * 4 * rows * config.vocab_size // rules.ways("vocab", mesh),
    }
    phase = max(phases, key=phases.__getitem__)
    copied = rows * context * cache.per_token // max(1, sum(full.values()))
    parts = (("activations", stream), ("copy of a layer's cache", copied), (phase, phases[phase]))
    return Workspace(parts, estimated=True)


def _experts(config: MiMoConfig, placement: Placement, tokens: int, itemsize: int) -> int:
    """Bytes of the experts' part of a workspace, for the tokens of one device."""
    rules, mesh = placement.rules, placement.mesh
    if not config.n_routed_experts:
        return 0
    travel = [a for a in rules["expert"] if a in rules["batch"]]
    for axis in travel:
        tokens *= mesh.shape[axis]  # a block of rows from every device that tokens come from
    pairs = tokens * config.num_experts_per_tok
    if pairs <= GATHER_PAIRS:
        return 0
    experts = config.n_routed_experts // rules.ways("expert", mesh)
    return 5 * (2 * pairs + 8 * experts) * config.hidden_size * itemsize + TILE_BYTES
