"""Plots are drawn into the axes given, with the numbers that were found, and are labelled."""

import os

import numpy as np
import pytest
from tiny import exact

from mimo_jax import explore

TEXT = "def f(x):\n    return x + 1\n"


@pytest.fixture(scope="module")
def plots(tmp_path_factory):
    before = os.environ.get("MPLCONFIGDIR")
    os.environ["MPLCONFIGDIR"] = str(tmp_path_factory.mktemp("matplotlib"))
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from mimo_jax.explore import plots

    with matplotlib.rc_context(plots.STYLE):
        yield plots
    plots.plt.close("all")
    if before is None:
        del os.environ["MPLCONFIGDIR"]
    else:
        os.environ["MPLCONFIGDIR"] = before


@pytest.fixture(scope="module")
def seen():
    return explore.taps(exact(), TEXT, "*")


def image(ax):
    return np.ma.filled(np.ma.asarray(ax.images[0].get_array()).astype(np.float32), np.nan)


def drawn(ax):
    """The axes, once everything in them has been drawn."""
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    assert ax.get_title(loc="left")
    ax.figure.canvas.draw()
    return ax


def test_axes_that_are_given_are_drawn_into(plots, seen):
    stats = explore.router_stats(exact(), seen)
    _, ax = plots.plt.subplots()
    assert drawn(plots.router_load(stats, ax)) is ax
    np.testing.assert_allclose(image(ax), stats.load, rtol=1e-6)


def test_attention(plots, seen):
    maps = explore.attention_maps(exact(), seen)
    T = len(seen["tokens"].values[0])
    ax = drawn(plots.attention(maps[1], 3))
    np.testing.assert_allclose(
        image(ax),
        np.where(np.tri(T, dtype=bool), np.maximum(maps[1].weights.values[0, 3], 1e-3), np.nan),
        rtol=1e-6,
    )
    assert "layer 1, sliding: head 3" in ax.get_title(loc="left")
    texts = explore.token_texts(exact(), seen["tokens"].values[0])
    ax = drawn(plots.attention(maps[0], texts=texts))
    assert [t.get_text() for t in ax.get_xticklabels()] == texts


def test_keys_outside_the_window_stay_empty(plots):
    lm = explore.changed(exact(), explore.window(3))
    maps = explore.attention_maps(lm, explore.taps(lm, TEXT, "attention.1"))
    T = maps[1].weights.shape[-1]
    distance = np.arange(T)[:, None] - np.arange(T)
    shown = np.isfinite(image(plots.attention(maps[1])))
    np.testing.assert_array_equal(shown, (distance >= 0) & (distance < 3))


def test_sinks(plots, seen):
    maps = explore.attention_maps(exact(), seen)
    ax = drawn(plots.sink_shares(maps))
    values = image(ax)
    assert np.isnan(values[[0, 4, 7]]).all()  # full layers
    np.testing.assert_allclose(values[2], maps[2].sink.values.mean(axis=(0, 2)), rtol=1e-5)
    assert len(ax.texts) == 5 * 8


def test_norms(plots, seen):
    ax = drawn(plots.hidden_norms(seen))
    first = ax.lines[1].get_ydata()
    hidden = seen["hidden.4"].values[0, 0]
    np.testing.assert_allclose(np.asarray(first)[4], np.sqrt((hidden**2).mean()), rtol=1e-5)


def test_lens(plots, seen):
    lm = exact()
    lens = explore.logit_lens(lm, seen)
    texts = explore.token_texts(lm, seen["tokens"].values[0])
    first = explore.token_texts(lm, lens.ids[:, 0, :, 0].ravel())
    ax = drawn(plots.logit_lens(lens, texts, first, positions=slice(2, 6)))
    np.testing.assert_allclose(image(ax)[0], np.exp(lens.logprobs[-1, 0, 2:6, 0]), rtol=1e-5)
    assert [t.get_text() for t in ax.get_xticklabels()] == texts[2:6]
    assert len(ax.texts) == 8 * 4
