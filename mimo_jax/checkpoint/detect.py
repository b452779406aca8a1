"""Finding out a checkpoint's layout from its scale rows, its index and its config (MODEL_SPEC 5).

Each decision is taken by the evidence that cannot lie first: names, then numbers of scale rows over
all layers, then the index's metadata, then what the releases do.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence

from mimo_jax.checkpoint.errors import Problem
from mimo_jax.checkpoint.files import TensorStore
from mimo_jax.checkpoint.layout import SINK, Layout, QKVLayout, ignored_modules
from mimo_jax.checkpoint.names import CODES, SCALE_SUFFIX, stacked_name, weight_shapes
from mimo_jax.checkpoint.qkv import aligned, fused_scale_rows, kv_scale_rows
from mimo_jax.config import MiMoConfig
from mimo_jax.model.backbone import release_formats
from mimo_jax.model.parameters import Format, ParamSpec, QKVRows
from mimo_jax.quant import MXFP4_BLOCK


def detect(
    store: TensorStore,
    config: MiMoConfig,
    specs: Sequence[ParamSpec],
    override: QKVLayout | None,
) -> tuple[Layout, list[Problem]]:
    """The layout of a checkpoint, with the reason of each decision.

    Args:
      store: its tensors.
      config: its config.json.
      specs: declarations of the parameters it should hold, QKV in one chunk.
      override: the caller's word on the order of QKV rows.

    Returns:
      The layout, and what makes it impossible.
    """
    names = store.names
    layout = Layout("plain", config.qkv_chunks)
    if any(n.endswith(".self_attn.sinks") for n in names):
        layout = dataclasses.replace(layout, sink_name="sinks").because(
            "sinks are called sinks, as in transformers' own names"
        )
    elif any(s.name.endswith(SINK) for s in specs):
        layout = layout.because(f"sinks are called {SINK}, as on the hub")
    experts = [s for s in specs if "{}" in s.name]
    if experts and any(stacked_name(s) in names for s in experts):
        layout = dataclasses.replace(layout, stacked_experts=True).because(
            "experts of a layer are stacked in one tensor, as in transformers' own names"
        )
    layout = _qkv_names(layout, store, specs, override)
    layout = _formats(layout, store, config, specs)
    problems = []
    if layout.expert_format == "mxfp4":
        for spec in experts:
            if spec.shape[-1] % MXFP4_BLOCK:
                found, wanted = f"{spec.shape[-1]} columns", f"a multiple of {MXFP4_BLOCK} in MXFP4"
                problems.append(Problem("impossible layout", found, wanted, spec.name))
    if layout.qkv == "split":
        layout = _split(layout, store, config, specs)
    else:
        layout, more = _fused(layout, store, config, specs, override)
        problems += more
    return layout, problems


def _qkv_names(
    layout: Layout, store: TensorStore, specs: Sequence[ParamSpec], override: QKVLayout | None
) -> Layout:
    """Split or fused: by the names of the tensors."""
    qkv, names = [s.name for s in specs if s.qkv is not None], store.names
    fused = sum(name in names for name in qkv)
    split = sum(name.replace("qkv_proj", "q_proj") in names for name in qkv)
    if override is not None:
        return dataclasses.replace(layout, qkv=override).because(
            f"QKV: {override}, as the caller says ({fused} layers have qkv_proj, {split} q_proj)"
        )
    kind: QKVLayout = "plain" if fused > split else "split"
    return dataclasses.replace(layout, qkv=kind).because(
        f"QKV: {'fused' if fused > split else 'split'}, because {fused} layers have qkv_proj and "
        f"{split} have q_proj"
    )


def _formats(
    layout: Layout, store: TensorStore, config: MiMoConfig, specs: Sequence[ParamSpec]
) -> Layout:
    """Element formats: what most tensors of a kind have; a tie goes to what was announced."""
    ignored = ignored_modules(config)
    linear, experts = release_formats(config)
    saved = store.metadata.get("save_format")
    if saved == "mxfp4" and experts != "mxfp4":
        experts = "mxfp4"
        layout = layout.because('the index says save_format "mxfp4", config.json does not')
    for what, field, announced in (
        ("linear maps", "linear_format", linear),
        ("experts", "expert_format", experts),
    ):
        names = [
            name
            for spec in specs
            if spec.format != "plain" and ("{}" in spec.name) == (what == "experts")
            for name in weight_shapes(spec, layout)
            if name in store.tensors and name.removesuffix(".weight") not in ignored
        ]
        if not names:
            continue
        votes = collections.Counter(_format_of_dtype(store.tensors[n].dtype) for n in names)
        best, count = votes.most_common(1)[0]
        found = announced if votes[announced] == count else best
        reason = f"{what}: {found}, as are {count} of {len(names)} tensors"
        if found != announced:
            reason += f", although {announced} is announced"
        layout = dataclasses.replace(layout, **{field: found}).because(reason)
    return layout


def _format_of_dtype(dtype: str) -> Format:
    if dtype == CODES["fp8"]:
        return "fp8"
    return "mxfp4" if dtype == CODES["mxfp4"] else "plain"


def _fused(
    layout: Layout,
    store: TensorStore,
    config: MiMoConfig,
    specs: Sequence[ParamSpec],
    override: QKVLayout | None,
) -> tuple[Layout, list[Problem]]:
    """Order of the rows of fused QKV: interleaved in so many chunks, or plain (one chunk)."""
    possible = possible_chunks(config)
    tp, note = _tp_size(store, possible)
    layout = layout.because(*note)

    def decide(chunks: int, reason: str) -> tuple[Layout, list[Problem]]:
        kind: QKVLayout = "plain" if chunks == 1 else "interleaved"
        if override is None:
            decided = dataclasses.replace(layout, qkv=kind, chunks=chunks)
            return decided.because(f"QKV rows: {kind}, chunks: {chunks}, because {reason}"), []
        if override == "plain":
            return dataclasses.replace(layout, chunks=1), []
        chosen = max(chunks, tp or 1)
        return dataclasses.replace(layout, chunks=chosen if chosen > 1 else config.qkv_chunks), []

    layers = _scale_rows(store, specs, layout) if layout.linear_format == "fp8" else {}
    if not layers:
        if tp is not None:
            return decide(tp, f"the index's metadata has tp_size {tp} (no scales to tell from)")
        return decide(1, "weights have no scales and the index no tp_size to tell otherwise")
    fits = {
        chunks: sum(found == fused_scale_rows(total, chunks) for total, found in layers.values())
        for chunks in possible
    }
    most = max(fits.values())
    left = [chunks for chunks in possible if fits[chunks] == most]
    said = _said_by_rows(layers, left)
    if len(left) == 1:
        return decide(left[0], said)
    if tp in left:
        return decide(tp, f"{said}; the index's metadata has tp_size {tp}")
    if config.qkv_chunks in left:
        chunks = config.qkv_chunks
        return decide(chunks, f"{said}; releases interleave by num_key_value_heads = {chunks}")
    return decide(left[0], f"{said}, which is also the contiguous order")


def possible_chunks(config: MiMoConfig) -> list[int]:
    """Numbers of chunks that give each the same whole heads, in every kind of layer."""
    heads = [h for s in config.layers for h in (s.num_heads, s.num_kv_heads)]
    sliding = config.layer_spec(0, "sliding", moe=False)
    common = math.gcd(*heads, sliding.num_heads, sliding.num_kv_heads)
    return [n for n in range(1, common + 1) if common % n == 0]


def _tp_size(store: TensorStore, possible: Sequence[int]) -> tuple[int | None, list[str]]:
    """The metadata's tp_size if heads can be divided so, and a remark if they cannot."""
    raw = store.metadata.get("tp_size")
    if raw is None:
        return None, []
    if str(raw).isdigit() and int(str(raw)) in possible:
        return int(str(raw)), []
    return None, [f"tp_size {raw!r} of the metadata is not used: heads do not divide so"]


def _scale_rows(
    store: TensorStore, specs: Sequence[ParamSpec], layout: Layout
) -> dict[str, tuple[QKVRows, int]]:
    """Rows, and scale rows found, of each fused layer."""
    found = {}
    for spec in specs:
        scale = store.tensors.get(spec.name + SCALE_SUFFIX["fp8"])
        if spec.qkv is not None and scale is not None and scale.shape:
            found[spec.name] = (spec.qkv, scale.shape[0])
    return found


def _said_by_rows(layers: dict[str, tuple[QKVRows, int]], left: Sequence[int]) -> str:
    """What the numbers of scale rows tell, layer kind by layer kind."""
    kinds = collections.Counter(layers.values())
    parts = []
    for (total, found), n in kinds.items():
        options = ", ".join(f"{fused_scale_rows(total, c)} in {c}" for c in sorted({1, *left}))
        parts.append(f"{n} layers of {total.total} rows have {found} scale rows ({options})")
    return "; ".join(parts) + f"; chunks possible: {', '.join(map(str, left))}"


def _split(
    layout: Layout, store: TensorStore, config: MiMoConfig, specs: Sequence[ParamSpec]
) -> Layout:
    """Of split FP8 layers, whether K and V share scale blocks, and chunks that hold them."""
    if layout.linear_format != "fp8":
        return dataclasses.replace(layout, chunks=config.qkv_chunks)
    possible = possible_chunks(config)
    tp, note = _tp_size(store, possible)
    preferred = (tp, config.qkv_chunks, *reversed(possible))
    order = list(dict.fromkeys(c for c in preferred if c in possible))
    found = _kv_scale_rows(store, specs)

    def own(name: str) -> bool:
        total, rows = found[name]
        return rows == kv_scale_rows(total, 1, shared=False)

    def shares(name: str, chunks: int) -> bool:
        total, rows = found[name]
        return rows == kv_scale_rows(total, chunks, shared=True)

    votes = {c: sum(shares(n, c) and not own(n) for n in found) for c in order}
    chunks = max(order, key=votes.__getitem__)
    if not votes[chunks]:
        holding = [c for c in order if all(aligned(total, c) for total, _ in found.values())]
        return dataclasses.replace(layout, chunks=holding[0] if holding else chunks).because(
            *note,
            "K and V have scale blocks of their own, because each has ceil(rows / 128) scale rows",
        )
    shared = frozenset(
        n
        for n, (total, _) in found.items()
        if not aligned(total, chunks) and (shares(n, chunks) or not own(n))
    )
    total, rows = found[next(n for n in found if shares(n, chunks) and not own(n))]
    separate = kv_scale_rows(total, 1, shared=False)
    return dataclasses.replace(layout, chunks=chunks, shared_kv_scales=shared).because(
        *note,
        f"K and V share scale blocks in each of {chunks} parts of {len(shared)} layers, because "
        f"{total.k} key and {total.v} value rows have {rows[0]} and {rows[1]} scale rows, which "
        f"would be {separate[0]} and {separate[1]} if they did not",
    )


def _kv_scale_rows(
    store: TensorStore, specs: Sequence[ParamSpec]
) -> dict[str, tuple[QKVRows, tuple[int, int]]]:
    """Rows, and scale rows found with K and V, of each split layer."""
    found = {}
    for spec in specs:
        if spec.qkv is None:
            continue
        scales = [
            store.tensors.get(spec.name.replace("qkv_proj", p) + SCALE_SUFFIX["fp8"])
            for p in ("k_proj", "v_proj")
        ]
        rows = [s.shape[0] for s in scales if s is not None and s.shape]
        if len(rows) == 2:
            found[spec.name] = (spec.qkv, (rows[0], rows[1]))
    return found
