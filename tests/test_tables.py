"""Tables in documents are those of the results that are committed."""

import pytest
import tables


@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda p: p.parent.name)
def test_tables_are_as_the_results_say(document):
    text = document.read_text()
    assert tables.BLOCK.search(text)
    assert tables.written(text) == text


def test_a_table_is_written_again():
    name = next(tables.RESULTS.glob("moe_*.json")).name
    text = f"before\n<!-- table: moe {name} -->\n| old |\n<!-- end of table -->\nafter\n"
    new = tables.written(text)
    assert "| old |" not in new
    assert "| pro 1 | " in new
    assert new.startswith("before\n<!-- table: moe")
    assert new.endswith("<!-- end of table -->\nafter\n")
