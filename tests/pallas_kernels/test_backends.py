import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import backends
from pallas_kernels.backends import BackendError, Implementation, Target, UnsupportedError

HOPPER = Target("cuda", "NVIDIA H100", 90)
AMPERE = Target("cuda", "NVIDIA A100", 80)
TURING = Target("cuda", "NVIDIA T4", 75)
BLACKWELL = Target("cuda", "NVIDIA B200", 100)
TPU = Target("tpu", "TPU v5 lite")
CPU = Target("cpu", "cpu")


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (HOPPER, ("mosaic_gpu", "triton", "reference")),
        (AMPERE, ("triton", "reference")),
        (BLACKWELL, ("triton", "reference")),
        (TURING, ("reference",)),
        (TPU, ("mosaic_tpu", "reference")),
        (CPU, ("reference",)),
    ],
    ids=lambda t: getattr(t, "kind", ""),
)
def test_auto(target, expected):
    assert backends.resolve("auto", target) == expected


def test_an_explicit_choice_is_obeyed():
    assert backends.resolve("triton", HOPPER) == ("triton",)
    assert backends.resolve("reference", HOPPER) == ("reference",)


@pytest.mark.parametrize(
    ("kernels", "target", "message"),
    [
        ("triton", CPU, "Triton kernels need an NVIDIA GPU from Ampere on, and this is cpu"),
        ("mosaic_gpu", AMPERE, "written for Hopper GPUs, and this is NVIDIA A100"),
        ("mosaic_tpu", HOPPER, "need a TPU, and this is NVIDIA H100"),
        ("cuda", HOPPER, "there are no kernels 'cuda': choose auto, mosaic_gpu"),
    ],
)
def test_an_impossible_choice_says_why(kernels, target, message):
    with pytest.raises(BackendError, match=message):
        backends.resolve(kernels, target)


def test_this_machine_is_a_cpu():
    assert Target.of().platform == "cpu"


def only_small(x):
    return None if x < 10 else f"{x} is too large"


SMALL = Implementation("triton", only_small, lambda x, interpret: x + (0.5 if interpret else 0.25))
ANY = Implementation("reference", lambda x: None, lambda x: x)


def test_the_first_that_can_is_called():
    call = backends.call
    assert call("op", (SMALL, ANY), ("triton", "reference"), (3,), 3) == 3.25
    assert call("op", (SMALL, ANY), ("triton", "reference"), (30,), 30) == 30
    assert call("op", (SMALL, ANY), ("reference",), (3,), 3) == 3
    with backends.interpreted():
        assert call("op", (SMALL, ANY), ("triton",), (3,), 3) == 3.5


def test_kernels_have_no_gradient():
    def f(x):
        return backends.call("op", (SMALL, ANY), ("triton",), (3,), x)

    with pytest.raises(NotImplementedError, match=r"no gradient through the kernels of op: load"):
        jax.grad(f)(1.0)


def test_an_explicit_choice_never_falls_back():
    with pytest.raises(UnsupportedError, match=r"op with kernels=triton.*30 is too large"):
        backends.call("op", (SMALL, ANY), ("triton",), (30,), 30)
    # The command line takes it for wrong usage, and backends' own reasons are caught like it.
    assert issubclass(UnsupportedError, BackendError)
    assert issubclass(UnsupportedError, NotImplementedError)


def test_weights_that_were_not_packed_are_for_the_reference():
    assert backends.kernels_of(jnp.zeros(3)) == ("reference",)
