"""Where something can be written, found out without writing."""

import errno
import os
from pathlib import Path

import pytest

from mimo_jax.engine.durable import check_writable


@pytest.fixture
def there(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "folder"),
    [("file", False), ("new", False), ("new/deep/file", False), ("folder", True), ("a/b/c", True)],
)
def test_places_that_are_fine_stay_as_they_are(there: Path, name: str, folder: bool):
    check_writable(there / name, folder=folder)
    assert {p.name for p in there.rglob("*")} == {"file", "folder"}
    assert (there / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "folder", "number", "named"),
    [
        ("folder", False, errno.EISDIR, "folder"),
        ("file", True, errno.ENOTDIR, "file"),
        ("file/in/it", False, errno.ENOTDIR, "file"),
        ("file/in/it", True, errno.ENOTDIR, "file"),
    ],
)
def test_what_is_in_the_way_is_named(there: Path, name: str, folder: bool, number: int, named: str):
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        check_writable(there / name, folder=folder)
    assert (caught.value.errno, caught.value.filename) == (number, str(there / named))


def test_a_folder_that_may_not_be_written(there: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def access(path: Path, mode: int) -> bool:
        asked.append(path)
        return False

    monkeypatch.setattr(os, "access", access)  # the tests may run as root, who may do anything
    for name, folder in (("file", False), ("folder/new", False), ("folder", True)):
        with pytest.raises(PermissionError):
            check_writable(there / name, folder=folder)
    assert asked == [there, there / "folder", there / "folder"]
