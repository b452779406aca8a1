import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny import exact, tiny

from mimo_jax import explore
from mimo_jax.explore import NamedArray
from mimo_jax.model.taps import AXES

TEXT = "import os\n\n\ndef read(path):\n    with open(path) as f:\n        return f.read()\n"


def test_names_follow_the_config():
    names = explore.tap_names(tiny().config)
    assert len(names) == 8 + 7 + 7 + 8 + 1
    assert "router.0" not in names  # a dense layer
    assert {"hidden.0", "hidden.7", "router.1", "experts.7", "attention.0", "logits"} <= {*names}


def test_taps_are_arrays_with_named_axes():
    lm = tiny()
    seen = explore.taps(lm, TEXT, "hidden.3", "router.*", "experts.2", "attention.1", "logits")
    ids = lm.encode(TEXT)
    T = len(ids)
    sizes = {name: array.sizes for name, array in seen.items()}
    assert sizes["tokens"] == {"batch": 1, "position": T}
    assert sizes["hidden.3"] == {"batch": 1, "position": T, "feature": 256}
    assert sizes["router.7"] == {"batch": 1, "position": T, "expert": 32}
    assert sizes["experts.2"] == {"batch": 1, "position": T, "choice": 4}
    assert sizes["attention.1"] == {"batch": 1, "head": 8, "query": T, "key": T}
    assert sizes["logits"] == {"batch": 1, "position": T, "token": 4096}
    assert seen["tokens"].values.tolist() == [ids]
    assert list(seen) == [
        *("tokens", "hidden.3", *(f"router.{i}" for i in range(1, 8)), "experts.2", "attention.1"),
        "logits",
    ]
    for name, array in seen.items():
        assert array.axes == AXES.get(name.split(".")[0], array.axes)


def test_padding_changes_nothing():
    """The values are those of the plain forward pass of just these tokens."""
    lm = exact()
    ids = np.asarray([lm.encode(TEXT)])
    seen = explore.taps(lm, TEXT, "hidden.7", "attention.2", "logits")
    names = ("hidden.7", "attention.2")
    logits, _, plain = jax.jit(lambda m, t: m(t, taps=names))(lm.model, ids)
    np.testing.assert_allclose(seen["logits"], logits, atol=1e-4)
    for name in names:
        np.testing.assert_allclose(seen[name], plain[name], atol=1e-4)
    np.testing.assert_allclose(seen["logits"], lm.logits(ids), atol=1e-4)


def test_several_texts_of_one_length():
    lm = exact()
    rows = [lm.encode(TEXT)[:9], lm.encode(TEXT)[5:14]]
    seen = explore.taps(lm, rows, "hidden.2")
    assert seen["hidden.2"].shape == (2, 9, 256)
    alone = explore.taps(lm, rows[1], "hidden.2")
    np.testing.assert_allclose(seen["hidden.2"].at(batch=[1]), alone["hidden.2"], atol=1e-4)


def test_nothing_is_computed_that_was_not_asked_for():
    """A forward pass has the same equations, whether or not the package was used before."""
    lm = tiny()
    ids = np.zeros((1, 8), np.int32)

    def program():
        return str(jax.make_jaxpr(lambda m, t: m(t))(lm.model, ids))

    before = program()
    explore.taps(lm, [0] * 8, "attention.*", "hidden.*")
    assert program() == before


@pytest.mark.parametrize(
    ("prompt", "names", "message"),
    [
        (TEXT, ["hidden.8"], r"unknown taps \['hidden.8'\].*below 8"),
        (TEXT, ["hidden.*", "router.0"], r"unknown taps \['router.0'\]"),
        ([0] * 4097, ["hidden.0"], "4097 tokens; give 1 to 4096"),
        ([[1, 2], [3]], ["hidden.0"], r"texts of \[1, 2\] tokens; cut them to one length"),
        ([[4096]], ["hidden.0"], "4096"),
    ],
)
def test_what_is_refused(prompt, names, message):
    with pytest.raises(ValueError, match=message):
        explore.taps(tiny(), prompt, *names)


def test_token_texts_show_what_can_not_be_seen():
    lm = tiny()
    assert explore.token_texts(lm, lm.encode("def f(x):\n    return")) == [
        *("def", "·f", "(x", "):↵", "···", "·return")
    ]


def test_named_arrays():
    a = NamedArray(np.arange(24).reshape(2, 3, 4), ("batch", "head", "key"))
    assert a.at(head=1).axes == ("batch", "key")
    assert a.at(head=1, key=2).values.tolist() == [6, 18]
    assert a.at(key=slice(1, 3)).sizes == {"batch": 2, "head": 3, "key": 2}
    assert a.at(batch=[1]).shape == (1, 3, 4)
    assert a.mean("key", "batch").values.tolist() == [7.5, 11.5, 15.5]
    assert a.mean("key", "batch").axes == ("head",)
    assert float(np.asarray(a.sum())) == 276
    assert np.asarray(a, np.float32).dtype == np.float32
    assert repr(a) == "NamedArray(int64 batch=2, head=3, key=4)"
    with pytest.raises(ValueError, match="no axis 'layer'; the array has batch, head, key"):
        a.at(layer=0)
    with pytest.raises(ValueError, match="give each dimension one name"):
        NamedArray(np.zeros((2, 2)), ("head", "head"))


def test_importing_it_is_free():
    """`import mimo_jax` loads neither the package nor matplotlib, nor does the package draw."""
    code = """
import sys, mimo_jax
assert not [m for m in sys.modules if m.split(".")[0] == "matplotlib" or "explore" in m]
import mimo_jax.explore
assert not [m for m in sys.modules if m.split(".")[0] == "matplotlib"]  # flax has treescope
assert mimo_jax.explore.taps
"""
    subprocess.run([sys.executable, "-c", code], check=True)
