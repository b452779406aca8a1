"""How often each MTP block of mimo-tiny is right, given the backbone's hidden states or a chain's.

mimo-tiny continues pieces of modules that it was not trained on, greedily.  Each block then runs
over what it wrote, with the true tokens before the one that it predicts: once with the backbone's
hidden states, as it was trained, and once with what the block before it has made.
"""

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sources import ROOT, held_out

import mimo_jax as mj
from mimo_jax.explore import plots

PROMPTS, LENGTH, TOKENS = 32, 64, 128


def prompts_of(lm: mj.LanguageModel) -> list[list[int]]:
    """Prompts from modules that the corpus keeps apart."""
    ids = [i for name, text in held_out().items() if "/" not in name for i in lm.encode(text)]
    starts = np.linspace(0, len(ids) - LENGTH, PROMPTS).astype(int)
    return [ids[i : i + LENGTH] for i in starts]


def right(lm: mj.LanguageModel, tokens: np.ndarray, *, chained: bool) -> list[float]:
    """The share of tokens after the prompts that each block predicts."""
    model, blocks = lm.model, lm.mtp.layers
    hidden = model.hidden_states(jnp.asarray(tokens))[0]
    rows = tokens.shape[1] - len(blocks) - 1
    positions = jnp.broadcast_to(jnp.arange(rows), (len(tokens), rows))
    hidden, shares = hidden[:, :rows], []
    for k, block in enumerate(blocks):
        embedded = model.embed(jnp.asarray(tokens[:, k + 1 : k + 1 + rows]))
        made = block(hidden, embedded, positions, None)[0]
        said = np.asarray(model.head(made).argmax(-1))
        there = tokens[:, k + 2 : k + 2 + rows]
        shares.append(float((said == there)[:, LENGTH:].mean()))
        hidden = made if chained else hidden
    return shares


def main() -> None:
    """Draws both, block by block."""
    plt.rcParams.update(plots.STYLE)
    lm = mj.load("mimo-tiny", dtype="float32")
    prompts = prompts_of(lm)
    greedy = mj.SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    outs = lm.generate(prompts, greedy, batch_size=PROMPTS)
    tokens = np.array([p + o.token_ids for p, o in zip(prompts, outs, strict=True)])
    ax = plt.subplots(figsize=(5.6, 2.8))[1]
    for i, (chained, name) in enumerate(
        ((False, "the backbone's hidden states"), (True, "what the block before has made"))
    ):
        shares = right(lm, tokens, chained=chained)
        at = np.arange(len(shares)) + 0.4 * i
        bars = ax.bar(at, shares, 0.38, label=name)
        ax.bar_label(bars, fmt="%.2f", padding=2)
    ax.set_xticks(np.arange(len(shares)) + 0.2, [f"block {k}" for k in range(len(shares))])
    ax.set(ylabel="share of tokens foreseen", ylim=(0, 1.3), yticks=[0, 0.5, 1])
    ax.set_title("mimo-tiny's MTP blocks, given ...")
    ax.legend(loc="upper right")
    ax.figure.savefig(ROOT / "docs" / "images" / "mtp.png", dpi=110)


if __name__ == "__main__":
    main()
