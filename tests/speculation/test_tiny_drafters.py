"""mimo-tiny's drafters: how much they foresee of a held-out module."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import pytest
from test_tiny import held_out_files
from tiny import exact

import mimo_jax as mj


# Of these short texts less is foreseen than of those in benchmarks/README.md: 2.4 (DFlash).
@pytest.mark.parametrize(("name", "least"), [("mtp", 2.2), ("dflash", 2.0)])
def test_its_drafters_are_good_and_change_nothing(name, least):
    lm = exact()
    source = Path(sysconfig.get_paths()["stdlib"]) / held_out_files()[0]
    ids = lm.encode(source.read_text())
    prompts = [ids[i : i + 64] for i in range(0, 8 * 64, 64)]
    params = mj.SamplingParams(temperature=0.0, max_tokens=96, ignore_eos=True)
    plain = lm.generate(prompts, params)
    fast = lm.generate(prompts, params, speculative=name)
    assert [o.token_ids for o in fast] == [o.token_ids for o in plain]
    lengths = [n for o in fast for n in o.metrics.acceptance_lengths]
    assert np.mean(lengths) >= least
