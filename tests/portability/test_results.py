"""results.json: what is written is read again, and what is something else is refused."""

import dataclasses
import json
from typing import Any

import pytest
import study_samples as samples
from hypothesis import given
from hypothesis import strategies as st

from mimo_jax.portability import schema
from mimo_jax.portability.results import STAGES, Results, ResultsError, Row, Stage


def equal(a: Results, b: Results) -> bool:
    """Also where numbers are NaN."""
    return repr(a) == repr(b)


@pytest.mark.parametrize("results", [samples.every(), samples.large(), Results((), ())])
def test_a_study_is_read_as_it_was_written(results, tmp_path):
    assert equal(Results.from_json(results.to_json()), results)
    results.write(tmp_path / "new" / "folder")
    assert equal(Results.read(tmp_path / "new" / "folder"), results)
    assert equal(Results.read(tmp_path / "new" / "folder" / "results.json"), results)


@given(st.text(), st.text(min_size=1), st.floats(), st.sampled_from(["failed", "not run"]))
def test_any_text_and_number_survives(case, reason, seconds, status):
    stages = samples.stages("compile", status, reason)
    row = samples.measured(case=case, stages=stages, seconds=seconds)
    results = Results((samples.RUN,), (row,))
    assert equal(Results.from_json(results.to_json()), results)


def broken(change) -> str:
    """The text of a study after a change to its plain data."""
    data: Any = json.loads(samples.every().to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda d: d.pop("schema"), "have a schema"),
        (lambda d: d.update(schema=0), "another version"),
        (lambda d: d.pop("runs"), "runs"),
        (lambda d: d.update(more=1), "more"),
        (lambda d: d.update(rows={}), "no list"),
        (lambda d: d.update(rows="abc"), "no list"),
        (lambda d: d["rows"].append(3), "items"),
        (lambda d: d["rows"][0].update(run=7), "belongs to no run"),
        (lambda d: d["rows"][0].update(run=-1), "belongs to no run"),
        (lambda d: d["rows"][0].update(devices=1.5), "1.5 is not int"),
        (lambda d: d["rows"][0].update(devices=True), "True is not int"),
        (lambda d: d["rows"][0].update(case=None), "None is not str"),
        (lambda d: d["rows"][0]["stages"].pop("time"), "needs the stages"),
        (lambda d: d["rows"][0]["stages"].update(fly={"status": "ok"}), "needs the stages"),
        (lambda d: d["rows"][0]["stages"]["trace"].update(status="fine"), "'fine' is none of"),
        (lambda d: d["rows"][0]["stages"]["trace"].update(reason=""), "needs a reason"),
        (lambda d: d["rows"][-1]["program"].update(spills="abc"), "no list"),
        (lambda d: d["slices"][0]["rooms"][0].update(fits=1), "1 is not bool"),
    ],
)
def test_something_else_is_refused(change, why):
    with pytest.raises(ResultsError, match=why):
        Results.from_json(broken(change))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"schema"', "[" * 100_000])
def test_no_study_at_all_is_refused(text):
    with pytest.raises(ResultsError):
        Results.from_json(text)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=9))
def test_any_value_in_any_place_is_read_or_refused(value):
    for name in ("runs", "rows", "slices"):
        try:
            Results.from_json(broken(lambda d, name=name: d.update({name: value})))
        except ResultsError:
            pass
        else:
            assert value == [] or name == "slices"


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ResultsError, match=r"results\.json can't be read"):
        Results.read(tmp_path)
    (tmp_path / "results.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ResultsError, match=r"results\.json can't be read"):
        Results.read(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ResultsError, match=r"results\.json: no results"):
        Results.read(tmp_path)


def test_joined_rows_keep_their_run():
    first = Results((samples.RUN,), (samples.row(case="a"), samples.row(case="b")))
    later = dataclasses.replace(samples.RUN, at="2026-08-01T00:00:00Z")
    second = Results((later,), (samples.measured(case="b"), samples.row(case="c")))
    both = first.joined(second)
    assert {row.case: both.runs[row.run].at for row in both} == {
        "a": samples.RUN.at,
        "b": later.at,
        "c": later.at,
    }
    assert next(row for row in both if row.case == "b").speed is not None


@pytest.mark.parametrize("last", STAGES)
def test_reached_is_the_last_stage_that_was_run(last):
    assert samples.row(stages=samples.stages(last)).reached[0] == last
    failed = samples.row(stages=samples.stages(last, "failed", "why"))
    assert failed.reached == (last, Stage("failed", "why", 1.5))


def test_reached_of_nothing_is_the_first_stage():
    stages = samples.stages("trace", "not run", "no time")
    assert samples.row(stages=stages).reached == ("trace", Stage("not run", "no time"))


def test_a_row_needs_all_stages():
    with pytest.raises(ValueError, match="needs the stages"):
        Row("moe", "1", "cpu", 1, "", "reference", {"trace": Stage("ok")})


def test_every_field_of_the_schema_has_a_meaning():
    """It is read from docstrings, which are easily forgotten."""
    entries = list(schema.entries())
    without = [f"{e.name}.{name}" for e in entries for name, _, text in e.fields if not text]
    assert not without
    assert all(entry.text for entry in entries)
    assert "None" not in "".join(text for e in entries for _, _, text in e.fields)


def test_the_schema_has_every_class_and_type():
    """All that can occur in a file, found by walking through one."""
    data: Any = json.loads(samples.every().to_json())
    fields = {e.name: {name for name, _, _ in e.fields} for e in schema.entries()}
    assert fields["Results"] == set(data) - {"schema"}
    assert fields["Row"] == set(data["rows"][0])
    assert fields["Slice"] == set(data["slices"][0])
    kinds = {name: kind for e in schema.entries() for name, kind, _ in e.fields}
    assert kinds["stages"] == "object: string to Stage"
    assert kinds["spills"] == "list of string"
    assert kinds["code_bytes"] == "integer or null"
    assert kinds["seconds"] in ("number", "number or null")
