"""A report: it says all that the study has, and shows characters as they are."""

import errno
import functools
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import study_samples as samples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimo_jax.portability import report, wording
from mimo_jax.portability.html import html
from mimo_jax.portability.markdown import escaped, fenced, markdown
from mimo_jax.portability.reasons import Reasons
from mimo_jax.portability.report import write_report
from mimo_jax.portability.results import STAGES, Results

STUDIES = {
    "every": samples.every(),
    "large": samples.large(),
    "empty": Results((), ()),
    "no rows": Results((samples.RUN,), ()),
}
_VOID = {"meta", "br", "rect", "line"}


class Page(HTMLParser):
    """A page's elements and text; refuses elements that aren't closed in their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.attributes: set[str] = set()
        self.pieces: list[str] = []
        self.cells: list[int] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.links += [value for name, value in attrs if name == "href" and value]
        if tag == "tr":
            self.cells.append(0)
        if tag in ("td", "th"):
            self.cells[-1] += 1
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return words("".join(self.pieces))


@functools.cache
def markup(name: str) -> str:
    return html(STUDIES[name])


@functools.cache
def page_of(name: str) -> Page:
    return Page(markup(name))


@functools.cache
def text_of(name: str) -> str:
    return markdown(STUDIES[name])


@pytest.mark.parametrize("name", STUDIES)
def test_the_page_is_well_formed_and_needs_nothing_else(name):
    text, page = markup(name), page_of(name)
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert not page.tags & {"script", "img", "link", "iframe", "object", "b>"}
    assert not page.attributes & {"src", "onclick", "onerror", "style"}
    assert not re.search(r"url\(|@import|https?:", text)


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("kind", ["markdown", "html"])
def test_every_row_appears(name, kind):
    text = page_of(name).text if kind == "html" else unescaped(text_of(name))
    for row in STUDIES[name]:
        assert wording.subject(row) in text
        assert wording.outcome(row) in text
        assert wording.place(row) in text
        assert wording.line(row.backend) in text


def words(text: str) -> str:
    """A text without regard to where its lines end."""
    return " ".join(text.split())


def unescaped(text: str) -> str:
    """Markdown of `escaped` as a reader sees it."""
    return re.sub(r"\\([\\`*\[\]<>|~&#$_])", r"\1", text)


@pytest.mark.parametrize("name", STUDIES)
def test_every_reason_appears_once_with_its_rows(name):
    results = STUDIES[name]
    reasons = list(Reasons.of(results))
    assert [reason.number for reason in reasons] == list(range(1, len(reasons) + 1))
    told = {
        (row.key, stage) for reason in reasons for row, stages in reason.places for stage in stages
    }
    assert told == {(row.key, s) for row in results for s in STAGES if row.stages[s].status != "ok"}
    page, text = page_of(name), text_of(name)
    for reason in reasons:
        assert words(wording.excerpt(reason.text)) in words(text)
        assert wording.headline(reason.text) in page.text
        assert page.ids.count(f"r{reason.number}") == 1
        assert len(re.findall(rf"^### R{reason.number}$", text, re.MULTILINE)) == 1
        for where in reason.where():
            assert where in page.text


def test_reasons_are_failures_first():
    statuses = [reason.status for reason in Reasons.of(samples.every())]
    assert statuses == sorted(statuses, key=["failed", "refused", "not run"].index)
    assert set(statuses) == {"failed", "refused", "not run"}


def test_a_reason_names_cases_and_targets_together():
    stages = samples.stages("compile", "failed", "why")
    rows = [samples.row(case=c, target=t, stages=stages) for c in "ab" for t in ("v4", "v5e")]
    (first, *_) = Reasons.of(Results((samples.RUN,), tuple(rows)))
    assert list(first.where()) == ["moe (a; b) by triton on v4; v5e: compile"]
    assert first.summary() == "failed: 4 stages of 4 rows"


def test_a_long_message_is_cut_and_says_so():
    text = text_of("every")
    assert "%14 = vector" in text
    assert "%200 = vector" not in text
    left = len(samples.LONG) - len("\n".join(samples.LONG.splitlines()[:16]))
    assert f"[{left:,} more characters in results.json]" in text
    assert "%90 = vector" in markup("every")
    assert "%399 = vector" not in markup("every")


@pytest.mark.parametrize("name", STUDIES)
def test_tables_are_rectangular(name):
    tables = re.findall(r"(?:^\|.*\|\n)+", text_of(name), re.MULTILINE)
    assert tables
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


@pytest.mark.parametrize("write", [markdown, html])
def test_what_was_not_run_is_marked(write):
    """No cell is empty, and none claims what nobody tried."""
    text = write(samples.every())
    assert "|  |" not in text
    assert "<td></td>" not in text
    assert "<div></div>" not in text
    alone = samples.row(stages=samples.stages("trace", "not run", "no time"), program=None)
    text = write(Results((samples.RUN,), (alone,)))
    assert "○ not run" in text
    assert not re.search("✓ (agrees|compiles|fits)[^,]", text.split("At a glance")[-1])


def test_an_empty_study_says_so():
    for text in (markdown(Results((), ())), html(Results((), ()))):
        assert "The study has no rows: nothing was tried." in text
        assert "Nothing was compiled" in text
        assert "everything is ok" in text


def test_memory_and_speed_are_drawn():
    text = markup("every")
    assert 'id="plot-memory"' in text
    assert 'id="plot-roofline"' in text
    assert "✗ too large: 131.54 GiB of 95.73 GiB" in text
    assert "80% in 100 us" in text


@pytest.mark.parametrize("name", ["every", "large"])
def test_bars_end_within_the_plot(name):
    """The large study has programs of more than twice a device's memory."""
    bars = re.findall(r'x="([0-9.]+)%" width="([0-9.]+)%"', markup(name))
    assert bars
    assert all(float(x) >= 0 and float(x) + float(width) <= 100.02 for x, width in bars)


@pytest.mark.parametrize("name", STUDIES)
def test_every_error_and_time_is_in_a_table(name):
    page, text = page_of(name).text, unescaped(text_of(name))
    for row in STUDIES[name]:
        who = f"{wording.subject(row)} | {wording.place(row)} | {wording.line(row.backend)}"
        for measured, word in ((row.agreement, wording.error), (row.speed, wording.duration)):
            if measured is not None:
                value = getattr(measured, "error", None) or getattr(measured, "seconds", 0.0)
                assert word(value) in page
                assert re.search(rf"^\| {re.escape(who)} \|.*{re.escape(word(value))}", text, re.M)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (samples.measured(), "agrees, 80% of roofline"),
        (samples.measured(roofline=None), "agrees, 100 us"),
        (samples.row(), "compiles"),
        (samples.row(stages=samples.stages("agree")), "agrees"),
        (samples.row(stages=samples.stages("compile", "failed", "x")), "fails to compile"),
        (samples.row(stages=samples.stages("compile", "refused", "x")), "refused"),
        (samples.row(stages=samples.stages("agree", "failed", "x")), "disagrees"),
        (samples.row(stages=samples.stages("lower", "not run", "x")), "traces"),
        (samples.row(stages=samples.stages("trace", "not run", "x")), "not run"),
        (
            samples.measured(
                stages={**samples.stages("time"), "agree": samples.Stage("not run", "x")}
            ),
            "not checked, 80% of roofline",
        ),
    ],
)
def test_a_row_in_a_few_words(row, words):
    assert wording.outcome(row) == words


odd = st.text() | st.sampled_from([samples.ODD, samples.LONG, "</pre>", "```", "a|b", "&lt;"])


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(odd, odd, odd.filter(bool), st.sampled_from(STAGES))
def test_any_text_is_shown_as_text(case, target, reason, stage):
    stages = samples.stages(stage, "failed", reason)
    row = samples.row("moe", case, target, stages=stages)
    results = Results((samples.RUN,), (row,))
    page = Page(html(results))
    assert page.tags <= page_of("every").tags
    assert wording.line(case) in page.text
    assert wording.headline(reason) in page.text
    tables = re.findall(r"(?:^\|.*\|\n)+", markdown(results), re.MULTILINE)
    assert all(len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", r)) for r in t.splitlines()}) == 1
               for t in tables)  # fmt: skip


@given(st.text())
def test_escaped_markdown_reads_as_it_was(text):
    assert unescaped(escaped(text)) == wording.line(text, 10**9)
    assert not re.search(r"(?<!\\)(?:\\\\)*[<|`]", escaped(text))


@given(st.text(alphabet="`~a\n"))
def test_a_fence_is_longer_than_what_it_has(text):
    first, *_, last = fenced(text).splitlines()
    assert last == first.removesuffix("text")
    assert last not in text


@given(st.text())
def test_plain_text_has_no_control_characters(text):
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", wording.plain(text))
    wording.plain(text).encode()


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (1.5 * 2**20, "1.5 MiB"),
        (95.73 * 2**30, "95.73 GiB"),
        (2**40, "1,024.00 GiB"),
    ],
)
def test_sizes(nbytes, text):
    assert wording.size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00 us"),
        (1.234e-6, "1.23 us"),
        (12.34e-6, "12.3 us"),
        (999.96e-6, "1.00 ms"),
        (0.5, "500 ms"),
        (59.94, "59.9 s"),
        (99.6, "1 min 40 s"),
        (4000, "66 min 40 s"),
        (float("nan"), "nan s"),
    ],
)
def test_durations(seconds, text):
    assert wording.duration(seconds) == text


@pytest.mark.parametrize(
    ("fraction", "text"), [(0, "0.0%"), (0.0312, "3.1%"), (0.0996, "10%"), (1.04, "104%")]
)
def test_percentages(fraction, text):
    assert wording.percent(fraction) == text


def test_targets_are_in_a_fixed_order():
    names = ["tpu7x:2x2x1", "v5p", "odd", "h100", "cpu", "v4", "hopper"]
    assert sorted(names, key=wording.target_order) == [
        *("cpu", "hopper", "h100", "v4", "v5p", "tpu7x:2x2x1", "odd")
    ]


@pytest.mark.parametrize("name", STUDIES)
def test_a_report_is_written_and_replaced(name, tmp_path):
    results = STUDIES[name]
    folder = tmp_path / "new" / "report"
    write_report(Results((), ()), folder)
    files = write_report(results, folder)
    assert [f.name for f in files] == ["results.json", "report.md", "report.html"]
    assert sorted(folder.iterdir()) == sorted(files)
    assert repr(Results.read(folder)) == repr(results)
    assert (folder / "report.html").read_text(encoding="utf-8") == markup(name)
    assert (folder / "report.md").read_text(encoding="utf-8") == text_of(name)


def test_a_full_disk_says_what_to_do(tmp_path, monkeypatch):
    write_report(samples.every(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path: Path):
        if path.name == report.MARKDOWN:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replacing(path)

    replacing = report.replacing
    monkeypatch.setattr(report, "replacing", full)
    with pytest.raises(OSError, match=r"make room.*results.json was written.*report.md") as raised:
        write_report(Results((), ()), tmp_path)
    assert raised.value.errno == errno.ENOSPC
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    assert after["report.md"] == before["report.md"]
    assert after["report.html"] == before["report.html"]


def test_a_file_in_the_folder_s_place_says_what_to_do(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="choose a folder, not a file"):
        write_report(samples.every(), tmp_path / "file")
