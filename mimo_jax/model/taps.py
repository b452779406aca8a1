"""Optional outputs of a forward pass, by name; nothing is computed or kept for those not asked.

Names (i is a layer index):

- `hidden.i`: residual stream after layer i, before the final norm [B, T, D].
- `router.i`: sigmoid router scores of a MoE layer, float32 [B, T, E].
- `experts.i`: the experts a MoE layer chose, int32 [B, T, X].
- `attention.i`: attention weights, float32 [B, N, T, S] over the keys the layer attended to.
"""

from __future__ import annotations

from collections.abc import Iterable

from jaxtyping import Array

# What the dimensions of each kind are, in words.
AXES: dict[str, tuple[str, ...]] = {
    "hidden": ("batch", "position", "feature"),
    "router": ("batch", "position", "expert"),
    "experts": ("batch", "position", "choice"),
    "attention": ("batch", "head", "query", "key"),
}


class Taps:
    """Collects the requested intermediate arrays while a forward pass is traced."""

    def __init__(self, names: Iterable[str] = ()):
        self.names = frozenset(names)
        self.values: dict[str, Array] = {}

    def wants(self, name: str) -> bool:
        """Whether `name` was requested."""
        return name in self.names

    def record(self, name: str, value: Array) -> None:
        """Keeps `value` if it was requested."""
        if name in self.names:
            self.values[name] = value

    def result(self) -> dict[str, Array]:
        """The collected arrays.

        Raises:
          ValueError: a requested name is not one the model has.
        """
        unknown = sorted(self.names - self.values.keys())
        if unknown:
            raise ValueError(
                f"unknown taps {unknown}: use hidden.i for any layer i, router.i or experts.i for "
                "a MoE layer, attention.i for any layer"
            )
        return self.values
