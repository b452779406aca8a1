"""Pictures of what the rest of the package finds; each function draws into axes and returns them.

Without `ax=` a figure is made.  `STYLE` gives figures a background of their own, so that they read
the same on a light page and on a dark one: `matplotlib.pyplot.rcParams.update(plots.STYLE)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mimo_jax.explore.attending import AttentionMap
from mimo_jax.explore.lens import LogitLens
from mimo_jax.explore.named import NamedArray
from mimo_jax.explore.routing import RouterStats

try:
    import matplotlib.pyplot as plt
    from cycler import cycler
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm, TwoSlopeNorm
except ImportError as error:
    raise ImportError(
        "mimo_jax.explore.plots draws with matplotlib: pip install 'mimo-jax[notebooks]'"
    ) from error

INK, PALE, PAPER = "#26323d", "#9aa5b0", "#fdfcf9"
FULL, SLIDING, THIRD = "#1f5fa8", "#d1661f", "#3f8f5b"
STYLE: dict[str, Any] = {
    **{f"{part}.facecolor": PAPER for part in ("figure", "axes", "savefig")},
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color", "axes.titlecolor"), INK),
    "axes.prop_cycle": cycler(color=[FULL, SLIDING, THIRD, "#8b5fa8", PALE]),
    **{"axes.spines.top": False, "axes.spines.right": False},
    **{"axes.titlesize": 10, "axes.titlelocation": "left", "font.size": 9},
    **{"figure.dpi": 80, "savefig.dpi": 80, "figure.constrained_layout.use": True},
    **{"legend.frameon": False, "image.interpolation": "nearest"},
}


def heat_map(
    values: Any,
    ax: Axes | None = None,
    *,
    x: str,
    y: str,
    title: str = "",
    label: str = "",
    rows: Sequence[Any] | None = None,
    columns: Sequence[Any] | None = None,
    numbers: str | None = None,
    **options: Any,
) -> Axes:
    """Rows and columns as coloured squares; NaN stays empty.

    Args:
      values: [rows, columns].
      ax: where to draw.
      x: what columns are.
      y: what rows are.
      title: of the axes.
      label: of the colours.
      rows: names of the rows.
      columns: names of the columns.
      numbers: a format to write values with, such as ".2f".
      options: of `Axes.imshow`.
    """
    array = np.asarray(values, np.float32)
    ax = _axes(ax, (1.5 + 0.28 * array.shape[1], 1.1 + 0.28 * array.shape[0]))
    image = ax.imshow(array, **{"aspect": "auto", "cmap": "YlGnBu", **options})
    ax.set(xlabel=x, ylabel=y, title=title)
    if columns is not None:
        ax.set_xticks(range(len(columns)), [str(c) for c in columns])
    if rows is not None:
        ax.set_yticks(range(len(rows)), [str(r) for r in rows])
    bar = ax.figure.colorbar(image, ax=ax, label=label, pad=0.02)
    bar.outline.set_visible(False)
    if numbers is not None:
        for at in np.argwhere(np.isfinite(array)):
            value = array[tuple(at)]
            ax.text(at[1], at[0], format(value, numbers), color=_readable(image, value), **_SMALL)
    return ax


def router_load(stats: RouterStats, ax: Axes | None = None) -> Axes:
    """How many tokens each expert of each layer got, as multiples of its fair share."""
    load = stats.load
    most = max(2.0, float(load.max()))
    return heat_map(
        load,
        ax,
        x="expert",
        y="layer",
        title=f"Tokens an expert gets ({len(stats.tokens):,} tokens, {stats.chosen.shape[2]} each)",
        label="times its fair share",
        rows=stats.layers,
        cmap="RdBu_r",
        norm=TwoSlopeNorm(1.0, 0.0, most),
    )


def attention(
    found: AttentionMap,
    head: int | None = None,
    ax: Axes | None = None,
    *,
    row: int = 0,
    texts: Sequence[str] | None = None,
    least: float = 1e-3,
) -> Axes:
    """Where the queries of a sequence look: weights of a head, or the mean of all.

    Args:
      found: of one layer.
      head: which; None for the mean.
      ax: where to draw.
      row: which sequence of the batch.
      texts: what the tokens are, for short texts.
      least: weights below are drawn as this one; the scale is logarithmic.
    """
    weights = found.weights.at(batch=row)
    picked = weights.mean("head") if head is None else weights.at(head=head)
    shown = np.where(np.tri(picked.shape[0], dtype=bool), np.maximum(picked.values, least), np.nan)
    if found.layer.window is not None:
        shown = np.where(np.tri(len(shown), k=-found.layer.window, dtype=bool), np.nan, shown)
    what = "mean of heads" if head is None else f"head {head}"
    return heat_map(
        shown,
        _axes(ax, (4.6, 3.8)),
        x="key",
        y="query",
        title=f"layer {found.layer.index}, {found.layer.kind}: {what}",
        label="attention weight",
        rows=texts,
        columns=texts,
        norm=LogNorm(least, 1.0),
        aspect="equal",
    )


def sink_shares(maps: Mapping[int, AttentionMap], ax: Axes | None = None) -> Axes:
    """What the sink takes of each head's attention; layers without one stay empty."""
    heads = max(found.sink.sizes["head"] for found in maps.values())
    shares = np.full((len(maps), heads), np.nan, np.float32)
    for i, found in enumerate(maps.values()):
        if found.layer.sink:
            mean = found.sink.mean("batch", "query").values
            shares[i, : len(mean)] = mean
    return heat_map(
        shares,
        ax,
        x="head",
        y="layer",
        title="Share of attention that the sink takes",
        label="mean over queries",
        rows=[f"{i} {found.layer.kind}" for i, found in maps.items()],
        columns=range(heads),
        numbers=".2f",
        vmin=0.0,
        vmax=float(np.nanmax(shares, initial=0.01)),
    )


def hidden_norms(seen: Mapping[str, NamedArray], ax: Axes | None = None) -> Axes:
    """Root mean squares of the residual stream by layer: the middle, most of it, and the first."""
    layers = sorted(int(name.split(".")[1]) for name in seen if name.startswith("hidden."))
    streams = [seen[f"hidden.{i}"].values.astype(np.float32) for i in layers]
    sizes = np.stack([np.sqrt((s**2).mean(axis=-1)) for s in streams])  # [L, B, T]
    rest = sizes[:, :, 1:].reshape(len(layers), -1)
    ax = _axes(ax, (5.6, 3.0))
    low, middle, high = np.percentile(rest, (5, 50, 95), axis=1)
    ax.fill_between(layers, low, high, color=FULL, alpha=0.2, lw=0, label="90% of positions")
    ax.plot(layers, middle, "o-", color=FULL, label="median position")
    ax.plot(layers, sizes[:, :, 0].mean(axis=1), "s--", color=SLIDING, label="first position")
    ax.set(xlabel="after layer", ylabel="RMS of the residual stream", yscale="log")
    ax.set_title("Size of the residual stream")
    ax.set_xticks(layers)
    ax.legend()
    return ax


def logit_lens(
    lens: LogitLens,
    texts: Sequence[str],
    first: Sequence[str],
    ax: Axes | None = None,
    *,
    row: int = 0,
    positions: slice = slice(None),
) -> Axes:
    """What the model would say after each layer, at each position of a sequence.

    Args:
      lens: as found.
      texts: what the sequence's tokens are.
      first: what `lens.ids[:, row, :, 0]` are, in its order.
      ax: where to draw.
      row: which sequence of the batch.
      positions: which to show.
    """
    chances = np.exp(lens.logprobs[:, row, :, 0])
    words = np.array(first, dtype=object).reshape(chances.shape)
    shown, words = chances[::-1, positions], words[::-1, positions]
    ax = _axes(ax, (1.6 + 0.62 * shown.shape[1], 1.4 + 0.3 * shown.shape[0]))
    heat_map(
        shown,
        ax,
        x="after reading",
        y="after layer",
        title="What the model would say next, if it ended there",
        label="its probability",
        rows=lens.layers[::-1],
        columns=list(texts)[positions],
        vmin=0.0,
        vmax=1.0,
    )
    for at in np.argwhere(np.isfinite(shown)):
        colour = _readable(ax.images[0], shown[tuple(at)])
        ax.text(at[1], at[0], _short(str(words[tuple(at)])), color=colour, **_SMALL)
    ax.tick_params("x", rotation=60)
    return ax


_SMALL: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7, "parse_math": False}


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    return plt.subplots(figsize=size)[1] if ax is None else ax


def _readable(image: Any, value: Any) -> str:
    """Ink or paper, whichever can be read on the colour of a value."""
    red, green, blue, _ = image.cmap(image.norm(value))
    return INK if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else PAPER


def _short(text: str, most: int = 8) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
