"""A model's step as a function of flat arguments, and its export for several platforms.

What can be open until a program is compiled, and what can't (jax 0.11.2):

- The length of the cache can: no code decides anything by it.
- The number of tokens and of rows can't: code chooses between algorithms by them (whether tokens
  look at slots or at keys in order, how TPUs store, how large tiles of experts are), which jax's
  symbolic dimensions can't answer.  So there is a program for chunks of a prompt, of a fixed size,
  and one for single tokens.
- Kernels can't be in a program for several platforms that include the CPU: within
  `jax.lax.platform_dependent` too, pallas_call is lowered for all of them, and refuses the CPU.
  For TPUs alone they export; for GPUs Triton's need the check of custom calls to be disabled, since
  jax doesn't promise to read them in another version.  Weights would be packed for one of these
  besides.  The reference is plain XLA and goes everywhere.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array

from mimo_jax.decoding.sampling import mask_vocabulary
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.cache import init_cache

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# The name that an open cache length has in programs and manifests.
MAX_LEN = "max_len"


@dataclasses.dataclass(frozen=True)
class Argument:
    """An argument, or a result, of a program.

    Attributes:
      name: unique among them.
      role: "weight", "tokens", "positions", "cache", "next_tokens" or "logits".
      array: its shape, in which the cache's length may be a symbol, and its dtype.
    """

    name: str
    role: str
    array: jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Step:
    """A model's step: (weights..., tokens, positions, cache...) -> (next, logits, cache...).

    Attributes:
      model: the backbone, on one device and with the reference's kernels.
      batch: rows B.
      max_len: positions of the cache; None leaves them open.
      valid_vocabulary: ids from here on get no logits.
    """

    model: MiMo
    batch: int
    max_len: int | None
    valid_vocabulary: int

    def weights(self) -> list[tuple[str, Any]]:
        """Every array of the model with its name, in the order of the arguments."""
        leaves, _ = jax.tree_util.tree_flatten_with_path(self.model)
        named = []
        for path, leaf in leaves:
            keys = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
            named.append((".".join(key for key in keys if key != "value"), leaf))
        return named

    def cache(self) -> list[Argument]:
        """The arrays of the cache, which begin as zeros."""
        config, found = self.model.config, []
        length: Any = self.max_len
        if length is None:
            most = f"{MAX_LEN} <= {config.max_position_embeddings}"
            (length,) = export.symbolic_shape(MAX_LEN, constraints=[most])
        for i, (layer, held) in enumerate(zip(config.layers, self._cache().layers, strict=True)):
            for name, array in (("k", held.k), ("v", held.v)):
                slots = array.shape[1] if layer.window is not None else length
                shape = (array.shape[0], slots, *array.shape[2:])
                array = jax.ShapeDtypeStruct(shape, array.dtype)
                found.append(Argument(f"cache.{i}.{name}", "cache", array))
        return found

    def arguments(self, tokens: int) -> list[Argument]:
        """What a program for so many tokens a row is given, in order."""
        ids = jax.ShapeDtypeStruct((self.batch, tokens), jnp.int32)
        weights = [
            Argument(name, "weight", jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
            for name, leaf in self.weights()
        ]
        inputs = [Argument(name, name, ids) for name in ("tokens", "positions")]
        return [*weights, *inputs, *self.cache()]

    def results(self) -> list[Argument]:
        """What every program returns, in order."""
        vocabulary = self.model.config.vocab_size
        chosen = jax.ShapeDtypeStruct((self.batch,), jnp.int32)
        logits = jax.ShapeDtypeStruct((self.batch, vocabulary), jnp.float32)
        return [
            Argument("next_tokens", "next_tokens", chosen),
            Argument("logits", "logits", logits),
            *self.cache(),
        ]

    def export(self, tokens: int, platforms: Sequence[str]) -> export.Exported:
        """The program for so many tokens a row, lowered for platforms; the cache is given away."""
        arguments = self.arguments(tokens)
        weights = sum(a.role == "weight" for a in arguments)
        structure = jax.tree.structure(self.model)
        cache_structure = jax.tree.structure(self._cache())

        def step(*flat: Array) -> tuple[Array, ...]:
            model = jax.tree.unflatten(structure, flat[:weights])
            tokens, positions, *arrays = flat[weights:]
            cache = jax.tree.unflatten(cache_structure, arrays)
            hidden, cache, _ = model.hidden_states(tokens, positions, cache)
            newest = jnp.argmax(positions, axis=1)[:, None, None]
            hidden = jnp.take_along_axis(hidden, newest, axis=1)[:, 0]
            logits = mask_vocabulary(model.logits(hidden), self.valid_vocabulary)
            chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            return (chosen, logits, *jax.tree.leaves(cache))

        donated = tuple(i for i, a in enumerate(arguments) if a.role == "cache")
        jitted = jax.jit(step, donate_argnums=donated)
        return export.export(jitted, platforms=platforms)(*(a.array for a in arguments))

    def _cache(self) -> Any:
        """The cache's shapes; where its length is open, with one position."""
        length = 1 if self.max_len is None else self.max_len
        return jax.eval_shape(lambda: init_cache(self.model.config, self.batch, length))


def require_flatbuffers() -> None:
    """Raises early what jax would raise late.

    Raises:
      OSError: jax can't serialise programs here.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise OSError(
            "jax needs the package flatbuffers to serialise programs: pip install flatbuffers"
        )
