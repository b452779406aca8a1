"""Links of the documentation into the code (scripts/site_hooks.py)."""

import logging
from types import SimpleNamespace

import pytest

hooks = pytest.importorskip("site_hooks", reason="needs the extra docs")


def rendered(markdown: str, page: str = "concepts/windows.md") -> str:
    where = SimpleNamespace(file=SimpleNamespace(src_uri=page), meta={})
    return hooks.on_page_markdown(markdown, where)


def test_a_name_in_the_code_is_a_link_to_its_line():
    definitions = hooks.definitions("scripts/site_hooks.py")
    source = (hooks.ROOT / "scripts/site_hooks.py").read_text().splitlines()
    assert source[definitions["definitions"] - 1].startswith("def definitions(")
    assert rendered("[that](../../scripts/site_hooks.py#definitions)") == (
        '<a href="../source/scripts/site_hooks.py.html'
        f'#__codelineno-0-{definitions["definitions"]}">that</a>'
    )


def test_methods_and_variables_are_found():
    found = hooks.definitions("mimo_jax/language_model.py")
    assert {"LanguageModel.stream", "Prompt"} <= set(found)


@pytest.mark.parametrize(
    ("link", "warning"),
    [
        ("[x](../../scripts/site_hooks.py#nothing)", "which that file does not define"),
        ("[x](../../scripts/nothing.py)", "which is not in the repository"),
        ("[x](../../../outside.py)", "which is not in the repository"),
    ],
)
def test_a_link_to_nothing_is_a_warning(caplog, link, warning):
    with caplog.at_level(logging.WARNING):
        rendered(link)
    assert warning in caplog.text


def test_links_to_pages_from_elsewhere_and_to_pictures():
    assert rendered("[b](../../benchmarks/README.md#kernels)") == "[b](../benchmarks.md#kernels)"
    assert rendered("![p](../images/portability.png)") == "![p](../images/portability.png)"
    assert rendered("[b](docs/batch.md)", "readme.md") == "[b](batch.md)"


def test_code_is_left_alone_and_formulas_are_drawn():
    block = "```python\n[x](nothing.py)\n```"
    assert rendered(block) == block
    assert rendered("$`x_1`$").startswith("<span><math")
    assert "<math" in hooks.math_block("x_1\n")
