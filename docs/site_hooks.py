"""For `make docs`: a page's links to files outside docs/, such as ../recipes/ddp.py, lead to pages with those files.

On a forge the links lead to the files themselves; a site has only what is in it.
Source: https://www.mkdocs.org/user-guide/configuration/#hooks
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\]\(\.\./([\w./-]+?)(#[\w-]+)?\)")
INSIDE = re.compile(r"\]\((?:docs/)([\w./-]+?)(#[\w-]+)?\)")  # of README.md and its like, which lie one folder above
BESIDE = re.compile(r"\]\((?!https?:|#|\.\./|docs/)([\w./-]+?)(#[\w-]+)?\)")


def page_of(path: str) -> str:
    """The page, below docs/, that shows a file of the repository."""
    return f"source/{path if path.endswith('.md') else path + '.md'}"


def outside_files() -> set[str]:
    """Every file outside docs/ that a page links to; of a Markdown file also what that links to."""
    found: set[str] = set()
    for page in (ROOT / "docs").glob("*.md"):
        found |= {path for path, _ in OUTSIDE.findall(page.read_text(encoding="utf-8"))}
    for path in [each for each in found if each.endswith(".md")]:
        found |= {each for each, _ in BESIDE.findall((ROOT / path).read_text(encoding="utf-8"))}
    return found


def on_files(files: Any, config: Any) -> Any:
    """Make a page of each.

    Raises:
        FileNotFoundError: a page links to what is not there.
    """
    for path in sorted(outside_files()):
        text = (ROOT / path).read_text(encoding="utf-8")
        if path.endswith(".md"):
            text = INSIDE.sub(r"](../\1\2)", text)
            text = BESIDE.sub(lambda link: f"]({page_of(link[1]).removeprefix('source/')}{link[2] or ''})", text)
        else:
            language = {".py": "python", ".yaml": "yaml"}.get(Path(path).suffix, "text")
            text = f"# {path}\n\n````{language}\n{text}````\n"
        page = File.generated(config, page_of(path), content=text)
        page.inclusion = page.inclusion.NOT_IN_NAV
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri.startswith("source/"):
        return markdown
    return OUTSIDE.sub(lambda link: f"]({page_of(link[1])}{link[2] or ''})", markdown)
