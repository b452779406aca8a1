"""Files that are replaced whole or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def sync_folder(folder: Path) -> None:
    """Puts on the disk which files a folder has.

    Raises:
      OSError: the folder can't be read or synced.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(path: Path, *, folder: bool = False) -> None:
    """Refuses a place where nothing can be written, before work is done for it; makes nothing.

    Args:
      path: of a file that will be replaced, or of a folder.
      folder: which of them.

    Raises:
      OSError: it is the other of the two, or the nearest folder that is there can't be written.
    """
    path = Path(os.path.abspath(path))
    problem, where = None, path
    if os.path.exists(path) and os.path.isdir(path) != folder:
        problem = errno.ENOTDIR if folder else errno.EISDIR
    else:
        places = (path, *path.parents) if folder else path.parents
        where = next(place for place in places if os.path.exists(place))
        if not os.path.isdir(where):
            problem = errno.ENOTDIR
        elif not os.access(where, os.W_OK | os.X_OK):
            problem = errno.EACCES
    if problem is not None:
        raise OSError(problem, os.strerror(problem), str(where))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` at the end, if nothing was raised until then.

    It is on the disk afterwards.  Until then it has the name of `path` with ".tmp" behind it, and
    is removed when something is raised.

    Raises:
      OSError: it can't be written; `path` is then as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
