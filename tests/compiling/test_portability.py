"""What a study says of programs that were compiled for devices that aren't there."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from mimo_jax.config import MiMoConfig
from mimo_jax.planning import make_plan
from mimo_jax.portability.attempts import attempt
from mimo_jax.portability.jobs import Job, run_job
from mimo_jax.portability.places import HARDWARE, find_place
from mimo_jax.portability.results import STAGES, Row

pytestmark = pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
PRO = "MiMo-V2.5-Pro-FP4-DFlash"


def compiled(row: Row) -> Row:
    """A row that is compiled, and not run."""
    said = {name: row.stages[name] for name in STAGES}
    assert [s.status for s in said.values()] == ["ok"] * 3 + ["not run"] * 2, said
    assert all((said[name].seconds or 0) > 0 for name in STAGES[:3])
    return row


@pytest.mark.parametrize("target", HARDWARE)
def test_an_operation_on_each_kind_of_device(target):
    """A product of one row with 166 MB of weights: one kernel, which reads them in place."""
    backend = "triton" if target in ("hopper", "ampere", "blackwell") else "mosaic_tpu"
    row = compiled(run_job(Job("quantized_matmul", "pro-qkv 1", target, backend)))
    assert (row.target, row.devices, row.mesh, row.backend) == (target, 1, "", backend)
    program, weights = row.program, 8 * 3392 * 6144
    assert program is not None
    assert program.kernels == {backend: 1}
    # Codes, scales (that may be repeated for the kernel), and a row.
    assert weights < program.argument_bytes < 1.07 * weights
    assert 2 * 8 * 3392 <= program.output_bytes < 2**20
    assert program.alias_bytes == 0
    assert program.temp_bytes < 2**22
    assert program.spills == ()
    assert program.collectives == {}
    assert program.fits
    usable = {"hopper": 77, "ampere": 77, "v4": 30, "v5e": 15, "v5p": 95, "v6e": 31}
    assert program.usable_bytes is not None
    if target in usable:
        assert program.usable_bytes // 2**30 == usable[target]
    # GPUs' compilers don't say.
    assert (program.code_bytes is None) == (backend == "triton")


def test_mosaic_gpu_kernels_are_counted_with_their_registers():
    row = compiled(run_job(Job("moe", "pro 1", "hopper", "mosaic_gpu")))
    assert row.program is not None
    assert set(row.program.kernels) == {"mosaic_gpu"}
    assert row.program.registers
    assert all(16 <= n <= 255 for n in row.program.registers.values())


def test_the_reference_has_no_kernels():
    row = compiled(run_job(Job("decode_attention", "ring x1", "hopper", "reference")))
    assert row.program is not None
    assert row.program.kernels == {}
    assert row.program.fusions + row.program.library_calls > 0


@pytest.mark.parametrize("target", ["hopper:8", "v5e:4x8"])
def test_a_step_on_many_devices(target):
    """What each device is given is what the plan says that it holds."""
    row = compiled(run_job(Job("decode", "", target, "auto", PRO, layers=2)))
    place = find_place(target)
    assert (row.devices, row.mesh) == (place.devices, place.mesh)
    assert row.case == f"{PRO}, 2 of 70 layers: 1 x 1 tokens, context 4096"
    program, config = row.program, MiMoConfig.from_pretrained(PRO).truncated(2)
    assert program is not None
    assert place.device is not None
    plan = make_plan(config, device=place.device, mesh=place.mesh, batch=1, context=4096)
    spent = dict(plan.memory.spent)
    held = sum(n for what, n in spent.items() if what != "workspace")
    assert program.argument_bytes == pytest.approx(held, rel=0.01), spent
    # The cache is updated in place.
    cache = held - spent["weights"]
    assert program.alias_bytes == pytest.approx(cache, rel=0.01)
    kernels = {"hopper:8": {"mosaic_gpu", "triton"}, "v5e:4x8": {"mosaic_tpu"}}[target]
    assert set(program.kernels) <= kernels
    assert sum(program.kernels.values()) >= 4
    if target == "hopper:8":
        # Sums of a token's hidden state after two attentions and the experts are kernels; after a
        # dense layer's products it is XLA's, in bfloat16.
        assert program.kernels["mosaic_gpu"] == 3
        assert program.registers.keys() == {"all_reduce"}
        reduced = program.collectives["all-reduce"]
        assert (reduced.count, reduced.bytes) == (1, 2 * config.hidden_size)
        assert program.spills == ()


SQUARE = jax.ShapeDtypeStruct((128, 128), jnp.bfloat16)


def test_a_kernel_that_spills_is_compiled_and_named():
    def kernel(x_ref, out_ref):
        y = jnp.exp(x_ref[...].astype(jnp.float32))
        out_ref[...] = (y / y.sum()).astype(x_ref.dtype)

    def softmax(warps: int):
        params = plt.CompilerParams(num_warps=warps)
        call = pl.pallas_call(kernel, out_shape=SQUARE, compiler_params=params)
        return attempt(find_place("hopper"), jax.jit(call), (SQUARE,))

    stages, program = softmax(1)
    assert [stage.status for stage in stages.values()] == ["ok", "ok", "ok"]
    assert program is not None
    assert program.spills == ("a kernel spills registers",)
    assert program.kernels == {"triton": 1}
    _, few = softmax(8)
    assert few is not None
    assert few.spills == ()


def test_what_a_compiler_refuses_is_a_result():
    place = find_place("v5e")
    large = jax.ShapeDtypeStruct((2**17, 2**17), jnp.bfloat16)  # 32 GiB
    stages, program = attempt(place, jax.jit(lambda x: x + 1), (large,))
    assert program is None
    assert [stages[n].status for n in STAGES[:3]] == ["ok", "ok", "failed"]
    assert "memory" in stages["compile"].reason.lower()

    def raises(x):
        raise RuntimeError("no such thing")

    stages, program = attempt(place, jax.jit(raises), (SQUARE,))
    assert program is None
    assert stages["trace"].reason == "RuntimeError: no such thing"
    assert stages["lower"].status == stages["compile"].status == "not run"


def test_a_topology_that_there_is_not_is_a_row():
    row = run_job(Job("decode", "", "v5e:3x5", "auto", PRO, layers=1))
    assert set(row.stages) == set(STAGES)
    assert row.stages["trace"].status == "refused"
    assert row.stages["trace"].reason
