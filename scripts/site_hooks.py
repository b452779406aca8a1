"""What the documentation needs beyond mkdocs: pages from elsewhere, links into the code, formulas.

mkdocs.yml names this file under `hooks`.  Pages are written so that they read as well where the
repository is browsed, so all that they link to is named by its path there:

- `[rope](../../mimo_jax/model/layers.py#rope)` becomes a link to that line of a page with the
  source.  A file or a name that isn't there is a warning, which `make docs` takes for an error.
- The other documents of the repository (ELSEWHERE) and the notebooks are pages too.
- A block of code in the language `math`, and text between $` and `$, is LaTeX, and becomes MathML,
  which browsers draw by themselves.
"""

from __future__ import annotations

import ast
import functools
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
log = logging.getLogger("mkdocs.hooks.site")

# Pages whose source is not in docs/, by their place in the site.
ELSEWHERE = {
    "benchmarks.md": "benchmarks/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "readme.md": "README.md",
    "cluster.md": "scripts/cluster/README.md",
    **{f"notebooks/{p.name}": f"notebooks/{p.name}" for p in ROOT.glob("notebooks/*.ipynb")},
}
PLACES = {source: page for page, source in ELSEWHERE.items()}
LANGUAGES = {".py": "python", ".json": "json", ".jsonl": "json", ".toml": "toml", ".yml": "yaml"}
PICTURES = (".png", ".svg")
FENCE = re.compile(r"^\s*(```+|~~~+)")
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
INLINE_MATH = re.compile(r"\$`([^`]+)`\$")


def math_block(source: str, *_: Any, **__: Any) -> str:
    """A block of LaTeX as MathML."""
    return convert(source.strip(), display="block")


def on_config(config: MkDocsConfig) -> None:
    """Blocks in the language `math` are formulas."""
    fences = [{"name": "math", "class": "math", "format": math_block}]
    config.markdown_extensions.append("pymdownx.superfences")
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": fences}


@event_priority(100)  # before what makes pages of notebooks
def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds the pages from elsewhere, and one for each file of source that a page links to."""
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    linked = set()
    for file in files.documentation_pages():
        if file.src_uri.endswith(".md"):
            path = origin(file.src_uri)
            for target in _links(file.content_string):
                linked.add(_resolved(path, target))
    for path in sorted(filter(_is_source, linked)):
        files.append(File.generated(config, _source_page(path), content=_source_text(path)))
    for path in sorted(p for p in linked if p.endswith(PICTURES) and not p.startswith("docs/")):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turns links to files of the repository into links to pages, and LaTeX into MathML."""
    here = page.file.src_uri
    if here.startswith("source/"):
        page.meta["search"] = {"exclude": True}
    if here.startswith("source/") or here.endswith(".ipynb"):
        return markdown
    path = origin(here)

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if not target or ":" in target:
            return match[0]
        found = _resolved(path, target)
        goal = _place(found)
        if goal is None and not _is_source(found):
            log.warning("%s links to %s, which is not in the repository", here, target)
            return match[0]
        if goal is None:  # mkdocs knows no anchors of lines of code, so this is no Markdown
            goal = _source_page(found).removesuffix(".md") + ".html" + _line(found, anchor, here)
            return f'<a href="{posixpath.relpath(goal, posixpath.dirname(here))}">{text}</a>'
        return f"[{text}]({posixpath.relpath(goal, posixpath.dirname(here))}{anchor})"

    def prose(line: str) -> str:
        # In a span: Markdown would take a line that begins with <math> for HTML as a whole.
        return INLINE_MATH.sub(lambda m: f"<span>{convert(m[1])}</span>", LINK.sub(link, line))

    return "\n".join(line if code else prose(line) for line, code in _lines(markdown))


def origin(page: str) -> str:
    """The path in the repository of a page of the site."""
    return ELSEWHERE.get(page, f"docs/{page}")


def _lines(markdown: str) -> list[tuple[str, bool]]:
    """Lines, and whether each is part of a block of code."""
    lines, fence = [], ""
    for line in markdown.split("\n"):
        mark = FENCE.match(line)
        lines.append((line, bool(fence or mark)))
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence):
            fence = ""
    return lines


def _links(markdown: str) -> list[str]:
    prose = "\n".join(line for line, code in _lines(markdown) if not code)
    return [m[2] for m in LINK.finditer(prose) if m[2] and ":" not in m[2]]


def _resolved(path: str, target: str) -> str:
    """The path in the repository of what a file links to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), target))


def _place(path: str) -> str | None:
    """The page or picture of the site that a path of the repository is, if it is one."""
    if not (ROOT / path).is_file():
        return None
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return path if path.endswith(PICTURES) else PLACES.get(path)


def _is_source(path: str) -> bool:
    outside = path.startswith("..") or _place(path) is not None
    return not outside and (ROOT / path).exists()


def _source_page(path: str) -> str:
    return f"source/{path}/index.md" if (ROOT / path).is_dir() else f"source/{path}.md"


def _source_text(path: str) -> str:
    """A page with the text of a file, or the names in a folder."""
    place = ROOT / path
    if place.is_dir():
        entries = sorted(p.name for p in place.iterdir() if not p.name.startswith(("_", ".")))
        return f"# {path}\n\n" + "".join(f"- `{name}`\n" for name in entries)
    language = LANGUAGES.get(place.suffix, "text")
    text = place.read_text(encoding="utf-8")
    return f'# {path}\n\n````{language} linenums="1"\n{text.rstrip()}\n````\n'


def _line(path: str, anchor: str, here: str) -> str:
    """The anchor of the line on which a name is defined, given as #name or #Class.name."""
    if not anchor:
        return ""
    line = definitions(path).get(anchor[1:])
    if line is None:
        log.warning("%s links to %s%s, which that file does not define", here, path, anchor)
        return ""
    return f"#__codelineno-0-{line}"


@functools.cache
def definitions(path: str) -> dict[str, int]:
    """Lines of the functions, classes, methods and variables of a Python file, by dotted name."""
    found: dict[str, int] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[prefix + node.name] = node.lineno
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else []
            if isinstance(node, ast.AnnAssign):
                targets = [node.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    found[prefix + target.id] = node.lineno

    if path.endswith(".py"):
        visit(ast.parse((ROOT / path).read_text(encoding="utf-8")).body, "")
    return found
