"""Settings of the whole test suite."""

import os

# Eight devices on the one CPU, for the tests of sharding.  And without LLVM's optimiser: compiling
# is most of what tests cost, and takes 40 % less so.  The flags count when jax first looks.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

from pathlib import Path

import hypothesis
import jax
import pytest

# On the CPU wherever the tests run, so that they mean the same everywhere; JAX_PLATFORMS overrides.
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")

# Programs are compiled anew: XLA:CPU (jaxlib 0.11.2) once crashed while it wrote one of hundreds to
# the cache, and tests leave nothing in the home folder; nor do the processes that they start.
jax.config.update("jax_enable_compilation_cache", False)
os.environ["MIMO_JAX_COMPILATION_CACHE"] = "off"

# The same examples in every run, and no time limits: a failure is never a matter of luck or load.
hypothesis.settings.register_profile(
    "mimo_jax", deadline=None, derandomize=True, database=None, max_examples=25
)
hypothesis.settings.load_profile("mimo_jax")

MAPS = Path("/proc/self/maps")


@pytest.fixture(scope="module", autouse=True)
def _few_memory_maps():
    """Forgets compiled programs once there are many.

    Each has some 16 memory maps, of which Linux gives a process 65,530; without any left LLVM ends
    the process.  All tests in one process come near.
    """
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
