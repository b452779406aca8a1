"""Attention in float64, one query and head at a time (MODEL_SPEC 2.7 to 2.9)."""

import numpy as np


def loop(
    q, k, v, q_positions, k_positions, window=None, sink=None
) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [B, T, N, V] and weights [B, N, T, S] of heads in a row: q [B, T, N, H], sink [N].

    A negative position marks a key or a query that isn't there.
    """
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    batch, t, heads, dim = q.shape
    groups = heads // k.shape[2]
    out = np.zeros((batch, t, heads, v.shape[-1]))
    weights = np.zeros((batch, heads, t, k.shape[1]))
    for b, i, h in np.ndindex(batch, t, heads):
        at = q_positions[b, i]
        seen = [
            j
            for j, p in enumerate(k_positions[b])
            if 0 <= p <= at and (window is None or at - p < window)
        ]
        scores = np.array([q[b, i, h] @ k[b, j, h // groups] for j in seen]) / np.sqrt(dim)
        logits = scores if sink is None else np.append(scores, float(sink[h]))
        if not seen:
            continue
        p = np.exp(logits - logits.max())
        p = (p / p.sum())[: len(seen)]
        weights[b, h, i, seen] = p
        out[b, i, h] = p @ v[b, seen, h // groups]
    return out, weights


def assert_is_the_loop(got, case, given, sink) -> None:
    """A result [B, T, K, G, V] in float32 is that of `loop` with the case's window.

    Args:
      given: q, k, v, and the positions of queries and keys.
      sink: [K, G] or None.
    """
    q, *rest = given
    q = q.reshape(*q.shape[:2], -1, q.shape[-1])
    sink = None if sink is None else np.asarray(sink).reshape(-1)
    expected, _ = loop(q, *rest, window=case.window, sink=sink)
    # Of scores that reach thousands float32 keeps a few digits after the point.
    atol = max(1e-6, 1e-6 * case.logits) * np.abs(expected).max()
    np.testing.assert_allclose(got.reshape(expected.shape), expected, atol=atol, rtol=0)
