"""Exchange of rows between devices, on eight fake CPU devices."""

import dataclasses
import functools
import itertools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from sharding import hlo
from sharding.collectives import combine, dispatch, prefers_ragged, supports_ragged

FORMS = pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])


@dataclasses.dataclass(frozen=True)
class Case:
    """A mesh, all of whose devices hold tokens, and the axis that they exchange over."""

    shape: tuple[int, ...]
    names: tuple[str, ...]
    axis: str | tuple[str, ...]

    @property
    def devices(self) -> int:
        return math.prod(self.shape)

    @property
    def n(self) -> int:
        return len(self.groups()[0])

    def mesh(self) -> jax.sharding.Mesh:
        types, devices = (AxisType.Explicit,) * len(self.shape), jax.devices()[: self.devices]
        return jax.make_mesh(self.shape, self.names, axis_types=types, devices=devices)

    def groups(self) -> list[list[int]]:
        """The devices that exchange with each other, in the order of the axis."""
        axes = (self.axis,) if isinstance(self.axis, str) else self.axis
        grid = np.arange(self.devices).reshape(self.shape)
        inner = [self.names.index(name) for name in axes]
        outer = [i for i in range(len(self.shape)) if i not in inner]
        size = math.prod(self.shape[i] for i in inner)
        return grid.transpose(*outer, *inner).reshape(-1, size).tolist()


CASES = {
    "one device": Case((1,), ("expert",), "expert"),
    "four": Case((4,), ("expert",), "expert"),
    "eight": Case((8,), ("expert",), "expert"),
    "one axis of two": Case((2, 4), ("data", "expert"), "expert"),
    "both, inner first": Case((2, 4), ("data", "expert"), ("expert", "data")),
    "two axes of three": Case((2, 2, 2), ("data", "expert", "tensor"), ("data", "tensor")),
}
FOUR = CASES["four"]
ALL_CASES = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def ragged_stand_in(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """What the docstring of jax.lax.ragged_all_to_all says, which XLA:CPU cannot do.

    A receiver that expects another size than was sent gets rows of 127.
    """
    me = jax.lax.axis_index(axis_name)
    everything = (operand, input_offsets, send_sizes, output_offsets)
    operands, starts, sizes, targets = (jax.lax.all_gather(a, axis_name) for a in everything)
    rows = jnp.arange(output.shape[0])
    at = rows - targets[:, me, None]
    written = (at >= 0) & (at < recv_sizes[:, None])
    source = written.argmax(axis=0)
    sent = operands[source, starts[source, me] + at[source, rows]]
    each_row = (-1, *[1] * (operand.ndim - 1))
    agreed = (sizes[source, me] == recv_sizes[source]).reshape(each_row)
    sent = jnp.where(agreed, sent, jnp.iinfo(jnp.int8).max)
    return jnp.where(written.any(axis=0).reshape(each_row), sent, output)


# While a program is traced in this context, the ragged exchange is one that CPUs have.
emulated = mock.patch.object(jax.lax, "ragged_all_to_all", ragged_stand_in)


@functools.cache
def exchange(case: Case, ragged: bool):
    """A program of all devices: dispatch, times 2, combine; and what was received between."""

    def local(x, ids, wanted):
        with emulated:
            (rows, rid), valid, route = dispatch((x, ids), wanted, case.axis, ragged=ragged)
            # Rows that aren't valid must not matter.
            y = jnp.where(valid[:, None], 2 * rows, jnp.nan)
            return rows, rid, valid, combine(y, route)

    return spread(case, local)


def spread(case: Case, local):
    """A program that calls `local` on each device."""
    return jax.jit(jax.shard_map(local, out_specs=P(case.names)))


def run(case: Case, program, *trees):
    """Runs a program with the leading dimension of the arrays split over all devices."""
    with jax.set_mesh(case.mesh()):
        return jax.tree.map(np.asarray, program(*jax.device_put(trees, P(case.names))))


def expected(case: Case, x, ids, wanted):
    """What each device receives, and the sums, in numpy."""
    n, tokens = case.n, len(x) // case.devices
    rows = np.zeros((case.devices, n, tokens, 3), x.dtype)
    rid = np.zeros((case.devices, n, tokens), ids.dtype)
    valid = np.zeros((case.devices, n, tokens), bool)
    for group in case.groups():
        for (s, source), (d, target) in itertools.product(enumerate(group), repeat=2):
            token = source * tokens + np.arange(tokens)
            token = token[wanted[token, d]]
            rows[target, s, : len(token)] = x[token]
            rid[target, s, : len(token)] = ids[token]
            valid[target, s, : len(token)] = True
    y = 2 * x * wanted.sum(axis=1, keepdims=True)
    return rows.reshape(-1, 3), rid.reshape(-1), valid.reshape(-1), y


def check(case: Case, ragged: bool, wanted):
    rng = np.random.default_rng(0)
    # Small whole numbers, whose sums are exact; never zero, which is what rows not valid hold.
    x = rng.integers(1, 1000, (len(wanted), 3)).astype(np.float32)
    ids = rng.integers(1, 2**31 - 1, len(wanted)).astype(np.int32)
    got = run(case, exchange(case, ragged), x, ids, wanted)
    for mine, theirs in zip(got, expected(case, x, ids, wanted)):
        np.testing.assert_array_equal(mine, theirs)
    return got


@ALL_CASES
@FORMS
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), density=st.sampled_from([0.0, 0.1, 0.5, 0.9]))
def test_rows_arrive_and_return(case, ragged, seed, density):
    wanted = np.random.default_rng(seed).random((3 * case.devices, case.n)) < density
    check(case, ragged, wanted)


@pytest.mark.parametrize("tokens", [1, 7])
@FORMS
def test_any_number_of_tokens(tokens, ragged):
    check(FOUR, ragged, np.random.default_rng(tokens).random((tokens * 4, 4)) < 0.5)


@ALL_CASES
@FORMS
@pytest.mark.parametrize(
    "devices",
    [slice(None), 0, -1, []],
    ids=["everywhere", "to the first", "to the last", "nowhere"],
)
def test_nothing_is_dropped_in_the_worst_case(case, ragged, devices):
    wanted = np.zeros((3 * case.devices, case.n), bool)
    wanted[:, devices] = True
    _, _, valid, _ = check(case, ragged, wanted)
    assert valid.sum() == wanted.sum()


# A mixture of experts, spread over devices.

EXPERTS, WIDTH, TOP_K = 16, 8, 4
ROUTINGS = {
    "random": lambda rng, p: rng.permuted(np.tile(np.arange(EXPERTS), (p, 1)), axis=1)[:, :TOP_K],
    "to one device": lambda rng, p: np.tile(np.arange(TOP_K), (p, 1)),
    "to all devices": lambda rng, p: np.tile(np.arange(TOP_K) * EXPERTS // TOP_K, (p, 1)),
    "some nowhere": lambda rng, p: rng.integers(-EXPERTS, EXPERTS, (p, TOP_K)),
    "all nowhere": lambda rng, p: np.full((p, TOP_K), -1),
}


def experts(x, weights, chosen, stack, first):
    """Sum of the chosen experts that are in the stack, the first of which has index `first`."""
    index = first + jnp.arange(len(stack))
    mixing = (weights[..., None] * (chosen[..., None] == index)).sum(axis=1)
    return jnp.einsum("pe,pd,edf->pf", mixing, x, stack, precision="highest")


@functools.cache
def expert_parallel(case: Case, ragged: bool):
    def local(x, weights, chosen, stack):
        first = jax.lax.axis_index(case.axis) * len(stack)
        device = jnp.where(chosen >= 0, chosen // len(stack), -1)
        wanted = (device[..., None] == jnp.arange(case.n)).any(axis=1)
        with emulated:
            tree, valid, route = dispatch((x, weights, chosen), wanted, case.axis, ragged=ragged)
            y = experts(tree[0], tree[1], tree[2], stack, first)
            return combine(jnp.where(valid[:, None], y, jnp.nan), route)

    specs = P(case.names), P(case.names), P(case.names), P(case.axis)
    return jax.jit(jax.shard_map(local, in_specs=specs, out_specs=P(case.names)))


@ALL_CASES
@FORMS
@pytest.mark.parametrize("routing", ROUTINGS)
def test_expert_parallel_equals_one_device(case, ragged, routing):
    rng = np.random.default_rng(1)
    p = 3 * case.devices
    x = rng.standard_normal((p, WIDTH), np.float32)
    weights = rng.random((p, TOP_K), np.float32)
    chosen = ROUTINGS[routing](rng, p).astype(np.int32)
    stack = rng.standard_normal((EXPERTS, WIDTH, WIDTH), np.float32)
    reference = np.asarray(experts(x, weights, chosen, stack, 0))
    with jax.set_mesh(case.mesh()):
        tokens = [jax.device_put(a, P(case.names)) for a in (x, weights, chosen)]
        stack = jax.device_put(stack, P(case.axis))
        y = np.asarray(expert_parallel(case, ragged)(*tokens, stack))
    assert np.abs(y - reference).max() <= 1e-5 * np.abs(reference).max()


@FORMS
def test_results_are_added_in_the_order_of_the_devices(ragged):
    case = CASES["eight"]
    rng = np.random.default_rng(2)
    x = rng.standard_normal((40, 3), np.float32)
    wanted = rng.random((40, 8)) < 0.6

    def local(x, wanted):
        with emulated:
            received, _, route = dispatch(x, wanted, case.axis, ragged=ragged)
            return combine(received * 2.0 ** jax.lax.axis_index(case.axis), route)

    y = run(case, spread(case, local), x, wanted)
    total = np.zeros_like(x)
    for device in range(8):
        total += np.where(wanted[:, [device]], x * np.float32(2**device), 0)
    assert y.tobytes() == total.tobytes()


def test_bfloat16_results_are_summed_in_float32():
    # 256 + 1 is 256 in bfloat16, 256 + 1 + 1 + 0 is 258.
    def local(x, wanted):
        received, _, route = dispatch(x, wanted, "expert", ragged=False)
        term = jnp.array([256, 1, 1, 0], jnp.bfloat16)[jax.lax.axis_index("expert")]
        return combine(received * term, route)

    x = np.ones((4, 2), ml_dtypes.bfloat16)
    y = run(FOUR, spread(FOUR, local), x, np.ones((4, 4), bool))
    assert y.dtype == ml_dtypes.bfloat16
    assert (y == 258).all()


@pytest.mark.parametrize(
    ("ragged", "narrowest"),
    [(False, "uint8"), (True, "uint8"), (False, "bfloat16"), (True, "float32")],
)
def test_every_bit_of_every_dtype_arrives(ragged, narrowest):
    tree = {
        "x": jnp.array([-0.0, 1e-45, jnp.nan, jnp.inf], jnp.float32)[:, None] * jnp.ones(3),
        "ids": jnp.array([[-1, 1], [2**31 - 1, 7], [0, 0], [5, -(2**31)]], jnp.int32),
    }
    if narrowest != "float32":
        tree["scalar"] = jnp.array([1, 2, -3, 1e-40], jnp.bfloat16)
        tree["cube"] = jnp.arange(4 * 2 * 3, dtype=jnp.int16).reshape(4, 2, 3)
    if narrowest == "uint8":
        tree["codes"] = jnp.array([[0x7F], [0x80], [1], [255]], jnp.uint8)
        tree["scales"] = jnp.array([[1.0], [0.5], [jnp.nan], [448]], jnp.float8_e4m3fn)
        tree["flags"] = jnp.array([True, False, True, False])

    def local(tree, wanted):
        with emulated:
            return dispatch(tree, wanted, "expert", ragged=ragged)[0]

    # Each device sends its token to the next one.
    received = run(FOUR, spread(FOUR, local), tree, np.roll(np.eye(4, dtype=bool), 1, axis=1))
    for name, leaf in tree.items():
        got = received[name].reshape(4, 4, *leaf.shape[1:])
        assert got.dtype == leaf.dtype
        for device in range(4):
            source = (device - 1) % 4
            assert got[device, source].tobytes() == np.asarray(leaf)[source].tobytes(), name
            assert not np.delete(got[device], source, axis=0).view(np.uint8).any(), name


def test_two_collectives_there_and_one_back():
    def local(tree, wanted):
        received, valid, route = dispatch(tree, wanted, "expert", ragged=False)
        return combine(received[0], route), valid

    tree = (jnp.ones((8, 5)), jnp.ones((8, 2)), jnp.ones((8, 2), jnp.int32))
    with jax.set_mesh(FOUR.mesh()):
        args = jax.device_put((tree, jnp.ones((8, 4), bool)), P("expert"))
        text = spread(FOUR, local).lower(*args).compile().as_text()
    assert text is not None
    totals = hlo.summarize(hlo.collectives(text))
    # 4 devices x 2 tokens x (5 + 2 + 2 numbers there, 5 back) x 4 bytes.
    assert totals == {"all-gather": (1, 4 * 4 * 4), "all-to-all": (2, 4 * 2 * (9 + 5) * 4)}


# The real ragged exchange.


def lowered(case: Case, platform: str) -> str:
    """The program for another platform: jax lowers it without its devices."""

    def local(x, wanted):
        received, _, route = dispatch(x, wanted, case.axis, ragged=True)
        return combine(received, route)

    kind = {"cuda": ("NVIDIA H100 80GB HBM3", "gpu"), "tpu": ("TPU v5 lite", "tpu")}[platform]
    types = (AxisType.Explicit,) * len(case.shape)
    device = AbstractDevice(device_kind=kind[0], num_cores=None, platform=kind[1])
    mesh = AbstractMesh(case.shape, case.names, types, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        sharding = jax.sharding.NamedSharding(mesh, P(case.names))
        x = jax.ShapeDtypeStruct((4 * case.devices, 6), jnp.bfloat16, sharding=sharding)
        wanted = jax.ShapeDtypeStruct((4 * case.devices, case.n), bool, sharding=sharding)
        traced = spread(case, local).trace(x, wanted)
        return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@ALL_CASES
def test_ragged_lowers_with_the_groups_of_the_axis(case, platform):
    text = lowered(case, platform)
    exchanges = [line for line in text.splitlines() if "@ragged_all_to_all" in line]
    assert len(exchanges) == 2
    # One group of one device is printed as a number.
    groups = f"replica_groups = dense<{case.groups() if case.n > 1 else 0}>"
    assert all(groups in line for line in exchanges)
    assert "all_to_all" not in text.replace("ragged_all_to_all", "")


def test_supports_ragged():
    assert all(supports_ragged(platform) for platform in ("gpu", "cuda", "rocm", "tpu"))
    assert not supports_ragged("cpu")
    assert not any(prefers_ragged(p) and not supports_ragged(p) for p in ("cpu", "gpu", "tpu"))

    def local(x, wanted):
        return dispatch(x, wanted, "expert", ragged=True)[0]

    # The day it is implemented, supports_ragged changes.
    with pytest.raises(jax.errors.JaxRuntimeError, match="UNIMPLEMENTED"):
        run(FOUR, spread(FOUR, local), np.ones((4, 2), np.float32), np.ones((4, 4), bool))


def test_the_stand_in_does_the_example_of_the_docstring():
    case = Case((2,), ("x",), "x")
    example = [
        ([1, 2, 2], [3, 4, 0]),  # operand
        ([0, 0, 0, 0], [0, 0, 0, 0]),  # output
        ([0, 1], [0, 1]),  # input_offsets
        ([1, 2], [1, 1]),  # send_sizes
        ([0, 0], [1, 2]),  # output_offsets
        ([1, 1], [2, 1]),  # recv_sizes
    ]
    local = functools.partial(ragged_stand_in, axis_name="x")
    result = run(case, spread(case, local), *map(np.concatenate, example))
    assert result.tolist() == [1, 3, 0, 0, 2, 2, 4, 0]


@pytest.fixture
def unchecked():
    """As without beartype, which refuses wrong shapes before the functions do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("x", "wanted", "message"),
    [
        ((8, 2), np.ones((8, 3), bool), r"wanted is bool\[2, 3\], but .* 'expert' has 4 devices"),
        ((8, 2), np.ones((8, 4), np.int32), r"wanted is int32\[2, 4\]"),
        ((8, 2), np.ones(8, bool), r"wanted is bool\[2\]"),
        ((12, 2), np.ones((8, 4), bool), r"Array \[0\]\['x'\] .* shape \[3, 2\], .* 2 tokens"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_dispatch_refuses_shapes_that_disagree(x, wanted, message):
    def local(x, wanted):
        return dispatch([{"x": x}], wanted, "expert", ragged=False)[0]

    with pytest.raises(ValueError, match=message):
        run(FOUR, spread(FOUR, local), np.ones(x, np.float32), wanted)


def test_combine_refuses_another_number_of_rows():
    def local(x, wanted):
        received, _, route = dispatch(x, wanted, "expert", ragged=False)
        return combine(received[:-1], route)

    with pytest.raises(ValueError, match="results for 7 rows, but dispatch returned 8"):
        run(FOUR, spread(FOUR, local), np.ones((8, 2), np.float32), np.ones((8, 4), bool))
