"""Products added to a residual at the models' sizes compile for Hopper, and no register spills."""

import pytest

from pallas_kernels import targets
from pallas_kernels.residual_matmul import cases
from pallas_kernels.residual_matmul.triton import residual_matmul

pytestmark = pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")


@pytest.mark.parametrize("case", cases.REAL.values(), ids=cases.REAL.keys())
def test_at_real_sizes(case):
    compiled = targets.compile(targets.HOPPER, residual_matmul, *cases.shapes(case))
    # One kernel, and nothing beside it.
    assert compiled.program.as_text().count(" custom-call(") == 1
    assert compiled.program.memory_analysis().temp_size_in_bytes == 0
