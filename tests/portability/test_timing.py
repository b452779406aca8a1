"""The programs that benchmarks time have all the calls that they are said to have."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.portability import timing


@pytest.mark.parametrize(("sets", "seconds"), [(3, 3e-4), (1, 1e-3), (1, 1.0)])
def test_no_call_is_left_out(sets, seconds):
    made = []

    def double(x):
        made.append(None)
        return 2 * x

    def call(q, given, held):
        # XLA may leave out and join calls of a pure function, as it does with kernels.
        return jax.pure_callback(double, jax.typeof(q), q) + given + held

    program, calls = timing.chain(call, sets, seconds)
    held = [jnp.full(4, i, jnp.float32) for i in range(sets)]
    _, (first,) = jax.block_until_ready(program(jnp.ones(4), jnp.float32(10), held))
    assert len(made) == calls == sets * max(timing.TRIPS, math.ceil(3e-3 / (seconds * sets)))
    np.testing.assert_array_equal(first, np.full(4, 12.0))
