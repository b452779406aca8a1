"""Named cases of a mixture of experts, for tests and benchmarks."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.formats import MXFP4_BLOCK, MXFP4Array


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, and how tokens are routed.

    Attributes:
      tokens, dim, width, experts, top_k: P, D, F, E and X.
      routing: "random"; "one" sends every token's first choice to one expert; "few" leaves most
        experts without tokens; "elsewhere" chooses among twice as many experts as there are here.
      scales: least and greatest scale byte.
    """

    tokens: int
    dim: int
    width: int
    experts: int
    top_k: int
    routing: Literal["random", "one", "few", "elsewhere"] = "random"
    scales: tuple[int, int] = (117, 121)


PRO = Case(1, dim=6144, width=2048, experts=384, top_k=8)
QUARTER = dataclasses.replace(PRO, width=512)
FLASH = Case(1, dim=4096, width=2048, experts=256, top_k=8)


def _named(name: str, case: Case, *tokens: int) -> dict[str, Case]:
    return {f"{name} {n}": dataclasses.replace(case, tokens=n) for n in tokens}


# MiMo's own sizes, and those of a shard of four.
REAL = {
    **_named("pro", PRO, 1, 4, 8, 16, 64, 256, 1024, 4096, 8192),
    **_named("pro/4", QUARTER, 1, 8, 4096),
    **_named("flash", FLASH, 1, 8, 64, 4096),
}

# Small enough to be interpreted.
SMALL = {
    "one token": Case(1, 256, 128, 6, 4),
    "one token, experts elsewhere": Case(1, 128, 128, 5, 3, "elsewhere"),
    "a few": Case(5, 256, 128, 6, 4),
    "eight of an expert": Case(8, 128, 128, 4, 2, "one"),
    "all to one expert": Case(20, 128, 128, 4, 1, "one"),
    "experts without tokens": Case(11, 128, 128, 16, 2, "few"),
    "experts elsewhere": Case(9, 128, 128, 5, 3, "elsewhere"),
    "off the tile grid": Case(7, 96, 160, 3, 2),
    "an odd number of experts": Case(6, 128, 128, 7, 3),
    "as many as go without sorting": Case(64, 128, 128, 8, 2),
    "great scales": Case(4, 128, 128, 4, 2, scales=(124, 128)),
    "small scales": Case(4, 128, 128, 4, 2, scales=(60, 70)),
}

# More tokens than go without sorting, for the other form of the kernels.
SORTED = {
    "sorted": Case(70, 256, 128, 5, 3),
    "sorted, all to one expert": Case(200, 256, 128, 4, 1, "one"),
    "sorted, experts elsewhere": Case(65, 256, 128, 7, 3, "elsewhere"),
    "sorted, off the tile grid": Case(90, 224, 160, 3, 2, scales=(60, 70)),
}


def experts(case: Case, seed: int) -> tuple[MXFP4Array, MXFP4Array, MXFP4Array]:
    """Random gate and up [E, F, D] and down [E, D, F]; a sixteenth of the codes are -0."""
    rng = np.random.default_rng(seed)

    def stack(rows: int, columns: int) -> MXFP4Array:
        codes = rng.integers(0, 256, (case.experts, rows, columns // 2), np.uint8)
        shape = (case.experts, rows, columns // MXFP4_BLOCK)
        scales = rng.integers(case.scales[0], case.scales[1] + 1, shape, np.uint8)
        return MXFP4Array(jnp.asarray(codes), jnp.asarray(scales))

    f, d = case.width, case.dim
    return stack(f, d), stack(f, d), stack(d, f)


def tokens(
    case: Case, seed: int
) -> tuple[Float[Array, "P D"], Float[Array, "P X"], Int[Array, "P X"]]:
    """Random tokens (bfloat16), mixing weights and choices."""
    rng = np.random.default_rng(seed)
    among = {"elsewhere": 2 * case.experts, "few": case.top_k + 1}.get(case.routing, case.experts)
    order = rng.random((case.tokens, among)).argsort(axis=1)
    chosen = order[:, : case.top_k].astype(np.int32)
    if case.routing == "one":
        others = order[order != 1].reshape(case.tokens, among - 1)
        chosen = np.concatenate([np.ones((case.tokens, 1)), others], axis=1)[:, : case.top_k]
    x = rng.standard_normal((case.tokens, case.dim))
    # So that products neither overflow nor vanish, whatever the scales.
    x *= 2.0 ** (120 - sum(case.scales) // 2)
    weights = rng.uniform(0.1, 1, (case.tokens, case.top_k))
    return (
        jnp.asarray(x, jnp.bfloat16),
        jnp.asarray(weights, jnp.float32),
        jnp.asarray(chosen, jnp.int32),
    )
