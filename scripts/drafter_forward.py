"""How drafters run over whole sequences while they are trained, and what is minimised.

`block_rows` is `DFlash.commit` and `DFlash.__call__` for many anchors of a sequence at once: the
same parameters and numbers, without a ring for every anchor.  MTP blocks without a cache are
trained as they are.  Everything of the backbone is a constant here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from mimo_jax.model.backbone import MiMo
from mimo_jax.model.cache import LayerCache
from mimo_jax.model.dflash import DFlash, DFlashAttention
from mimo_jax.model.layers import contract
from mimo_jax.model.mtp import MTP
from pallas_kernels.attention.reference import softmax
from pallas_kernels.einsum import einsum32
from pallas_kernels.rotate_and_store.reference import split


class Seen(NamedTuple):
    """A batch, and what the frozen backbone made of it.

    Attributes:
      tokens: the text.
      mask: which tokens are the backbone's own, so that their prediction counts.
      hidden: residual stream after the last layer, before the final norm.
      taps: residual streams after the drafter's target layers.
    """

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    hidden: Float[Array, "B T D"]
    taps: tuple[Float[Array, "B T D"], ...]


class Scores(NamedTuple):
    """Of predicted tokens: nats, divergence from the backbone's distribution, and if right."""

    nats: Float[Array, "*rows"]
    divergence: Float[Array, "*rows"]
    right: Bool[Array, "*rows"]


def observe(backbone: MiMo, tokens: Array, mask: Array, layers: Sequence[int], dtype: Any) -> Seen:
    """Runs the backbone over a batch; what drafters are given is of `dtype`."""
    names = [f"hidden.{i}" for i in layers]
    hidden, _, taps = backbone.hidden_states(tokens, taps=names)
    hidden, *tapped = (a.astype(dtype) for a in (hidden, *(taps[n] for n in names)))
    return jax.lax.stop_gradient(Seen(tokens, mask, hidden, tuple(tapped)))


def in_groups(f: Callable[..., Any], size: int, *arrays: Array) -> Any:
    """f of groups of the arrays' second axis, one after the other.

    The backward pass computes each group again, so that one group's logits and scores are all that
    is ever held.  A group is the greatest divisor of the axis that is not above `size`.
    """
    n = arrays[0].shape[1]
    groups = next(g for g in range(1, n + 1) if n % g == 0 and n // g <= max(1, size))

    def grouped(a: Array) -> Array:
        return jnp.moveaxis(a.reshape(a.shape[0], groups, n // groups, *a.shape[2:]), 1, 0)

    out = jax.lax.map(jax.checkpoint(lambda parts: f(*parts)), tuple(map(grouped, arrays)))

    def joined(a: Array) -> Array:
        return jnp.moveaxis(a, 0, 1).reshape(a.shape[1], n, *a.shape[3:])

    return jax.tree.map(joined, out)


def score(
    backbone: MiMo,
    x: Float[Array, "*rows D"],
    hidden: Float[Array, "*rows D"],
    targets: Int[Array, "*rows"],
    *,
    teach: bool,
) -> Scores:
    """Scores the tokens that a drafter predicts.

    Args:
      backbone: whose head they share.
      x: what the drafter gives the head.
      hidden: the backbone's stream at the rows that predict the same tokens.
      targets: these tokens.
      teach: whether the divergence KL(backbone | drafter) is wanted; zeros otherwise.
    """
    logits = backbone.head(x)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    right = logits.argmax(axis=-1) == targets
    if not teach:
        return Scores(nats, jnp.zeros_like(nats), right)
    wanted = jax.nn.log_softmax(jax.lax.stop_gradient(backbone.logits(hidden)))
    distance = wanted - jax.nn.log_softmax(logits)
    return Scores(nats, (jnp.exp(wanted) * distance).sum(axis=-1), right)


def summary(
    scores: Scores,
    counted: Bool[Array, "B rows n"],
    weights: Float[Array, " n"],
    distill: float,
) -> tuple[Array, dict[str, Array]]:
    """The loss, and how well n proposals in a row are predicted.

    Args:
      scores: of n proposals, at each of the rows.
      counted: which of them count.
      weights: of the first to the n-th proposal.
      distill: part of the divergence in the loss, beside the cross-entropy.

    Returns:
      Nats a token, and `match`: how many of the first, second, ... proposals are the text's own;
      `length`: tokens a round if the text is what the backbone would produce (1 + those before the
      first wrong one), over the rows whose proposals all count.
    """
    w = weights * counted
    each = (1 - distill) * scores.nats + distill * scores.divergence
    loss = (w * each).sum() / jnp.maximum(w.sum(), 1e-6)
    matched = (scores.right & counted).sum(axis=(0, 1)) / jnp.maximum(counted.sum(axis=(0, 1)), 1)
    whole = counted.all(axis=-1)
    kept = jnp.cumprod(scores.right.astype(jnp.int32), axis=-1).sum(axis=-1)
    length = 1 + (kept * whole).sum() / jnp.maximum(whole.sum(), 1)
    nats = (w * scores.nats).sum() / jnp.maximum(w.sum(), 1e-6)
    return loss, {"loss": loss, "nats": nats, "match": matched, "length": length}


def mtp_loss(
    module: MTP, backbone: MiMo, seen: Seen, *, distill: float, group: int
) -> tuple[Array, dict[str, Array]]:
    """All blocks at all rows: block k at row j predicts token j + k + 2 (MODEL_SPEC 3.3).

    Args:
      module: the blocks, dense.
      backbone: for embedding and head.
      seen: the batch.
      distill: as in `summary`.
      group: rows of each sequence whose logits are held at a time.
    """
    B, T = seen.tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    each, counted = [], []
    for k, block in enumerate(module.layers):

        def run(hidden: Array, embedded: Array, block: Any = block) -> Array:
            return block(hidden, embedded, positions, None)[0]

        read = backbone.embed(jnp.roll(seen.tokens, -(k + 1), axis=1)).astype(seen.hidden.dtype)
        x = jax.checkpoint(run)(seen.hidden, read)
        teacher, targets = (
            jnp.roll(a, -n, axis=1) for a, n in ((seen.hidden, k + 1), (seen.tokens, k + 2))
        )
        there = jnp.arange(T) + k + 2 < T
        counted.append(there & jnp.roll(seen.mask, -(k + 2), axis=1))

        def scored(x: Array, hidden: Array, targets: Array) -> Scores:
            return score(backbone, x, hidden, targets, teach=distill > 0)

        each.append(in_groups(scored, group, x, teacher, targets))
    scores = jax.tree.map(lambda *a: jnp.stack(a, axis=-1), *each)
    return summary(scores, jnp.stack(counted, axis=-1), jnp.ones(len(each)), distill)


def sample_anchors(
    key: Array, mask: Bool[Array, "B T"], count: int
) -> tuple[Int[Array, "B A"], Bool[Array, "B A"]]:
    """Different positions of tokens that count and are followed by one, and which are such.

    There are `count` of them, or T if that is fewer.
    """
    able = mask & jnp.roll(mask, -1, axis=1).at[:, -1].set(False)
    noise = jnp.where(able, jax.random.uniform(key, mask.shape), -1.0)
    order, anchors = jax.lax.top_k(noise, min(count, mask.shape[1]))
    return anchors, order >= 0


def context_rings(module: DFlash, taps: Sequence[Float[Array, "B T D"]]) -> tuple[LayerCache, ...]:
    """Each layer's context keys and values of all positions; position p is in slot p."""
    B, T, _ = taps[0].shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    return module.commit(module.features(taps), positions, empty_rings(module, taps[0], T))


def empty_rings(module: DFlash, like: Float[Array, "B T D"], slots: int) -> list[LayerCache]:
    """A ring of so many slots for each of the drafter's layers, in the dtype of its input."""
    c = module.config
    k, v = (
        jnp.zeros((like.shape[0], slots, c.num_key_value_heads, width), like.dtype)
        for width in (c.head_dim, c.v_head_dim)
    )
    return [LayerCache(k, v)] * c.num_hidden_layers


def block_rows(
    module: DFlash,
    embedded: Float[Array, "B A D"],
    anchors: Int[Array, "B A"],
    context: Sequence[LayerCache],
) -> Float[Array, "B A block D"]:
    """What the head is given for the blocks of many anchors.

    Args:
      module: the drafter.
      embedded: embeddings of the tokens at the anchors.
      anchors: their positions.
      context: of `context_rings`; a block sees the positions before its anchor, and itself.
    """
    B, D = embedded.shape[0], embedded.shape[-1]
    offset = jnp.arange(module.config.block_size)
    mask = module.mask_embedding[...].astype(embedded.dtype)
    x = jnp.where(offset[:, None] == 0, embedded[:, :, None], mask)
    shape, x = x.shape, x.reshape(B, -1, D)
    positions = (anchors[..., None] + offset).reshape(B, -1)
    for layer, ring in zip(module.layers, context, strict=True):
        x = x + _attend(layer.self_attn, layer.input_layernorm(x), positions, anchors, ring)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return module.norm(x).reshape(shape)


def _attend(
    attention: DFlashAttention,
    x: Float[Array, "B rows D"],
    positions: Int[Array, "B rows"],
    anchors: Int[Array, "B A"],
    context: LayerCache,
) -> Float[Array, "B rows D"]:
    """A drafter layer's attention of the blocks' rows, A blocks one after the other."""
    (B, R, _), A = x.shape, anchors.shape[1]
    heads = attention.heads
    q, k, v = split(attention.projected(x), positions, heads)

    slots = jnp.arange(context.k.shape[1])
    before = slots < jnp.repeat(anchors, R // A, axis=1)[..., None]
    seen = before & (slots > positions[..., None] - attention.window)
    of_context = einsum32("brkgh,bskh->bkgrs", q, context.k)
    of_context = jnp.where(seen[:, None, None], of_context, -jnp.inf)
    own_q, own_k, own_v = (a.reshape(B, A, R // A, *a.shape[2:]) for a in (q, k, v))
    of_block = einsum32("bankgh,bamkh->bkganm", own_q, own_k)
    of_block = of_block.reshape(*of_block.shape[:3], R, -1)
    scores = jnp.concatenate([of_context, of_block], axis=-1) * heads.head**-0.5
    sink = None if attention.sink is None else attention.sink[...]
    weights = softmax(scores, sink).astype(v.dtype)
    to_context, to_block = jnp.split(weights, [slots.size], axis=-1)
    to_block = to_block.reshape(*to_block.shape[:3], A, R // A, -1)
    out = einsum32("bkgrs,bskv->brkgv", to_context, context.v)
    out = out + einsum32("bkganm,bamkv->bankgv", to_block, own_v).reshape(out.shape)
    out = out.reshape(*out.shape[:3], -1).astype(x.dtype)
    return contract("btkf,dkf->btd", out, attention.o_proj[...].astype(x.dtype)).astype(x.dtype)


def dflash_loss(
    module: DFlash,
    backbone: MiMo,
    seen: Seen,
    key: Array,
    *,
    distill: float,
    anchors: int,
    gamma: float,
    group: int,
) -> tuple[Array, dict[str, Array]]:
    """Blocks at random anchors, their k-th token weighted by exp(-(k - 1) / gamma) (4.6).

    Args:
      module: the drafter.
      backbone: for embedding and head.
      seen: the batch.
      key: of the anchors.
      distill: as in `summary`.
      anchors: blocks a sequence.
      gamma: how slowly weights fall.
      group: blocks a sequence whose scores and logits are held at a time.
    """
    tokens, reach = seen.tokens, jnp.arange(1, module.config.block_size)
    at, valid = sample_anchors(key, seen.mask, anchors)
    context = context_rings(module, seen.taps)

    def rows_of(a: Array, at: Array) -> Array:
        return jax.vmap(lambda a, at: a[at])(a, at)

    def scored(at: Array) -> Scores:
        embedded = backbone.embed(rows_of(tokens, at)).astype(seen.hidden.dtype)
        x = block_rows(module, embedded, at, context)[:, :, 1:]
        ahead = jnp.minimum(at[..., None] + reach, tokens.shape[1] - 1)
        hidden = rows_of(seen.hidden, ahead - 1)
        return score(backbone, x, hidden, rows_of(tokens, ahead), teach=distill > 0)

    scores = in_groups(scored, group, at)
    ahead = at[..., None] + reach
    inside = ahead < tokens.shape[1]
    counted = valid[..., None] & inside & rows_of(seen.mask, jnp.where(inside, ahead, 0))
    return summary(scores, counted, jnp.exp(-(reach - 1) / gamma), distill)


def decoding_rows(
    module: DFlash,
    backbone: MiMo,
    tokens: Int[Array, "B T"],
    taps: Sequence[Float[Array, "B T D"]],
    anchor: int,
    slots: int,
) -> Float[Array, "B block D"]:
    """What `block_rows` must equal at one anchor: the drafter as decoding runs it.

    Args:
      module, backbone: drafter and backbone.
      tokens, taps: a batch, and the backbone's streams after the target layers.
      anchor: a position, the same one in all sequences.
      slots: of the rings.
    """
    B = tokens.shape[0]
    positions = jnp.broadcast_to(jnp.arange(anchor), (B, anchor))
    features = module.features([a[:, :anchor] for a in taps])
    rings = module.commit(features, positions, empty_rings(module, taps[0], slots))
    embedded = backbone.embed(tokens[:, anchor, None])[:, 0].astype(taps[0].dtype)
    return module(embedded, jnp.full(B, anchor), rings)[0]
