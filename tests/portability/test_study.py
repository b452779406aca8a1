"""A study as a whole: what it tries, in real processes, and the slices that models need."""

import math
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from mimo_jax.config import ConfigNotFoundError, MiMoConfig
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.cache import CACHE_AXES, init_cache
from mimo_jax.model.parameters import abstract, parameters
from mimo_jax.model.placement import Placement
from mimo_jax.portability import places, study
from mimo_jax.portability.jobs import AUTO, plan_jobs
from mimo_jax.portability.operations import operations
from mimo_jax.portability.places import PlaceError
from mimo_jax.portability.results import STAGES, Results
from mimo_jax.portability.slices import BATCHES, CONTEXTS, TOPOLOGIES, slices
from mimo_jax.portability.study import Options, run_study
from pallas_kernels import targets
from sharding.devices import find_device
from sharding.mesh import parse_mesh
from sharding.plan import abstract_mesh

TINY = "tiny-transformers-test"
RELEASES = ("MiMo-V2.6-Flash-RL", "MiMo-V2.5-Pro-FP4-DFlash")
needs_none = pytest.mark.skipif(
    targets.HOPPER.why_not_compile() is None or targets.V5E.why_not_compile() is None,
    reason="compilers are importable here",
)


def studied(tmp_path: Path, **options) -> Results:
    """A study in processes of its own; also what it keeps and says on the way."""
    said, kept = [], []

    def keep(results: Results) -> None:
        results.write(tmp_path)
        kept.append(len(Results.read(tmp_path).rows))

    def done(n: int, of: int, *_: object) -> None:
        said.append((n, of))

    results = run_study(Options(slices=False, **options), "the command", done, keep)
    count = len(results.rows)
    assert kept == list(range(1, count + 1))
    assert said == [(n, count) for n in kept]
    assert Results.read(tmp_path).rows == results.rows
    assert all(tuple(sorted(row.stages)) == tuple(sorted(STAGES)) for row in results)
    return results


def only(case: str, jobs: list) -> list:
    """The operations of that case, and all steps."""
    return [job for job in jobs if job.model or job.case == case]


def statuses(row) -> str:
    """Of all stages, "-" for those that weren't run."""
    return " ".join(row.stages[name].status.replace("not run", "-") for name in STAGES)


def test_what_a_cpu_can_do(tmp_path, monkeypatch):
    """Of an operation and a step: all of it."""
    monkeypatch.setattr(
        study, "plan_jobs", lambda *a, **k: only("half-block 5", plan_jobs(*a, **k))
    )
    results = studied(
        tmp_path, targets=("cpu",), operations=("quantized_matmul",), models=(TINY,), layers=1
    )
    (run,) = results.runs
    assert (run.command, run.devices) == ("the command", {})
    assert run.versions["jax"] == jax.__version__
    assert run.seconds > 0
    found = {(row.case, row.backend): row for row in results}
    assert len(found) == len(results.rows)
    row = found["half-block 5", "reference"]
    assert statuses(row) == "ok ok ok ok ok"
    assert row.speed is not None
    assert row.speed.seconds > 0
    assert row.speed.roofline_seconds is None
    for backend in ("triton interpreted", "mosaic_tpu interpreted"):
        row = found["half-block 5", backend]
        assert statuses(row) == "ok ok ok ok -"
        assert row.agreement is not None
        assert 0 < row.agreement.error < row.agreement.limit
    row = found["half-block 5", "mosaic_gpu interpreted"]
    assert statuses(row) == "refused - - - -"
    assert "no mosaic_gpu form" in row.stages["trace"].reason
    step = found[f"{TINY}, 1 of 2 layers: 1 x 1 tokens, context 64", AUTO]
    assert (step.subject, step.target, statuses(step)) == ("decode", "cpu", "ok ok ok ok ok")
    assert step.program is not None
    assert step.program.argument_bytes > 0
    assert step.program.usable_bytes is None
    assert step.agreement is not None
    assert step.agreement.error < step.agreement.limit


@needs_none
def test_without_compilers_all_but_compiling_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "plan_jobs", lambda *a, **k: only("4k x1", plan_jobs(*a, **k)))
    results = studied(
        tmp_path,
        targets=("hopper", "hopper:8", "v5e"),
        operations=("decode_attention",),
        models=(TINY,),
        layers=1,
    )
    found = {(row.subject, row.target, row.backend): row for row in results}
    for key in (
        *(("decode_attention", "hopper", backend) for backend in ("reference", "triton")),
        *(("decode_attention", "v5e", backend) for backend in ("reference", "mosaic_tpu")),
        *(("decode", target, AUTO) for target in ("hopper", "v5e")),
    ):
        row = found[key]
        assert statuses(row) == "ok ok - - -", (key, row)
        reason = row.stages["compile"].reason
        assert "`make compile`" in reason
        package = "jax-cuda13-plugin" if "hopper" in key else "libtpu"
        assert f"pip install --no-deps --target .compilers {package}" in reason
        assert row.program is None
    # Their topology is the compiler's to describe.
    eight = found["decode", "hopper:8", AUTO]
    assert (eight.devices, eight.mesh, statuses(eight)) == (8, "tensor=8", "- - - - -")
    assert "make compile" in eight.stages["trace"].reason
    for key in (
        ("decode_attention", "hopper", "mosaic_tpu"),
        ("decode_attention", "v5e", "triton"),
    ):
        assert statuses(found[key]) == "refused - - - -"
    assert ("decode_attention", "hopper:8", "reference") not in found


# What is tried.


def test_jobs_are_operations_once_a_kind_and_steps_everywhere():
    jobs = plan_jobs(
        *(["cpu", "hopper", "hopper:8", "here"], ["moe"], ["A", "B"], ["decode", "prefill"]),
        ["auto", "reference"],
        layers=2,
        present="h200",
    )
    assert len(set(jobs)) == len(jobs)
    tried = {(job.target, job.case) for job in jobs if not job.model}
    small = {o.case for o in operations() if o.subject == "moe" and o.small}
    large = {o.case for o in operations() if o.subject == "moe" and not o.small}
    assert tried == {
        *(("cpu", case) for case in small),
        *((target, case) for target in ("hopper", "here") for case in large),
    }
    steps = [(j.target, j.model, j.subject, j.backend) for j in jobs if j.model]
    assert len(steps) == len(set(steps)) == 4 * 2 * 2 * 2
    assert all(job.layers == (2 if job.model else 0) for job in jobs)
    assert {job.place.name for job in jobs} == {"cpu", "hopper", "hopper:8", "h200"}
    assert "moe small 5 on cpu, triton" in [job.text for job in jobs]
    assert "decode A on h200, auto" in [job.text for job in jobs]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"targets": ("cpu", "hoper")}, PlaceError, "there is no target 'hoper'"),
        ({"targets": ("hopper:9",)}, PlaceError, "whole machines"),
        ({"models": ("MiMo-V9",)}, ConfigNotFoundError, "did you mean .MiMo-V2.5"),
        ({"models": (TINY,), "layers": 3}, ValueError, "the model has 2"),
    ],
)
def test_nothing_is_run_for_what_there_is_not(options, error, said, monkeypatch):
    monkeypatch.setattr(study, "run_jobs", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(error, match=said):
        run_study(Options(**options), "", lambda *_: None, lambda _: None)


@pytest.mark.parametrize("name", ["here", " HERE "])
def test_here_without_an_accelerator(name, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(PlaceError, match="finds no accelerator on this machine"):
        run_study(Options(targets=(name,)), "", lambda *_: None, lambda _: None)
    monkeypatch.setenv("JAX_PLATFORMS", "no-such-platform")
    with pytest.raises(PlaceError, match=r"jax can't say .*no-such-platform"):
        run_study(Options(targets=(name,)), "", lambda *_: None, lambda _: None)


def test_here_with_one(monkeypatch):
    """Its jobs have processes of their own, one at a time, that may take it."""
    asked = subprocess.CompletedProcess([], 0, 'noise\n[{"NVIDIA H200": 2}, "h200"]\n', "")
    monkeypatch.setattr(study.subprocess, "run", lambda *_, **__: asked)
    runs = []

    def run_jobs(jobs, env, *, workers, timeout, done):
        runs.append(({job.target for job in jobs}, env.get("JAX_PLATFORMS"), workers, timeout))

    monkeypatch.setattr(study, "run_jobs", run_jobs)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    options = Options(targets=("Here", "cpu", "CPU"), models=(), slices=False, workers=3)
    results = run_study(options, "", lambda *_: None, lambda _: None)
    assert runs == [({"cpu"}, "cpu", 3, 600.0), ({"here"}, None, 1, 600.0)]
    assert results.runs[0].devices == {"NVIDIA H200": 2}


# Slices.


@pytest.fixture(scope="module", params=RELEASES)
def release(request):
    """A release's config, its parameters as shapes, and its slices.

    The last from a process without checks of types, with which hundreds of plans take a minute.
    """
    code = f"""
from mimo_jax.config import MiMoConfig
from mimo_jax.portability.results import Results
from mimo_jax.portability.slices import slices
name = {request.param!r}
print(Results((), (), tuple(slices(name, MiMoConfig.from_pretrained(name)))).to_json())
"""
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    config = MiMoConfig.from_pretrained(request.param)
    model = abstract(lambda make: MiMo(config, make), config.dtype, quantized=True)
    return config, [p for _, p in parameters(model)], Results.from_json(said).slices


def nbytes(array, sharding) -> int:
    """Of a device's part of an array."""
    return math.prod(sharding.shard_shape(array.shape)) * array.dtype.itemsize


def on_each_device(config: MiMoConfig, held: list, mesh: str) -> tuple[int, int]:
    """Bytes of weights, and of the cache at a context of 4096, by the shapes of their parts."""
    alike: dict = {}
    for p in held:
        alike.setdefault((p.spec.shape, p.spec.axes, p.spec.format), []).append(p)
    firsts = [p for p, *_ in alike.values()]
    specs = [(p.spec, p.spec.format) for p in firsts]
    where = Placement.fit(abstract_mesh(parse_mesh(mesh)), "latency", specs)
    weights = 0
    for p, *others in alike.values():
        value = p.get_value()
        parts = jax.tree.map(nbytes, value, where.shardings(p.spec, value))
        weights += sum(jax.tree.leaves(parts)) * (1 + len(others))
    cache = jax.tree.leaves(jax.eval_shape(lambda: init_cache(config, 1, 4096)))
    return weights, sum(nbytes(a, where.sharding("", CACHE_AXES, a.shape)) for a in cache)


def test_a_slice_holds_the_model_and_half_of_it_does_not(release):
    config, held, found = release
    assert [s.device for s in found] == list(TOPOLOGIES)
    whole, _ = on_each_device(config, held, "")
    parts = {mesh: on_each_device(config, held, mesh) for mesh in {s.mesh for s in found}}
    for s in found:
        assert s.reason == ""
        assert s.usable_bytes == find_device(s.device).usable.value
        weights, cache = parts[s.mesh]
        assert s.weight_bytes == weights
        assert weights + cache <= s.rooms[0].bytes <= s.usable_bytes
        if s.topology != TOPOLOGIES[s.device][0]:
            assert whole > s.devices / 2 * s.usable_bytes
    assert sum(s.topology != TOPOLOGIES[s.device][0] for s in found) > 4


def test_rooms_are_what_a_slice_has_left(release):
    _, _, found = release
    for s in found:
        sizes = {(room.batch, room.context): room.bytes for room in s.rooms}
        assert [*sizes] == [(b, c) for b in BATCHES for c in CONTEXTS]
        assert s.rooms[0].fits
        assert all(room.fits == (room.bytes <= s.usable_bytes) for room in s.rooms)
        assert all(n > s.weight_bytes for n in sizes.values())
        for b, c in sizes:
            assert b == 64 or sizes[b, c] < sizes[{1: 16, 16: 64}[b], c]
    assert any(not room.fits for s in found for room in s.rooms)


def test_a_model_that_no_slice_holds(monkeypatch):
    config = MiMoConfig.from_pretrained(RELEASES[1])
    monkeypatch.setitem(TOPOLOGIES, "v5e", ("2x2", "2x4"))
    (none,) = slices("Pro", config, ["v5e"])
    assert none.reason == "none up to 2x4 holds it at batch 1 and context 4096"
    assert (none.devices, none.topology, none.rooms) == (0, "", ())


def test_places_ask_jax_only_where_nothing_is_known(monkeypatch):
    monkeypatch.setattr(places.jax, "devices", lambda *_: pytest.fail("asked"))
    plan_jobs(["here"], ["moe"], ["A"], ["decode"], ["auto"], present="h200")
