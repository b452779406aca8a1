"""A plan in words and as data."""

from __future__ import annotations

import collections
import dataclasses
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mimo_jax.planning.steps import Step
from sharding.memory import GIB
from sharding.mesh import describe
from sharding.plan import gib, split, table

if TYPE_CHECKING:
    from mimo_jax.planning.plan import Plan


def verdict(plan: Plan) -> str:
    """A sentence on whether a plan fits."""
    needed, usable = plan.memory.needed / GIB, plan.memory.usable / GIB
    if plan.fits:
        left = plan.memory.left / GIB
        return f"fits: needs {needed:.1f} of {usable:.1f} GiB a device, {left:.1f} GiB are left"
    advice = (
        "no larger mesh was found; reduce batch, context or prompt, or take larger devices"
        if plan.suggestion is None
        else f"try mesh {plan.suggestion}"
    )
    return f"does not fit: needs {needed:.1f} of {usable:.1f} GiB a device; {advice}"


def text(plan: Plan) -> str:
    """The whole plan in at most 80 columns."""
    parts = [_head(plan), _memory(plan), _room(plan), _steps(plan)]
    return "\n\n".join("\n".join(map(_wrapped, part)) for part in parts)


def _wrapped(line: str) -> str:
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.fill(line, 80, subsequent_indent=indent, replace_whitespace=False)


def _head(plan: Plan) -> Iterator[str]:
    plural = "s" if plan.devices > 1 else ""
    yield f"{plan.name} on {plan.devices} {plan.device.name}{plural}: {describe(plan.mesh)}"
    yield f"split: {plan.placement.rules}" if plan.devices > 1 else "nothing is split"
    yield f"batch {plan.batch}, context {plan.context:,}, cache in {plan.cache.dtype}"


def _memory(plan: Plan) -> Iterator[str]:
    rows = [("memory", "GiB a device", "part")]
    rows += [(f"  {g.name}", gib(g.per_device), split(g)) for g in plan.weights]
    notes = {"workspace": "estimate" if plan.workspace.estimated else "given"}
    rows += [(what, gib(n), notes.get(what, "")) for what, n in plan.memory.spent]
    yield from table(rows, "<><")
    yield verdict(plan)


def _room(plan: Plan) -> Iterator[str]:
    cache = plan.cache
    yield f"largest context at batch {plan.batch}: {plan.largest_context:,}"
    yield f"largest batch at context {plan.context:,}: {plan.largest_batch:,}"
    yield (
        f"a further token takes {cache.per_token / 2**10:,.1f} KiB a device, a further sequence "
        f"{cache.per_sequence(plan.context) / 2**20:,.1f} MiB"
    )


def _steps(plan: Plan) -> Iterator[str]:
    steps = _named(plan)
    rows = [("a step", *steps)]
    rows.append(("GB read a device", *(f"{s.read / 1e9:,.2f}" for s in steps.values())))
    rows.append(("GFLOPs a device", *(f"{s.flops / 1e9:,.1f}" for s in steps.values())))
    if plan.token.experts:
        rows.append(("distinct experts", *(f"{s.experts:.1f}" for s in steps.values())))
        rows.append(("  mean on a device", *(f"{s.local_experts:.1f}" for s in steps.values())))
    if plan.token.limits is not None:
        rows.append(("roofline ms", *(_ms(s.limits and s.limits.seconds) for s in steps.values())))
        rows.append(("  bound by", *(s.limits.bound if s.limits else "" for s in steps.values())))
        if plan.devices > 1:
            rows.append(("collectives ms *", *(_ms(s.exchange) for s in steps.values())))
    yield from table(rows, "<" + ">" * len(steps))
    yield from _rates(plan)
    yield from _notes(plan)


def _named(plan: Plan) -> dict[str, Step]:
    drafted = "draft + " if "drafter" in {g.name for g in plan.weights} else ""
    return {
        "1 token": plan.token,
        f"{drafted}verify {plan.verify.tokens}": plan.verify,
        f"prefill {plan.prefill.tokens:,}": plan.prefill,
    }


def rates(plan: Plan) -> dict[int, float]:
    """Roofline tokens a second of all rows, by tokens gained in a verify step."""
    found = {n: plan.tokens_per_second(float(n)) for n in range(1, plan.verify.tokens + 1)}
    return {n: rate for n, rate in found.items() if rate is not None}


def _rates(plan: Plan) -> Iterator[str]:
    if plan.token.limits is None:
        yield f"the speed of this {plan.device.name} is not known: no roofline"
        return
    yield f"roofline tokens/s: {plan.batch / plan.token.limits.seconds:,.0f}"
    if plan.verify.tokens > 1:
        yield "  by tokens gained a verify step:"
        yield "  " + "  ".join(f"{n}: {rate:,.0f}" for n, rate in rates(plan).items())


def _notes(plan: Plan) -> Iterator[str]:
    if plan.devices > 1:
        direct = sum(c.count for c in plan.token.collectives if c.direct)
        kernels = {"all-reduce": f" ({direct} kernels)"} if direct else {}
        some = [f"{n} {kind}{kernels.get(kind, '')}" for kind, n in counts(plan.token).items()]
        yield f"* estimate, not in the roofline: {', '.join(some) or 'none'}"
        if plan.token.exchange is None and plan.token.limits is not None:
            yield f"  not known: the mesh is more than the {plan.device.domain} that are connected"
    if plan.token.experts:
        yield "experts: expected, if tokens choose them independently and uniformly"
    if any(kind.startswith("NVIDIA") for kind in plan.device.kinds):
        # benchmarks/LOG.md: without it (--xla_gpu_autotune_level=0) a Flash peaks as planned.
        yield "not counted: XLA's autotuning while it compiles (3.3 GiB for Flash, measured)"
    if sources := plan.device.not_measured():
        by = {s: [k for k, v in sources.items() if v == s] for s in dict.fromkeys(sources.values())}
        yield "not measured: " + "; ".join(f"{', '.join(k)} ({s})" for s, k in by.items())


def counts(step: Step) -> dict[str, int]:
    """Collectives of a step by kind."""
    found = collections.Counter[str]()
    for c in step.collectives:
        found[c.kind] += c.count
    return dict(found)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:,.2f}"


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain data; bytes, FLOPs and seconds."""
    return {
        "model": plan.name,
        "device": dataclasses.asdict(plan.device),
        "mesh": dict(plan.mesh),
        "rules": {k: list(v) for k, v in plan.placement.rules.axes},
        "batch": plan.batch,
        "context": plan.context,
        "fits": plan.fits,
        "verdict": verdict(plan),
        "suggestion": plan.suggestion,
        "memory": {**dict(plan.memory.spent), "needed": plan.memory.needed}
        | {"usable": plan.memory.usable, "workspace_is_estimate": plan.workspace.estimated},
        "weights": {g.name: {"per_device": g.per_device, "once": g.once} for g in plan.weights},
        "cache": {
            "dtype": plan.cache.dtype,
            "bytes_per_token": plan.cache.per_token,
            "bytes_per_sequence": plan.cache.per_sequence(plan.context),
        },
        "workspace": dict(plan.workspace.parts),
        "largest_context": plan.largest_context,
        "largest_batch": plan.largest_batch,
        "steps": {
            "token": _step(plan.token),
            "verify": _step(plan.verify),
            "prefill": _step(plan.prefill),
        },
        "verify_tokens_per_second": rates(plan),
    }


def _step(step: Step) -> dict[str, Any]:
    limits = step.limits
    return {
        "tokens": step.tokens,
        "read": dict(step.reads),
        "read_once": step.once,
        "flops": step.flops,
        "distinct_experts": step.experts,
        "distinct_experts_per_device": step.local_experts,
        "memory_seconds": limits and limits.memory,
        "compute_seconds": limits and limits.compute,
        "collectives": [dataclasses.asdict(c) for c in step.collectives],
        "collective_seconds": step.exchange,
    }
