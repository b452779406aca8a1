"""A bar at a terminal, and nothing elsewhere."""

import io

import pytest
import rich.live
from rich.console import Console

from mimo_jax.checkpoint import progress


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is printed on a terminal in place of stderr."""
    text = io.StringIO()

    def console(*, stderr: bool) -> Console:
        assert stderr
        return Console(file=text, force_terminal=True, width=120)

    monkeypatch.setattr(progress, "Console", console)
    return text


def test_gigabytes_and_their_speed(stderr: io.StringIO) -> None:
    with progress.progress_bar("loading mimo") as update:
        assert update is not None
        update(2_500_000_000, 10_000_000_000)
        update(5_000_000_000, 10_000_000_000)
    assert "loading mimo" in stderr.getvalue()
    assert "5.0/10.0 GB" in stderr.getvalue()


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_has_a_bar_if_it_has_widgets(
    widgets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def console(*, stderr: bool) -> Console:
        return Console(file=io.StringIO(), force_jupyter=True)

    def find_spec(name: str) -> object:
        assert name == "ipywidgets"
        return object() if widgets else None

    monkeypatch.setattr(progress, "Console", console)
    monkeypatch.setattr(progress.importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(rich.live.Live, "refresh", lambda _: None)  # there is no notebook
    with progress.progress_bar("loading mimo") as update:
        assert (update is not None) == widgets


def test_nothing_where_nobody_looks(capfd: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar("loading mimo") as update:
        assert update is None
    assert capfd.readouterr() == ("", "")
