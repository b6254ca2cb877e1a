"""For `make docs`: a page's links to files outside docs/, such as ../recipes/ddp.py, lead to pages with those files.

On a forge the links lead to the files themselves; a site has only what is in it. A recipe's page teaches its technique: a
picture, the docstring, the loop, the bugs of the museum that break it, and the whole file.
Source: https://www.mkdocs.org/user-guide/configuration/#hooks
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File
from pictures import PICTURES, draw

from lockstep.config.declared import own_keys
from lockstep.config.help import shown
from lockstep.config.keys import walk
from lockstep.config.schema import ClusterConfig, Config
from lockstep.registry import first_lines, get_recipe
from lockstep.verify.museum.table import BUGS

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


def technique(name: str, source: str) -> str:
    """The page of a recipe, from its file."""
    tree = ast.parse(source)
    head, _, rest = (ast.get_docstring(tree) or "").partition("\n")
    parts = [f"# {name}", f"**{head}**", draw(PICTURES[name])]
    sends = PICTURES[name].sends
    parts += (
        [sends[0]] if sends and sends[0].startswith("arrows") else [f"{at}. {what}" for at, what in enumerate(sends, 1)]
    )
    parts += [linked(rest)]
    loop = next(each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name == "train")
    body = source.splitlines()[loop.lineno - 1 : loop.end_lineno]
    parts += ["## The loop", "````python\n" + "\n".join(body) + "\n````"]
    parts += costs(name)
    if name not in ("single", "checkpoint_resume"):  # what the others are compared with, and what proves itself
        parts += [f"## See it proven\n\n```console\n$ python -m recipes.verify recipes=[{name}]\n```"]
        parts += ["It trains the same steps beside one plain process: [how they are compared](../../proof.md)."]
    if bugs := [f"- `{bug.name}`: {bug.story}" for bug in BUGS if bug.recipe == name]:
        parts += [
            "## Bugs that really happened",
            "Each has its links in [the museum](../../museum.md).",
            "\n".join(bugs),
        ]
        parts += ["`python -m recipes.verify museum=NAME` breaks this recipe so, and shows by what it is seen."]
    parts += ["## The file", f"````python\n{source}````"]
    return "\n\n".join(parts) + "\n"


def costs(name: str) -> list[str]:
    """What a recipe was measured to cost beside one process and DDP; nothing where it does not do the same work."""
    measured = json.loads((ROOT / "docs" / "measured.json").read_text(encoding="utf-8"))
    tasks = [each for each in ("language", "experts", "images", "parts") if name in measured[each]["rows"]]
    if not tasks:
        return []
    task = measured[tasks[0]]
    against = "ddp's" if tasks[0] == "parts" else "one process's"
    lines = [f"| | ranks | speed, × {against} | sent per step | exposed communication | peak, MiB | held, MiB |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for each in dict.fromkeys(("single", "ddp", name)):
        if (row := task["rows"].get(each)) is None:
            continue
        ratio = "1" if row["speedup"] is None else f"{row['speedup']:.2f}"
        if row["speedup_from"]:
            ratio += f" ({row['speedup_from']:.2f} to {row['speedup_to']:.2f})"
        sent = "" if row["sent_bytes"] is None else f"{row['sent_bytes'] / 1e6:.3g} MB"
        exposed = "" if row["exposed_share"] is None else f"{row['exposed_share']:.0%}"
        peak, held = (max(row[what], default=0) / 2**20 for what in ("memory_bytes", "state_bytes"))
        lines.append(f"| {each} | {row['ranks']} | {ratio} | {sent} | {exposed} | {peak:,.0f} | {held:,.1f} |")
    about, others = task["about"], [row["cores_of_others"] or 0.0 for row in task["rows"].values()]
    return [
        "## What it costs, measured",
        f"{about['']} on {about['on']}, {measured['cores']} cores of a virtual machine ({measured['cpu']}), "
        f"{measured['date']}, of which other work had {max(others):.1f}: `{task['command']}`. A model this small shows what "
        "a technique adds, not what it is for: measure yours with the same command. Of the fullest rank: *peak* is all "
        "memory of its process, *held* is weights, gradients and the optimizer's state.",
        "\n".join(lines),
    ]


def linked(docstring: str) -> str:
    """With a link at each recipe's name and at each address; a command stays as it is."""
    lines = []
    for line in docstring.splitlines():
        if not line.startswith("    "):
            line = re.sub(r"^(Expect|Source): ", r"\n**\1:** ", line)
            line = re.sub(r"(?<![\w`])recipes\.(\w+)", recipe_link, line)
            line = re.sub(r"https?://[^\s),]+", lambda address: f"<{address[0]}>", line)
        lines.append(line)
    return "\n".join(lines)


def recipe_link(found: re.Match[str]) -> str:
    return f"[{found[0]}]({found[1]}.py.md)" if found[1] in PICTURES else found[0]


def keys_page() -> str:
    """Every key of every recipe and tool, from the dataclasses that declare them."""
    parts = ["# All keys", "What `--help all` prints, on one page. `KEY=VALUE` on the command line sets a key."]
    sections: dict[str, list[Any]] = {}
    for row in walk(Config()):
        sections.setdefault(row[0].rpartition(".")[0].partition(".")[0], []).append(row)
    for head, rows in sections.items():
        parts += [f"## {head}.*" if head else "## Of every run", key_table(rows)]
    parts += [
        "## cluster.*",
        "With `+cluster=…`.",
        key_table([(f"cluster.{row[0]}", *row[1:]) for row in walk(ClusterConfig())]),
    ]
    for name in first_lines():
        schema = get_recipe(name).config
        own = own_keys(schema)
        rows = [row for row in walk(schema()) if row[0].partition(".")[0] in own]
        if rows:
            parts += [f"## recipes.{name}", key_table(rows)]
    return "\n\n".join(parts) + "\n"


def key_table(rows: list[tuple[str, Any, dict[str, Any]]]) -> str:
    lines = ["| key | default | what it does |", "|---|---|---|"]
    for name, value, rule in rows:
        allowed = f" [{', '.join(map(shown, rule['choices']))}]" if rule["choices"] else ""
        cells = (f"`{name}`", f"`{shown(value)}`", rule["help"] + allowed)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def on_files(files: Any, config: Any) -> Any:
    """Make a page of each, and one of all keys.

    Raises:
        FileNotFoundError: a page links to what is not there.
    """
    for path in sorted(outside_files()):
        text = (ROOT / path).read_text(encoding="utf-8")
        taught = Path(path).parent.name == "recipes" and Path(path).stem in PICTURES
        if path.endswith(".md"):
            text = INSIDE.sub(r"](../\1\2)", text)
            text = BESIDE.sub(lambda link: f"]({page_of(link[1]).removeprefix('source/')}{link[2] or ''})", text)
        elif taught:
            text = technique(Path(path).stem, text)
        else:
            language = {".py": "python", ".yaml": "yaml"}.get(Path(path).suffix, "text")
            text = f"# {path}\n\n````{language}\n{text}````\n"
        page = File.generated(config, page_of(path), content=text)
        if not taught:
            page.inclusion = page.inclusion.NOT_IN_NAV
        files.append(page)
    files.append(File.generated(config, "keys.md", content=keys_page()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri.startswith("source/"):
        return markdown
    return OUTSIDE.sub(lambda link: f"]({page_of(link[1])}{link[2] or ''})", markdown)
