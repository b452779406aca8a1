"""What Python users meet who get something wrong, in a process where nothing checks types."""

import json
import subprocess
import sys

import pytest

# By what is written, the error's type and a part of what it says.
MISTAKES = {
    'mj.load("mimo-tinny")': ("ModelNotFoundError", "did you mean 'mimo-tiny'"),
    'mj.load("")': ("ModelNotFoundError", "the model's name is empty"),
    "mj.load(None)": ("ModelNotFoundError", "no model or folder called 'None'"),
    'mj.load(dtype="float99")': ("ValueError", "dtype=float99 is not one of bfloat16, float32"),
    'mj.load(qkv="other")': ("ValueError", "'other' is not one of interleaved, plain, split"),
    "mj.load(mesh=4)": ("MeshError", "mesh is 4 of type int; give text such as"),
    'mj.load(mesh={"tensor": 2})': ("MeshError", "of type dict; give text such as"),
    'mj.load(mesh="tensor=2", rules="fast")': ("ShardingError", "no rules are called 'fast'"),
    'mj.load(rules="fast")': ("ShardingError", "no rules are called 'fast'; there are single"),
    'mj.load(kernels="tritn")': ("BackendError", "there are no kernels 'tritn': choose auto"),
    "mj.load(layers=2)": ("ValueError", "give it too"),
    'mj.load("MiMo-V9", random_weights=0)': ("ConfigNotFoundError", "did you mean 'MiMo-V2.5'"),
    "lm.generate(None)": ("TypeError", "a prompt can't be of type NoneType; expected a string"),
    "lm.generate(5)": ("TypeError", "a prompt can't be of type int; expected a string"),
    'lm.generate(b"text")': ("TypeError", "a prompt can't be of type bytes; expected a string"),
    'lm.generate({"role": "user", "content": "x"})': (
        "TypeError",
        "a prompt can't be of type dict",
    ),
    'lm.generate(["a", 5])': ("TypeError", "a prompt can't be of type int; expected a string"),
    'lm.generate("x", 64)': ("TypeError", "64 is of type int; sampling parameters are"),
    'lm.generate("x", {"max_tokens": 5})': (
        "TypeError",
        "type dict; sampling parameters are",
    ),
    'lm.generate("x", [{}])': ("TypeError", "type dict; sampling parameters are"),
    'lm.generate("x", batch_size="4")': ("ValueError", "batch_size is '4'; at least one"),
    'lm.generate("x", max_len=0)': ("ValueError", "no room to generate within the cache's max_len"),
    'lm.generate("x", speculative="mpt")': ("ValueError", 'expected "mtp", "dflash" or None'),
    'lm.generate("x", draft_width=4)': ("ValueError", "give speculative= too"),
    'lm.stream(["a", "b"])': ("TypeError", "a prompt holds 'a' of type str; expected a list"),
    'lm.stream("x", {"n": 2})': ("TypeError", "type dict; sampling parameters are"),
    'lm.stream("x", [mj.SamplingParams()])': (
        "TypeError",
        "type list; sampling parameters are",
    ),
    'lm.logits("text")': ("ValueError", "token_ids must be integers [B, T]"),
    "bare.generate(None)": ("ValueError", "give prompts as lists of token ids"),
    'explore.taps(lm, "x", "atention.*")': (
        "ValueError",
        "unknown taps ['atention.*']: use",
    ),
    "lm.logits([[1], [2, 3]])": ("ValueError", "integers [B, T], found rows that differ"),
    'explore.taps(lm, "x", 5)': ("ValueError", "unknown taps [5]: use hidden.i or attention.i"),
    'explore.taps(lm, "")': ("ValueError", "the prompt is empty"),
}
CODE = """
import json, sys
import mimo_jax as mj
from mimo_jax import explore

lm = mj.load("mimo-tiny")
bare = mj.load("tiny-transformers-test", random_weights=0, layers=1)
found = {}
for mistake in json.load(sys.stdin):
    try:
        eval(mistake)
    except Exception as error:
        found[mistake] = [type(error).__name__, str(error)]
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[str, str]]:
    done = subprocess.run(
        [sys.executable, "-c", CODE], input=json.dumps([*MISTAKES]), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_it_says(found, mistake):
    kind, message = MISTAKES[mistake]
    assert mistake in found, "no error"
    assert found[mistake][0] == kind, found[mistake]
    assert message in found[mistake][1]
