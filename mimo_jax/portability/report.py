"""Writing the report of a study: results.json, report.md and report.html."""

from __future__ import annotations

import errno
from pathlib import Path

from mimo_jax.engine.durable import replacing
from mimo_jax.portability.html import html
from mimo_jax.portability.markdown import markdown
from mimo_jax.portability.results import FILE, Results

MARKDOWN = "report.md"
HTML = "report.html"

_ADVICE = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room within your quota",
    errno.EROFS: "choose a folder on a file system that can be written",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.ENOTDIR: "choose a folder, not a file",
    errno.EEXIST: "choose a folder, not a file",
}


def write_report(results: Results, folder: Path) -> list[Path]:
    """Writes the three files of a report; each takes the place of an older one whole.

    Args:
      results: of a study.
      folder: where to; made if it isn't there.

    Returns:
      The files.

    Raises:
      OSError: one can't be written. The message says which and what to do; it is then as it was
        before, and so are those that come after it.
    """
    texts = {FILE: results.to_json(), MARKDOWN: markdown(results), HTML: html(results)}
    written: list[Path] = []
    path = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            path = folder / name
            with replacing(path) as file:
                file.write(text.encode("utf-8", "replace"))
            written.append(path)
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "choose another folder")
        done = ", ".join(p.name for p in written) or "nothing"
        raise OSError(
            error.errno,
            f"the report can't be written: {error.strerror or error}; {advice} "
            f"({done} was written)",
            str(path),
        ) from error
    return written
