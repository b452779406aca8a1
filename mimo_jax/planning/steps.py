"""What one device reads, computes and exchanges in a step."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax.numpy as jnp

from mimo_jax.config import LayerSpec, MiMoConfig
from mimo_jax.model.placement import Placement
from mimo_jax.planning.inventory import Placed, layer_kinds
from pallas_kernels.all_reduce.exchange import MAX_DEVICES, most_values
from sharding.devices import Device
from sharding.plan import Collective, Kind, Roofline, collective_seconds, roofline


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of all rows of a batch, on each device.

    Attributes:
      tokens: tokens of a row that are new.
      reads: (group, bytes) read from memory: weights once, of the embedding only the rows looked
        up, of the experts those expected, the cache up to the context or the window.
      once: bytes that one device would read, had it the whole batch and model.
      flops: FLOPs.
      experts: distinct experts expected in each MoE layer for the whole batch, if tokens choose
        independently and uniformly.
      local_experts: of those, the mean on a device (whole ones, or its part of their width).  The
        busiest device of a layer has more where devices hold different experts.
      collectives: what the layers exchange, without sampling.
      limits: the roofline; None where the device's speed is not known.
      exchange: estimated seconds of the collectives; None where not known.
    """

    tokens: int
    reads: tuple[tuple[str, float], ...]
    once: float
    flops: float
    experts: float
    local_experts: float
    collectives: tuple[Collective, ...]
    limits: Roofline | None
    exchange: float | None

    @property
    def read(self) -> float:
        """Bytes read."""
        return sum(n for _, n in self.reads)


@dataclasses.dataclass(frozen=True)
class Load:
    """How many tokens a step has, and where.

    Attributes:
      new: tokens of a row.
      first: position of the first of them.
      rows: rows of the batch on a device.
      routed: tokens that the experts of a device are chosen by: all of the batch, but for parts
        of it that have experts of their own.
      draft: whether the drafter runs as well.
      last_only: logits of each row's last token only.
    """

    new: int
    first: int
    rows: int
    routed: int
    draft: bool = False
    last_only: bool = False

    @property
    def tokens(self) -> int:
        """Tokens on a device."""
        return self.rows * self.new


def step(
    config: MiMoConfig,
    placement: Placement,
    placed: Sequence[Placed],
    whole: Sequence[Placed],
    device: Device,
    *,
    batch: int,
    new: int,
    context: int,
    dtype: str,
    draft: bool = False,
    last_only: bool = False,
) -> Step:
    """The step that fills the last `new` of `context` positions.

    Args:
      config, placement, placed: of the model.
      whole: the parameters on one device that holds everything.
      device: the kind.
      batch: rows, a multiple of what the mesh splits them into.
      new: tokens a row.
      context: positions that the cache has after it.
      dtype: of the cache.
      draft: a DFlash drafter made the tokens: its weights are read too, and the head once more.
      last_only: a prefill, which needs the logits of each row's last token only.
    """
    rules, mesh = placement.rules, placement.mesh
    # Parts of the batch that have experts of their own.
    apart = math.prod(mesh.shape[a] for a in rules["batch"] if a not in rules["expert"])
    routed = batch * new // apart
    rows = batch // placement.batch_ways
    load = Load(new, context - new, rows, routed, draft, last_only)
    alone = dataclasses.replace(load, rows=batch, routed=batch * new)
    itemsize = jnp.dtype(dtype).itemsize
    ways = rules.ways("kv_heads", mesh) * rules.ways("slot", mesh)
    reads: dict[str, float] = {}
    for group, nbytes in _weights_read(config, placed, load):
        reads[group] = reads.get(group, 0) + nbytes
    reads["KV cache"] = _kv(config, load) * itemsize / ways
    once = sum(n for _, n in _weights_read(config, whole, alone)) + _kv(config, alone) * itemsize
    flops = _weight_flops(config, placed, load) + _attention_flops(config, load) / (
        ways * rules.ways("group", mesh)
    )
    direct = device.direct_latency is not None and config.dtype == "bfloat16"
    exchanged = tuple(collectives(config, placement, load.tokens, direct=direct))
    distinct = config.n_routed_experts * _chosen(config, batch * new)
    local = config.n_routed_experts / rules.ways("expert", mesh) * _chosen(config, routed)
    return Step(
        new,
        tuple(reads.items()),
        once,
        flops,
        distinct,
        local,
        exchanged,
        roofline(sum(reads.values()), flops, device),
        collective_seconds(exchanged, device, mesh.size),
    )


def _chosen(config: MiMoConfig, tokens: int) -> float:
    """Expected part of the experts that some of these tokens choose: 1 - (1 - k/E)^n."""
    if not config.n_routed_experts:
        return 0.0
    return 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** tokens


def _weights_read(
    config: MiMoConfig, placed: Sequence[Placed], load: Load
) -> Iterator[tuple[str, float]]:
    for p in placed:
        if p.group == "embedding":
            yield p.group, p.per_device * min(1.0, load.tokens / config.vocab_size)
        elif p.group == "experts":
            yield p.group, p.per_device * _chosen(config, load.routed)
        elif p.group == "drafter":
            yield p.group, float(p.per_device * load.draft)
        elif p.group == "head":
            yield p.group, float(p.per_device * (1 + load.draft))
        elif p.group != "MTP":
            yield p.group, float(p.per_device)


def _weight_flops(config: MiMoConfig, placed: Sequence[Placed], load: Load) -> float:
    """Two FLOPs a weight and token that meet."""
    total = 0.0
    for p in placed:
        if p.group == "experts":
            part = config.num_experts_per_tok / config.n_routed_experts
            total += p.weights * part * load.routed
        elif p.group == "drafter":
            total += p.weights * load.tokens * load.draft
        elif p.group == "head":
            total += p.weights * load.rows * (1 if load.last_only else load.new) * (1 + load.draft)
        elif p.group not in ("embedding", "MTP"):
            total += p.weights * load.tokens
    return 2 * total


def _kv(config: MiMoConfig, load: Load) -> int:
    """Elements of keys and values that a step of these rows has to read."""
    total = 0
    for s, count in layer_kinds(config).items():
        end = load.first + load.new
        keys = end if s.window is None else min(end, s.window + load.new - 1)
        total += count * keys * s.num_kv_heads * (s.head_dim + s.v_head_dim)
    return total * load.rows


def _attention_flops(config: MiMoConfig, load: Load) -> float:
    """Two FLOPs for each element of a key and of a value that a query head sees."""
    total = 0
    for s, count in layer_kinds(config).items():
        pairs = visible_pairs(load.first, load.new, s.window)
        total += count * pairs * s.num_heads * (s.head_dim + s.v_head_dim)
    return 2.0 * total * load.rows


def qkv_rows(layer: LayerSpec) -> int:
    """Rows of a layer's fused projection to queries, keys and values."""
    keys_and_values = layer.num_kv_heads * (layer.head_dim + layer.v_head_dim)
    return layer.num_heads * layer.head_dim + keys_and_values


def visible_pairs(first: int, new: int, window: int | None) -> int:
    """(query, key) pairs of `new` queries from position `first` on: each sees the keys up to its
    own position, the last `window` of them."""

    def up_to(positions: int) -> int:
        inside = positions if window is None else min(positions, window)
        return inside * (inside + 1) // 2 + (positions - inside) * (window or 0)

    return up_to(first + new) - up_to(first)


def collectives(
    config: MiMoConfig, placement: Placement, tokens: int, *, direct: bool = False
) -> Iterator[Collective]:
    """The collectives of the layers and the embedding, for the tokens that each device has.

    Sums are float32 (`layers.contract`), the rest in the model's dtype, as in what XLA compiles for
    GPUs (for TPUs, sums are bfloat16).  The drafter's own are not counted.

    Args:
      config, placement: of the model.
      tokens: on a device.
      direct: few tokens are added up by a kernel through the memory of other devices.
    """
    rules, shape = placement.rules, placement.mesh.shape
    itemsize, d = jnp.dtype(config.dtype).itemsize, config.hidden_size
    layers, fused = config.num_hidden_layers, collections.Counter[int]()
    for spec, count in layer_kinds(config).items():
        fused[qkv_rows(spec)] += count
    moe = sum(count for spec, count in layer_kinds(config).items() if spec.moe)
    # Experts' mesh axes that split tokens as well: tokens travel along these.
    travel = [a for a in rules["expert"] if a in rules["batch"]]
    summed = [a for a in (*rules["expert"], *rules["expert_mlp"]) if a not in rules["batch"]]
    kv_heads = math.prod(shape[a] for a in rules["kv_heads"])
    heads = (*rules["kv_heads"], *rules["group"])
    stops = math.prod(shape[a] for a in travel)
    visits = stops * (1 - (1 - 1 / stops) ** config.num_experts_per_tok)

    def some(
        kind: Kind, count: int, nbytes: float | int, axes: Sequence[str], kernel: bool = False
    ) -> Iterator[Collective]:
        """A kernel's, if there is one and it has the axes of the attention's sums."""
        ways = math.prod(shape[a] for a in axes)
        if ways > 1 and count:
            through = {a for a in axes if shape[a] > 1} == {a for a in heads if shape[a] > 1}
            fits = ways <= MAX_DEVICES and tokens * d <= most_values(ways)
            yield Collective(kind, count, int(nbytes), ways, kernel and direct and through and fits)

    yield from some("all-gather", 1, tokens * d * itemsize, rules["features"])
    for rows, count in fused.items():
        part = tokens * rows * itemsize / kv_heads
        yield from some("all-gather", count, part, rules["qkv_row"])
    total = 4 * tokens * d
    yield from some("all-reduce", layers, total, heads, kernel=True)
    yield from some("all-reduce", layers - moe, total, rules["mlp"])
    yield from some("all-reduce", moe, total, summed, kernel=True)
    # How many rows each device sends to each; tokens with their experts and weights; the results.
    row = d * itemsize + 8 * config.num_experts_per_tok
    yield from some("all-gather", moe, 4 * stops**2, travel)
    yield from some("all-to-all", moe, tokens * visits * row, travel)
    yield from some("all-to-all", moe, tokens * visits * 4 * d, travel)
