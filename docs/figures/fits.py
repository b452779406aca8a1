"""Draws what a device has to hold of two models, by how many devices share them.

`python docs/figures/fits.py`: from `mimo_jax.planning`, as `mimo-jax plan` prints it.
"""

from pathlib import Path

import matplotlib.pyplot as plt

from mimo_jax.config import MiMoConfig
from mimo_jax.explore.plots import FULL, PALE, SLIDING, STYLE
from mimo_jax.planning import make_plan
from sharding.devices import find_device
from sharding.memory import GIB

OUT = Path(__file__).resolve().parents[1] / "images" / "fits.png"
MODELS = {"MiMo-V2.5-Pro-FP4-DFlash": SLIDING, "MiMo-V2.6-Flash-RL": FULL}
DEVICES = ("v5e", "v6e", "h100", "v5p", "h200", "b200")
COUNTS = (1, 2, 4, 8, 16, 32, 64)


def needed(config: MiMoConfig, devices: int) -> float:
    """GiB a device of one row of 4096 positions; up to eight devices share by tensor."""
    mesh = {"expert": max(1, devices // 8), "tensor": min(devices, 8)}
    return make_plan(config, device="h100", mesh=mesh).memory.needed / GIB


def main() -> None:
    """Writes docs/images/fits.png."""
    plt.rcParams.update(STYLE | {"savefig.dpi": 130})
    _, ax = plt.subplots(figsize=(6.4, 3.8))
    for name in DEVICES:
        usable = find_device(name).usable.value / GIB
        ax.axhline(usable, color=PALE, lw=0.8, ls="--", zorder=0)
        ax.text(1.01, usable, name, va="center", fontsize=8, transform=ax.get_yaxis_transform())
    for name, colour in MODELS.items():
        config = MiMoConfig.from_pretrained(name)
        ax.plot(COUNTS, [needed(config, n) for n in COUNTS], "o-", color=colour, label=name)
    ax.set(xscale="log", yscale="log", xlabel="devices", ylabel="GiB a device")
    ax.set_title("What each device has to hold, and what kinds of them can")
    ax.set_xticks(COUNTS, [str(n) for n in COUNTS])
    ticks = (4, 8, 16, 32, 64, 128, 256, 512)
    ax.set_yticks(ticks, [str(n) for n in ticks])
    ax.minorticks_off()
    ax.legend()
    plt.savefig(OUT)
    print(f"{OUT.name}: {OUT.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
