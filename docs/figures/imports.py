"""Draws who may import whom: `python docs/figures/imports.py`.

From the table that tests/test_imports.py enforces.  An arrow leads to what a part may import; what
can be reached by further arrows is left out, so the drawing has as few of them as say it all.
"""

import ast
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve

from mimo_jax.explore.plots import FULL, INK, PALE, SLIDING, STYLE

ROOT = Path(__file__).resolve().parents[2]
NAMES = {".": "mimo_jax\n(public names)"}
WIDTH, HEIGHT, ROW, COLUMN = 1.5, 0.42, 0.74, 1.8


def table(name: str) -> dict[str, set[str]]:
    """A table of tests/test_imports.py, which is not imported for it."""
    source = ast.parse((ROOT / "tests" / "test_imports.py").read_text(encoding="utf-8"))
    for node in source.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return eval(ast.unparse(node.value))
    raise KeyError(name)


def behind(allowed: dict[str, set[str]], part: str) -> set[str]:
    """What can be reached from a part in any number of steps."""
    return allowed[part].union(*(behind(allowed, p) for p in allowed[part]))


def arrows(allowed: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Those that say all the others."""
    return [
        (a, b)
        for a in allowed
        for b in sorted(allowed[a])
        if not any(b in behind(allowed, c) for c in allowed[a])
    ]


def heights(allowed: dict[str, set[str]]) -> dict[str, int]:
    """The row of each part, above all that it may import."""
    found: dict[str, int] = {}
    while len(found) < len(allowed):
        for part, below in allowed.items():
            if below <= found.keys():
                found.setdefault(part, 1 + max((found[b] for b in below), default=-1))
    return found


def places(
    rows: dict[str, int], edges: list[tuple[str, str]]
) -> tuple[dict[Any, tuple[float, float]], list[list[Any]]]:
    """Where boxes and bends are, and each arrow's way through them.

    An arrow that passes rows has a bend in each, which takes a place as a box does; rows are then
    sorted by the means of what they are connected with, below and above in turn.
    """
    ways = [[a, *((a, b, r) for r in range(rows[a] - 1, rows[b], -1)), b] for a, b in edges]
    row_of: dict[Any, int] = dict(rows) | {p: p[2] for way in ways for p in way[1:-1]}
    order = {r: sorted((p for p in row_of if row_of[p] == r), key=str) for r in {*rows.values()}}
    x = {p: i - (len(row) - 1) / 2 for row in order.values() for i, p in enumerate(row)}
    near: dict[Any, list[Any]] = {p: [] for p in row_of}
    for way in ways:
        for a, b in pairwise(way):
            near[a].append(b)
            near[b].append(a)
    for turn in range(12):
        step = 1 if turn % 2 == 0 else -1
        for r in sorted(order, reverse=step < 0):
            beside = {p: [x[q] for q in near[p] if row_of[q] == r - step] for p in order[r]}
            wish = {p: sum(xs) / len(xs) if xs else x[p] for p, xs in beside.items()}
            order[r].sort(key=lambda p: wish[p])
            middle = sum(wish.values()) / len(wish)
            for i, p in enumerate(order[r]):
                x[p] = middle + i - (len(order[r]) - 1) / 2
    for _, *bends, _ in ways:  # as straight as the outermost bend allows
        x |= dict.fromkeys(bends, max((x[p] for p in bends), key=abs, default=0.0))
    return {p: (COLUMN * x[p], ROW * row_of[p]) for p in row_of}, ways


def box(ax: Any, at: tuple[float, float], text: str, colour: str, **style: Any) -> None:
    """A name in a box around a point."""
    corner = (at[0] - WIDTH / 2, at[1] - HEIGHT / 2)
    patch = FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.08")
    patch.set(facecolor="white", edgecolor=colour, linewidth=1.3, **style)
    ax.add_patch(patch)
    ax.text(*at, text, ha="center", va="center", fontsize=9, linespacing=1.1)


def arrow(ax: Any, points: list[tuple[float, float]], colour: str = PALE) -> None:
    """A smooth line down through points, with a head."""
    (x0, y0), *middle, (x1, y1) = points
    points = [(x0, y0 - HEIGHT / 2), *middle, (x1, y1 + HEIGHT / 2 + 0.1)]
    vertices, codes = [points[0]], [Curve.MOVETO]
    for (xa, ya), (xb, yb) in pairwise(points):
        vertices += [(xa, (ya + yb) / 2), (xb, (ya + yb) / 2), (xb, yb)]
        codes += [Curve.CURVE4] * 3
    ax.add_patch(PathPatch(Curve(vertices, codes), facecolor="none", edgecolor=colour, lw=1.2))
    x, y = x1, y1 + HEIGHT / 2
    ax.fill([x, x - 0.06, x + 0.06], [y + 0.02, y + 0.13, y + 0.13], color=colour, lw=0)


def main() -> None:
    """Writes docs/images/imports.svg."""
    within, between = table("WITHIN"), table("BETWEEN")
    at, ways = places(heights(within), arrows(within))
    xs, ys = zip(*at.values())
    left, right = min(xs) - WIDTH / 2 - 0.25, max(xs) + WIDTH / 2 + 0.25
    bottom, top = min(ys) - HEIGHT / 2 - 0.25, max(ys) + HEIGHT / 2 + 0.45
    plt.rcParams.update(STYLE | {"svg.hashsalt": "imports"})
    fig, ax = plt.subplots(figsize=(right - left + 0.2, top - bottom + 1.4))
    frame = FancyBboxPatch(
        (left, bottom), right - left, top - bottom, boxstyle="round,pad=0,rounding_size=0.1"
    )
    frame.set(facecolor="none", edgecolor=INK, linewidth=1)
    ax.add_patch(frame)
    ax.text(left + 0.15, top - 0.15, "mimo_jax", ha="left", va="top", weight="bold")
    for way in ways:
        arrow(ax, [at[p] for p in way])
    for part in within:
        # Not all that lies behind its arrows is allowed.
        limited = within[part] != behind(within, part)
        style = {"linestyle": "--"} if limited else {}
        box(ax, at[part], NAMES.get(part, part), FULL, **style)
    others = sorted(between["mimo_jax"])
    for i, other in enumerate(others):
        x = (left + right) / 2 + (i - (len(others) - 1) / 2) * 2 * COLUMN
        box(ax, (x, bottom - 0.75), other, SLIDING)
        arrow(ax, [(x, bottom + HEIGHT / 2), (x, bottom - 0.75)], SLIDING)
    ax.set(xlim=(left - 0.05, right + 0.05), ylim=(bottom - 1.05, top + 0.1), aspect="equal")
    ax.axis("off")
    out = ROOT / "docs" / "images" / "imports.svg"
    fig.savefig(out, metadata={"Date": None})
    print(f"{out.relative_to(ROOT)}: {out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
