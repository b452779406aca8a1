"""What the sinks of mimo-tiny take of each head's attention, on average over the queries that see a
whole window, in four pieces of 256 tokens of shutil.py, which it was not trained on."""

import dataclasses
import inspect
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import mimo_jax as mj
from mimo_jax import explore
from mimo_jax.explore import plots

ROOT = Path(__file__).resolve().parents[2]


def draw() -> None:
    """A square a head of each layer."""
    lm = mj.load("mimo-tiny")
    ids = np.reshape(lm.encode(inspect.getsource(shutil))[:1024], (4, 256))
    maps = explore.attention_maps(lm, explore.taps(lm, ids, "attention.*"))
    whole = slice((lm.config.sliding_window or 1) - 1, None)
    maps = {i: dataclasses.replace(m, sink=m.sink.at(query=whole)) for i, m in maps.items()}
    ax = plots.sink_shares(maps, plt.subplots(figsize=(6.4, 3.4))[1])
    ax.set_title(f"Share of attention that the sink takes, queries from {whole.start} on")


if __name__ == "__main__":
    plt.rcParams.update(plots.STYLE)
    draw()
    plt.savefig(ROOT / "docs" / "images" / "sinks.png", dpi=100)
