"""The cases of tests/goldens as models of mimo_jax; shared by the tests of several packages.

The weights of `recipe.make_weights` are put into the model by hand here, so that the numerics of
the model are tested without its checkpoint loader.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from goldens import recipe

from mimo_jax.config import MiMoConfig
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.cache import KVCache
from mimo_jax.model.parameters import Make, ParamSpec

FOLDER = Path(recipe.__file__).parent


def make_from(weights: Mapping[str, np.ndarray], dtype: str, used: set[str] | None = None) -> Make:
    """A `Make` that takes values from split-layout tensors under their hub names.

    Args:
      weights: tensors, as `recipe.make_weights` gives them.
      dtype: of the parameters that do not set their own.
      used: if given, gets the names of the tensors that were taken.
    """

    def tensor(name: str) -> np.ndarray:
        if used is not None:
            used.add(name)
        return weights[name]

    def make(spec: ParamSpec) -> jax.Array:
        if spec.qkv is not None:
            chunks = spec.shape[0]
            parts = [tensor(spec.name.replace("qkv_proj", f"{p}_proj")) for p in "qkv"]
            split = [p.reshape(chunks, -1, p.shape[-1]) for p in parts]
            value = np.concatenate(split, axis=1)
        elif "{}" in spec.name:
            value = np.stack([tensor(spec.name.format(e)) for e in range(spec.shape[0])])
        else:
            value = tensor(spec.name)
            assert value.shape == spec.tensor_shape, spec.name
            value = value.reshape(spec.shape)
        assert value.shape == spec.shape, spec.name
        return jnp.asarray(value, spec.dtype or dtype)

    return make


@dataclasses.dataclass(frozen=True)
class Golden:
    """A golden case: its configuration, inputs, stored arrays and model.

    Attributes:
      case: the recipe.
      tokens: int32 [B, T].
      positions: int32 [B, T], -1 at padding.
      real: bool [B, T], False at padding.
      arrays: the npz, as described in scripts/make_goldens.py.
    """

    case: recipe.Case
    tokens: jax.Array
    positions: jax.Array
    real: np.ndarray
    arrays: Mapping[str, np.ndarray]

    def model(self, dtype: str = "float32", **changes: Any) -> MiMo:
        """The case's model, with fields of the config changed where given."""
        weights = recipe.make_weights(self.case)
        assert recipe.fingerprint(weights) == self.arrays["weights_crc32"], "numpy's streams moved"
        return build(self.case, dtype, **changes)


def build(case: recipe.Case, dtype: str = "float32", **changes: Any) -> MiMo:
    """A model with the weights of `case` in `dtype`; every one of its tensors is used."""
    config = MiMoConfig.from_dict({**case.config, "dtype": dtype})
    weights, used = recipe.make_weights(case), set[str]()
    model = MiMo(dataclasses.replace(config, **changes), make_from(weights, dtype, used))
    assert used == set(weights)
    return model


def tiny(seed: int = 1, **changes: Any) -> recipe.Case:
    """A case of two small layers, one full and dense, one sliding and MoE, for models of no golden.

    Args:
      seed: of the weights.
      **changes: keys of `recipe.BASE_CONFIG`.
    """
    small = {
        "hybrid_layer_pattern": [recipe.FULL, recipe.SLIDING],
        "moe_layer_freq": [0, 1],
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "swa_num_key_value_heads": 2,
        "head_dim": 24,
        "v_head_dim": 16,
        "vocab_size": 64,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
    }
    config = recipe.make_config(**(small | changes))
    return recipe.Case(covers="", config=config, seed=seed, lengths=())


@functools.cache
def load(name: str) -> Golden:
    """The golden case of that name."""
    case = recipe.CASES[name]
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = dict(file)
    inputs = recipe.make_inputs(case)
    np.testing.assert_array_equal(inputs["tokens"], arrays["tokens"])
    real = inputs["mask"].astype(bool)
    positions = jnp.asarray(np.where(real, inputs["positions"], -1))
    return Golden(case, jnp.asarray(inputs["tokens"]), positions, real, arrays)


def _step(
    model: MiMo, tokens: jax.Array, positions: jax.Array, cache: KVCache | None
) -> tuple[jax.Array, KVCache | None]:
    return model(tokens, positions, cache)


# The compiled model step, shared by all tests; and as users run it (see tests/conftest.py).
step = jax.jit(_step)
optimized_step = jax.jit(_step, compiler_options={"xla_backend_optimization_level": 3})
