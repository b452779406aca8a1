"""Which kernels there are, and which of them a device can run.

The one place that knows platforms, generations and versions of jax.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

# In the order in which they are preferred where several can do a case.  Each operation may have
# reasons of its own to deviate (`pallas_kernels.moe.choose`).
NAMES = ("mosaic_gpu", "triton", "mosaic_tpu")
REFERENCE = "reference"

_interpreted = contextvars.ContextVar("interpreted", default=False)


class BackendError(ValueError):
    """A backend was asked for that there isn't, or that the device can't run."""


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
        capability = getattr(device, "compute_capability", "0").replace(".", "")
        return cls(platform, device.device_kind, int(capability) if capability.isdigit() else 0)


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
    """The backends to use on a device, the preferred first; none means plain jnp.

    Args:
      kernels: "auto" for all that run there, "reference" for none, or a backend's name.
      target: the device.

    Raises:
      BackendError: there is no backend of that name, or it doesn't run there.
    """
    if kernels == REFERENCE:
        return ()
    if kernels == "auto":
        return tuple(n for n in NAMES if why_not(n, target) is None)
    if kernels not in NAMES:
        raise BackendError(
            f"there are no kernels {kernels!r}: choose auto, {', '.join(NAMES)} or {REFERENCE}"
        )
    reason = why_not(kernels, target)
    if reason is not None:
        raise BackendError(f"{reason}: choose kernels='auto' or another backend")
    return (kernels,)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels traced in this context are interpreted on any device, for tests."""
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


def is_interpreted() -> bool:
    """Whether kernels traced now are to be interpreted."""
    return _interpreted.get()
