"""Comparing studies: what changed, and what of it is a regression."""

import dataclasses
from typing import Any

import pytest
import study_samples as samples
from hypothesis import given
from hypothesis import strategies as st

from mimo_jax.portability.compare import Comparison, compare
from mimo_jax.portability.results import STAGES, Exchange, Results, Row, Status


def study(*rows: Row, **run: Any) -> Results:
    return Results((dataclasses.replace(samples.RUN, **run),), rows)


def changes(comparison: Comparison) -> dict[str, int]:
    """How many changes of each kind."""
    skipped = ("circumstances", "shared", "compared")
    fields = [f.name for f in dataclasses.fields(comparison) if f.name not in skipped]
    return {name: len(getattr(comparison, name)) for name in fields if getattr(comparison, name)}


@pytest.mark.parametrize("results", [samples.every(), samples.large(), Results((), ())])
def test_a_study_is_as_itself(results):
    comparison = compare(results, results)
    assert comparison.same
    assert changes(comparison) == {}
    assert comparison.circumstances == ()
    assert comparison.compared == len(results.rows)


def ended(stage: str, status: Status) -> Row:
    reason = "" if status == "ok" else f"<{status}> | because"
    return samples.row(stages=samples.stages(stage, status, reason))  # pyright: ignore


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        ("ok", "failed", "regressions"),
        ("ok", "refused", "regressions"),
        ("ok", "not run", "not_run"),
        ("failed", "ok", "repairs"),
        ("refused", "ok", "repairs"),
        ("not run", "ok", "statuses"),
        ("failed", "refused", "statuses"),
        ("not run", "failed", "statuses"),
        ("failed", "not run", "statuses"),
    ],
)
def test_each_change_of_a_status_is_of_one_kind(stage, before, after, kind):
    comparison = compare(study(ended(stage, before)), study(ended(stage, after)))
    assert changes(comparison) == {kind: 1}
    change = getattr(comparison, kind)[0]
    assert (change.what, change.before, change.after) == (stage, before, after)
    assert "because" in change.reason
    assert f"{stage}: {before} -> {after}" in comparison.markdown()


def test_what_follows_from_a_regression_is_not_told():
    """A row that was timed and doesn't compile any more isn't checked or timed either."""
    broken = samples.row(stages=samples.stages("compile", "failed", "new"), program=None)
    comparison = compare(study(samples.measured()), study(broken))
    assert changes(comparison) == {"regressions": 1}
    assert comparison.markdown().index("Regressions") < comparison.markdown().index("compile: ok")


def test_what_was_not_run_is_no_regression():
    comparison = compare(study(samples.measured()), study(samples.row()))
    assert [change.what for change in comparison.not_run] == ["agree", "time"]
    assert comparison.regressions == ()
    assert "No regressions; 1 row in both studies." in comparison.markdown()


def test_rows_appear_and_vanish():
    old, new = samples.row(case="old"), samples.row(case="new")
    comparison = compare(study(samples.row(), old), study(samples.row(), new))
    assert (comparison.appeared, comparison.vanished) == ((new,), (old,))
    assert changes(comparison) == {"appeared": 1, "vanished": 1}
    assert "- moe (new) by triton on h100: compiles" in comparison.markdown()


@pytest.mark.parametrize(("gib", "told"), [(1.005, 0), (1.02, 1), (0.98, 1)])
def test_memory_over_a_hundredth(gib, told):
    a = study(samples.row(program=samples.program(1, 0)))
    b = study(samples.row(program=samples.program(gib, 0)))
    assert len(compare(a, b).memory) == told
    assert compare(a, b).regressions == ()


def test_a_program_that_does_not_fit_any_more_is_a_regression():
    a = study(samples.row(program=samples.program(usable=2)))
    b = study(samples.row(program=samples.program(usable=1)))
    comparison = compare(a, b)
    assert [c.before for c in comparison.regressions] == ["fits: 1.60 GiB of 2.00 GiB"]
    assert [c.after for c in comparison.regressions] == ["too large: 1.60 GiB of 1.00 GiB"]
    assert changes(compare(b, a)) == {}


def test_what_programs_are_made_of():
    a = samples.program(collectives={"all-reduce": Exchange(3, 8)}, spills=("x",))
    b = samples.program(
        collectives={"all-reduce": Exchange(4, 8), "all-to-all": Exchange(1, 2**20)},
        kernels={"mosaic_gpu": 2},
        fusions=18,
        library_calls=3,
    )
    found = compare(study(samples.row(program=a)), study(samples.row(program=b))).programs
    assert {c.what: (c.before, c.after) for c in found} == {
        "all-reduce": ("3 of 8 B", "4 of 8 B"),
        "all-to-all": ("none", "1 of 1.0 MiB"),
        "kernels of triton": ("3", "0"),
        "kernels of mosaic_gpu": ("0", "2"),
        "fusions": ("17", "18"),
        "library calls": ("2", "3"),
        "spills": ("x", "none"),
    }


def test_speed_over_a_twentieth_slower_ones_first():
    times = {"same": (1e-4, 1.04e-4), "faster": (1e-4, 5e-5), "slower": (1e-4, 1.5e-4)}
    a = study(*(samples.measured(x, case=case) for case, (x, _) in times.items()))
    b = study(*(samples.measured(y, case=case) for case, (_, y) in times.items()))
    found = compare(a, b)
    assert [change.row.case for change in found.speed] == ["slower", "faster"]
    assert found.speed[0].after == "150 us, 53% of roofline (+50%)"
    assert changes(found) == {"speed": 2}


def test_errors_larger_ones_first():
    errors = {"same": (1e-3, 1.05e-3), "better": (2e-3, 1e-3), "worse": (1e-3, 4e-3)}
    errors |= {"lost": (1e-3, float("nan")), "still lost": (float("nan"), float("nan"))}
    a = study(*(samples.measured(error=x, case=case) for case, (x, _) in errors.items()))
    b = study(*(samples.measured(error=y, case=case) for case, (_, y) in errors.items()))
    found = compare(a, b)
    assert [change.row.case for change in found.errors] == ["lost", "worse", "better"]
    assert changes(found) == {"errors": 3}


def test_circumstances_come_first():
    new = {**samples.RUN.versions, "jax": "0.12.0"}
    b = study(samples.row(), versions=new, devices={}, commit="fedcba", at="2026-08-01T00:00:00Z")
    found = compare(study(samples.row()), b)
    assert {what: (x, y) for what, x, y in found.circumstances} == {
        "when": (samples.RUN.at, "2026-08-01T00:00:00Z"),
        "commit": (samples.RUN.commit, "fedcba"),
        "devices": ("1 x NVIDIA H100 80GB HBM3", "CPU only"),
        "jax": ("0.11.2", "0.12.0"),
    }
    text = found.markdown()
    assert text.index("jax: 0.11.2 -> 0.12.0") < text.index("The same in both: CPU AMD EPYC 9654")


def test_targets_of_other_names():
    a = study(samples.measured(), samples.row(target="v5e"))
    b = study(samples.measured(5e-5, target="h200"), samples.row(target="v5e"))
    assert changes(compare(a, b)) == {"appeared": 1, "vanished": 1}
    found = compare(a, b, targets={"h100": "h200"})
    assert found.compared == 2
    assert changes(found) == {"speed": 1}
    assert found.speed[0].row.target == "h200"


def test_targets_of_one_study_are_compared():
    both = study(samples.measured(), samples.measured(5e-5, target="h200"))
    found = compare(both, both, targets={"h100": "h200"})
    assert (found.compared, changes(found)) == (1, {"speed": 1})


@pytest.mark.parametrize(
    ("targets", "why"),
    [
        ({"h300": "h200"}, "the first study has no target h300; it has h100, v5e"),
        ({"h100": "h300"}, "the second study has no target h300; it has h200"),
        ({"h100": "h200", "v5e": "h200"}, "can't be one"),
    ],
)
def test_wrong_names_of_targets_are_refused(targets, why):
    a = study(samples.row(), samples.row(target="v5e"))
    with pytest.raises(ValueError, match=why):
        compare(a, study(samples.row(target="h200")), targets)


def test_slices_that_changed():
    a = samples.every()
    held, other, none = a.slices
    larger = dataclasses.replace(held, topology="4x4x8")
    found = compare(a, dataclasses.replace(a, slices=(larger, none))).slices
    assert [(what, x[:5], y[:5]) for what, x, y in found] == [
        ("MiMo-V2.5-Pro on v5p", "4x4x4", "4x4x8"),
        (f"{other.model} on tpu7x", "4x4x4", "not i"),
    ]


def test_nothing_in_common_is_said():
    text = compare(study(samples.row(case="a")), study(samples.row(case="b"))).markdown()
    assert "Nothing could be compared" in text


ROWS = list(samples.every().rows)


@given(st.lists(st.sampled_from(ROWS)), st.lists(st.sampled_from(ROWS)))
def test_every_row_is_accounted_for(first, second):
    a, b = {row.key: row for row in first}, {row.key: row for row in second}
    found = compare(study(*a.values()), study(*b.values()))
    assert found.compared + len(found.appeared) == len(b)
    assert found.compared + len(found.vanished) == len(a)
    back = compare(study(*b.values()), study(*a.values()))
    assert {row.key for row in found.appeared} == {row.key for row in back.vanished}
    assert "<" not in found.markdown().replace("\\<", "")
