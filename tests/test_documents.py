"""The examples of the documents are compared with what they print (documents.py)."""

import documents
import pytest


@pytest.mark.parametrize(
    ("expected", "printed"),
    [
        ("one\ntwo", "one\ntwo\n"),
        ("one  ", "one\n\n\n"),
        ("took 1.5 s", "took 20.75 s"),
        ("┏━━━━┓\n│ 9.5 │", "┏━━━━━━━━━┓\n│ 1,209.5 │"),
        ("a 1.5\nb   2", "a 10.5\nb    2"),
        ("a ... z", "a b c z"),
        ("first\n...\nlast", "first\n1\n2\nlast"),
        ("first\n...\nlast", "first\nlast"),
        ("first\n...", "first\n1\n2"),
        ("(a+b)*", "(a+b)*"),
        ("", "anything"),
    ],
)
def test_what_is_as_expected(expected, printed):
    assert documents.difference(expected, printed) is None


@pytest.mark.parametrize(
    ("expected", "printed"),
    [
        ("one\ntwo", "one"),
        ("one", "one\ntwo"),
        ("12 tokens", "13 tokens"),
        ("took 1.5 s", "took 2 s"),
        ("  indented", "    indented"),
        ("a ... z", "a b\nz"),
        ("first\n...\nlast", "first\n1"),
        ("a.b", "axb"),
    ],
)
def test_what_is_not(expected, printed):
    wrong = documents.difference(expected, printed)
    assert wrong is not None
    assert expected in wrong
    assert printed in wrong


def test_commands_of_a_console_block():
    block = "$ echo one\none\n$ echo \\\n    two\ntwo\n...\n$ true\n"
    assert documents.commands(block) == [
        ("echo one", "one"),
        ("echo \\\n    two", "two\n..."),
        ("true", ""),
    ]


def test_a_console_block_begins_with_a_command():
    with pytest.raises(ValueError, match=r"begins with a command after a \$"):
        documents.commands("one\n$ echo one\n")


def test_a_document_whose_example_is_wrong_fails(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nprint(6 * 7)\n```\n\n```output\n41\n```\n\n"
        '<!-- skip: next "there is no such command" -->\n\n'
        "```console\n$ no-such-command\n0\n```\n\n"
        "```console\n$ ls scripts/tables.py\nscripts/table.py\n```\n"
    )
    document = documents.EXAMPLES.parse(page)
    documents.setup(document.namespace)
    results = []
    try:
        for example in document.examples():
            try:
                example.evaluate()
                results.append("as shown")
            except Exception as error:
                results.append(type(error).__name__)
    finally:
        documents.teardown(document.namespace)
    assert results == ["as shown", "SybilFailure", "as shown", "SkipTest", "SybilFailure"]
