"""What devices exchange in a decoding step of the released models, read from compiled programs.

The models are abstract and compiled for eight devices of a CPU.  A count that grows here is time on
a real machine: an all-reduce of one token's hidden state takes some 20 us on four H200s
(KERNEL_NOTES 2), as much as reading 80 MB.
"""

import jax
import jax.numpy as jnp
import pytest

from mimo_jax.config import MiMoConfig
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.cache import CACHE_AXES, init_cache
from mimo_jax.model.parameters import abstract, parameters
from mimo_jax.model.placement import Placement
from sharding.hlo import Total, collectives, summarize
from sharding.mesh import make_mesh

PRO = "MiMo-V2.5-Pro-FP4-DFlash"


def decoding_step(config: MiMoConfig, mesh: str, rules: str, batch: int) -> dict[str, Total]:
    """Collectives of one cached step of `batch` tokens, by kind."""
    model = abstract(lambda make: MiMo(config, make), config.dtype, quantized=True)
    held = [(p.spec, p.spec.format) for _, p in parameters(model)]
    where = Placement.fit(make_mesh(mesh), rules, held)

    def placed(array, sharding):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    for _, p in parameters(model):
        value = p.get_value()
        p.set_value(jax.tree.map(placed, value, where.shardings(p.spec, value)))
    cache = jax.tree.map(
        lambda a: placed(a, where.sharding("cache", CACHE_AXES, a.shape)),
        jax.eval_shape(lambda: init_cache(config, batch, 4096)),
    )
    rows = placed(
        jax.ShapeDtypeStruct((batch, 1), jnp.int32),
        where.sharding("tokens", ("batch", None), (batch, 1)),
    )

    def step(model, tokens, positions, cache):
        logits, cache = model(tokens, positions, cache)
        return jnp.argmax(logits, axis=-1), cache

    with jax.set_mesh(where.mesh):
        lowered = jax.jit(step, donate_argnames="cache").lower(model, rows, rows, cache)
    return summarize(collectives(lowered.compile().as_text() or ""))


def test_pro_has_two_all_reduces_a_layer():
    """On tensor=8; besides, the embedding's all-gather and the head's greatest logit."""
    config = MiMoConfig.from_pretrained(PRO).truncated(12)
    found = decoding_step(config, "tensor=8", "latency", batch=1)
    hidden = config.hidden_size * 4
    assert found["all-reduce"] == Total(24, 24 * hidden)
    head = found["all-gather"].bytes - hidden
    assert found["all-gather"].count <= 3
    assert head <= 8 * 8  # of each device its best logit and its index
    assert found.keys() == {"all-reduce", "all-gather"}


@pytest.mark.parametrize("mesh", ["expert=8", "expert=2,tensor=4"])
@pytest.mark.parametrize("rules", ["latency", "latency_experts"])
def test_experts_split_in_any_way_need_no_more(mesh, rules):
    found = decoding_step(MiMoConfig.from_pretrained(PRO).truncated(3), mesh, rules, batch=2)
    assert found["all-reduce"].count == 6
    assert found.keys() == {"all-reduce", "all-gather"}


@pytest.mark.parametrize(("mesh", "reduced"), [("expert=8", 0), ("expert=4,tensor=2", 2)])
def test_travelling_tokens_are_exchanged_twice_a_layer(mesh, reduced):
    """There and back in each of two mixture layers, and the counts of rows before."""
    config = MiMoConfig.from_pretrained(PRO).truncated(3)
    found = decoding_step(config, mesh, "throughput", batch=8)
    assert found["all-to-all"].count == 2 * 2
    assert found.get("all-reduce", Total(0, 0)).count == 3 * reduced
    assert found["all-gather"].count <= 2 + 3


def test_rows_of_data_are_never_exchanged():
    config = MiMoConfig.from_pretrained(PRO).truncated(3)
    assert decoding_step(config, "data=8", "latency", batch=8) == {}


def test_fewer_kv_heads_than_devices_bring_together_one_projection_a_layer():
    """Flash has four KV heads in full layers: the rows of QKV are gathered, no weight is."""
    config = MiMoConfig.from_pretrained("MiMo-V2.6-Flash-RL").truncated(3)
    found = decoding_step(config, "tensor=8", "latency", batch=1)
    assert found["all-reduce"].count == 6
    assert found["all-gather"].count <= 3 + 3
    assert found["all-gather"].bytes < 3 * 16_384 * 4
