"""The TPU kernel that stores keys and values compiles at the models' sizes, and works in place."""

import dataclasses
import functools
import re

import jax
import pytest

from pallas_kernels import targets
from pallas_kernels.rotate_and_store import cases
from pallas_kernels.rotate_and_store.mosaic_tpu import rotate_and_store

ONE, EIGHT, RING = (cases.REAL[name] for name in ("1 x 1", "8 x 16", "ring 8 x 16"))
CASES = {
    "one token": ONE,
    "a chunk": dataclasses.replace(ONE, tokens=2048, slots=32768),
    "8 x 16": EIGHT,
    "8 x 16, a head of eight": dataclasses.replace(EIGHT, chunks=1),
    "8 x 16, slots that are no blocks": dataclasses.replace(EIGHT, slots=1000, chunks=4),
    "a ring": RING,
    "a ring's head of eight": dataclasses.replace(RING, chunks=1),
}


@pytest.mark.parametrize("tpu", targets.TPUS, ids=lambda t: t.name)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_in_place(case, tpu):
    given = cases.shapes(case)
    step = functools.partial(rotate_and_store, heads=case.heads, ring=case.ring)
    step = jax.jit(step, donate_argnums=(2, 3))
    program = targets.compile(tpu, step, *given).program
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(2 * a.size for a in given[2:])
    copies = rf"= bf16\[{len(case.newest)},{case.slots},\S* (?:copy|transpose)\("
    assert not re.findall(copies, program.as_text())
