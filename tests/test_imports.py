"""Who may import whom (DESIGN 2), read from the source: nothing is imported here."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mimo_jax", "sharding", "pallas_kernels")
# Not packages of the product: they may import anything and nothing may import them.
PROGRAMS = ("scripts", "notebooks", "tests", "benchmarks")

# What the top-level packages may import of each other.
BETWEEN = {
    "mimo_jax": {"sharding", "pallas_kernels"},
    "sharding": set(),
    "pallas_kernels": set(),
}

# What the modules and subpackages of mimo_jax may import of mimo_jax.  A dot is mimo_jax itself,
# the public names, which only the command line and the programs above use.
WITHIN = {
    "config": set(),
    "quant": set(),
    "tokenizer": {"config"},
    "model": {"config", "quant"},
    "checkpoint": {"config", "quant", "model"},
    "decoding": {"config", "quant", "model", "tokenizer"},
    "planning": {"config", "quant", "model"},
    "engine": {"config", "quant", "model", "decoding", "tokenizer"},
    "language_model": {"config", "quant", "model", "checkpoint", "decoding", "engine", "tokenizer"},
    "api": {
        *("config", "quant", "model", "checkpoint", "decoding", "engine", "tokenizer"),
        "language_model",
    },
    "explore": {"config", "quant", "model", "tokenizer", "language_model"},
    ".": {
        *("config", "quant", "model", "checkpoint", "decoding", "engine", "tokenizer"),
        *("language_model", "api"),
    },
    "portability": {
        *("config", "quant", "model", "checkpoint", "decoding", "engine", "tokenizer"),
        *("language_model", "api", "planning"),
    },
    "cli": {
        *("config", "quant", "model", "checkpoint", "decoding", "engine", "tokenizer"),
        *("language_model", "api", "planning", "portability", "."),
    },
    "__main__": {"cli"},
}


def module_name(path: Path, root: Path = ROOT) -> str:
    """Dotted name of a source file; a package's __init__ has the package's name."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source: str, name: str, is_package: bool) -> Iterator[str]:
    """Dotted names that a module's import statements mention, wherever they stand.

    `from a import b` counts as `a.b`, which may be a module or a name of `a`.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = name.split(".")[: len(name.split(".")) - node.level + is_package]
                base = ".".join([*parents, *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def part_of_mimo_jax(dotted: str, parts: set[str]) -> str:
    """The row of WITHIN that a dotted name belongs to."""
    second = [*dotted.split("."), ""][1]
    return second if second in parts else "."


def violations(source: str, name: str, is_package: bool, parts: set[str]) -> list[str]:
    """A sentence for each import that a module must not make.

    Args:
      source: the module's text.
      name: its dotted name.
      is_package: whether it is an __init__.py.
      parts: modules and subpackages that mimo_jax has.
    """
    top, found = name.split(".")[0], []
    for target in imported_modules(source, name, is_package):
        target_top = target.split(".")[0]
        if target_top in PROGRAMS:
            found.append(f"{name} imports {target}: packages know nothing of {target_top}")
        elif target_top in PACKAGES and target_top != top:
            if target_top not in BETWEEN[top]:
                found.append(f"{name} imports {target}: {top} knows nothing of {target_top}")
        elif target_top == top == "mimo_jax":
            mine, theirs = part_of_mimo_jax(name, parts), part_of_mimo_jax(target, parts)
            if mine != theirs and theirs not in WITHIN[mine]:
                allowed = ", ".join(sorted(WITHIN[mine])) or "nothing"
                found.append(f"{name} imports {target}: {mine} may import {allowed} of mimo_jax")
    return found


def existing_parts() -> set[str]:
    """Modules and subpackages of mimo_jax that are there; folders without Python are data."""
    files = (ROOT / "mimo_jax").rglob("*.py")
    names = {module_name(path).split(".")[1] for path in files if path.stem != "__init__"}
    return names | {p.parent.name for p in (ROOT / "mimo_jax").glob("*/__init__.py")}


FILES = sorted(f for package in PACKAGES for f in (ROOT / package).rglob("*.py"))


def test_every_part_of_mimo_jax_has_a_row():
    unknown = existing_parts() - set(WITHIN)
    assert not unknown, f"give {sorted(unknown)} a row in WITHIN that says what they may import"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_import_directions(path):
    name, is_package = module_name(path), path.name == "__init__.py"
    found = violations(path.read_text(encoding="utf-8"), name, is_package, set(WITHIN))
    assert not found, "\n".join(found)


def test_the_rows_have_no_cycle():
    order: list[str] = []
    while len(order) < len(WITHIN):
        ready = [p for p in WITHIN if p not in order and WITHIN[p] <= set(order)]
        assert ready, f"{set(WITHIN) - set(order)} import each other"
        order += ready
    assert order.index("model") < order.index("decoding") < order.index("engine")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import mimo_jax.cli", "mimo_jax.api"),
        ("from mimo_jax import cli as c", "mimo_jax.engine.batch"),
        ("from mimo_jax.decoding import sampling", "mimo_jax.model.moe"),
        ("from mimo_jax.model.cache import KVCache", "mimo_jax.tokenizer"),
        ("from ..decoding import sampling", "mimo_jax.model.moe"),
        ("from .. import checkpoint", "mimo_jax.model.moe"),
        ("def f():\n    from mimo_jax.model import moe", "mimo_jax.quant"),
        ("from mimo_jax import MiMoConfig", "mimo_jax.model.moe"),
        ("import mimo_jax", "mimo_jax.engine.batch"),
        ("from mimo_jax.engine import batch", "mimo_jax.checkpoint.loading"),
        ("import mimo_jax.config", "sharding.rules"),
        ("from pallas_kernels import moe", "sharding.rules"),
        ("import sharding.mesh as m", "pallas_kernels.moe"),
        ("from tests import golden", "mimo_jax.api"),
        ("import scripts.bench", "pallas_kernels.moe"),
    ],
)
def test_a_forbidden_import_is_found(source, name):
    assert len(violations(source, name, False, set(WITHIN))) == 1


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from mimo_jax.config import MiMoConfig", "mimo_jax.model.moe"),
        ("from mimo_jax.model import cache", "mimo_jax.model.attention"),
        ("from . import cache\nfrom .layers import linear", "mimo_jax.model.attention"),
        ("from pallas_kernels import moe\nimport sharding.mesh", "mimo_jax.model.moe"),
        ("from mimo_jax import quant", "mimo_jax.checkpoint.loading"),
        ("import jax, numpy as np\nfrom flax import nnx", "mimo_jax.config"),
        ("from pallas_kernels import backends", "pallas_kernels.moe"),
    ],
)
def test_an_allowed_import_is_not(source, name):
    assert violations(source, name, False, set(WITHIN)) == []


def test_relative_imports_of_a_package_start_at_itself():
    assert list(imported_modules("from .a import b", "mimo_jax.model", True)) == [
        "mimo_jax.model.a.b"
    ]
    assert list(imported_modules("from .a import b", "mimo_jax.model.c", False)) == [
        "mimo_jax.model.a.b"
    ]
