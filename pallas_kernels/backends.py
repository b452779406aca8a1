"""Which kernels there are, which of them a device can run, and which one does a case.

The one place that knows platforms, generations and versions of jax.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

NAMES = ("mosaic_gpu", "triton", "mosaic_tpu")
REFERENCE = "reference"

# What differs between the versions of jax that are supported is asked of this: 0.11 or 0.12.
JAX_VERSION = jax.__version_info__[:2]

_interpreted = contextvars.ContextVar("interpreted", default=False)


class BackendError(ValueError):
    """A backend was asked for that there isn't, or that the device can't run."""


class UnsupportedError(BackendError, NotImplementedError):
    """None of the backends that were asked for can do a case."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A device, as far as kernels care.

    Attributes:
      platform: "cpu", "cuda", "rocm" or "tpu".
      kind: the name that its maker gave it.
      capability: NVIDIA's compute capability times ten (90 for Hopper), 0 elsewhere.
    """

    platform: str
    kind: str
    capability: int = 0

    @classmethod
    def of(cls, device: Any = None) -> Target:
        """Of a jax device; the default device's by default."""
        device = device or jax.devices()[0]
        platform = device.platform
        if platform == "gpu":
            platform = "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
        capability = getattr(device, "compute_capability", "").replace(".", "")
        return cls(platform, device.device_kind, int(capability) if capability.isdigit() else 0)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One backend's way to do an operation.

    Attributes:
      backend: its name in NAMES, or REFERENCE.
      unsupported: why it can't do a case with these arrays (or their shapes); None if it can.
      call: the operation; takes `interpret` if it is a kernel.
    """

    backend: str
    unsupported: Callable[..., str | None]
    call: Callable[..., Any]


def why_not(name: str, target: Target) -> str | None:
    """Why a backend's kernels don't run on a device; None if they do."""
    if _interpreted.get():
        return None
    if name == "mosaic_gpu" and not (target.platform == "cuda" and target.capability == 90):
        return f"Mosaic GPU kernels are written for Hopper GPUs, and this is {target.kind}"
    if name == "triton" and not (target.platform == "cuda" and target.capability >= 80):
        return f"Triton kernels need an NVIDIA GPU from Ampere on, and this is {target.kind}"
    if name == "mosaic_tpu" and target.platform != "tpu":
        return f"Mosaic TPU kernels need a TPU, and this is {target.kind}"
    return None


def resolve(kernels: str, target: Target) -> tuple[str, ...]:
    """The backends that may be used on a device.

    Args:
      kernels: "auto" for all that run there and plain jnp, or one name.
      target: the device.

    Raises:
      BackendError: there is no backend of that name, or it doesn't run there.
    """
    if kernels == "auto":
        return (*(n for n in NAMES if why_not(n, target) is None), REFERENCE)
    if kernels == REFERENCE:
        return (REFERENCE,)
    if kernels not in NAMES:
        raise BackendError(
            f"there are no kernels {kernels!r}: choose auto, {', '.join(NAMES)} or {REFERENCE}"
        )
    reason = why_not(kernels, target)
    if reason is not None:
        raise BackendError(f"{reason}: choose kernels='auto' or another backend")
    return (kernels,)


def choose(
    implementations: Sequence[Implementation], allowed: Sequence[str], *case: Any
) -> tuple[Implementation | None, list[tuple[str, str]]]:
    """The first implementation that is allowed and can do a case, and why those before it aren't.

    Args:
      implementations: the preferred first.
      allowed: names of backends, from `resolve`.
      case: arrays, or their shapes, as the operation's `unsupported` functions take them.
    """
    refused = []
    for implementation in implementations:
        if implementation.backend not in allowed:
            reason = "not among the kernels asked for, or not for this device"
        else:
            reason = implementation.unsupported(*case)
        if reason is None:
            return implementation, refused
        refused.append((implementation.backend, reason))
    return None, refused


def call(
    operation: str,
    implementations: Sequence[Implementation],
    allowed: Sequence[str],
    case: Sequence[Any],
    *args: Any,
    **options: Any,
) -> Any:
    """Calls what `choose` chooses.

    Raises:
      UnsupportedError: nothing that is allowed can do the case; with the reasons.
    """
    chosen, refused = choose(implementations, allowed, *case)
    if chosen is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused if name in allowed)
        raise UnsupportedError(
            f"{operation} with kernels={'/'.join(allowed)} can't do this ({reasons}): load the "
            "model with kernels='auto'"
        )
    if chosen.backend == REFERENCE:
        return chosen.call(*args, **options)
    options["interpret"] = is_interpreted()
    return _kernel(operation, chosen.call, tuple(options.items()))(*args)


@functools.cache
def _kernel(
    operation: str, call: Callable[..., Any], options: tuple[tuple[str, Any], ...]
) -> Callable[..., Any]:
    """A kernel's call within jit, so that a model's layers share its trace and its lowering, which
    take a second or ten; differentiating it is an error."""

    @jax.custom_jvp
    def kernel(*args: Any) -> Any:
        return call(*args, **dict(options))

    @kernel.defjvp
    def _(*_: Any) -> Any:
        raise NotImplementedError(
            f"there is no gradient through the kernels of {operation}: load the model with "
            "kernels='reference' to differentiate it"
        )

    return jax.jit(kernel)


def kernels_of(weights: Any) -> tuple[str, ...]:
    """The backends that weights were packed for; plain jnp for any that weren't packed."""
    return getattr(weights, "kernels", ()) or (REFERENCE,)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels traced in this context are interpreted, and all are said to run here; for tests."""
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


def is_interpreted() -> bool:
    """Whether kernels traced now are to be interpreted."""
    return _interpreted.get()
