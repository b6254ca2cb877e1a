"""A comparison as one HTML file that needs nothing else: pictures inside, no script, no font, no address of any host.

It opens from a file or an e-mail, follows the reader's light or dark scheme, prints on white, and on a telephone its
tables scroll. Whatever comes from a config, a path or an error is escaped.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from string import Template
from typing import Any

from lockstep.compare import figures as comparison
from lockstep.compare.figures import MEANING, TABLES, Row, filled, percent
from lockstep.compare.plots import DARK, LIGHT, Plot
from lockstep.utils.text import count, mebibytes


@dataclass(frozen=True)
class Facts:
    """All that a report says.

    Attributes:
        about: of the work, by name.
        verified: rows of recipes.verify.
        verify_problem: why there are none, or what is off.
        left_out: combinations that were not run, and why.
        failed: those that ended before their time, and their last words.
        environment: as in environment.json.
        config: YAML.
        command: what gives this report again.
        out: the folder the runs' are in.
    """

    title: str
    about: dict[str, str]
    rows: list[Row]
    environment: dict[str, Any]
    config: str
    command: str
    out: str
    written: str
    verified: list[dict[str, Any]] = field(default_factory=list)
    verify_problem: str = ""
    left_out: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
<p class="kind">lockstep · recipes.compare</p>
<h1>$title</h1>
<p class="about">$about</p>
</header>
<main>
$tiles
$sections
</main>
<footer>Written $written by <code>python -m recipes.compare</code>; all figures are in <code>compare.json</code>.
</footer>
</body>
</html>
""")
STYLE = """
:root { --page: #f4f6f8; --surface: #ffffff; --ink: #1c232b; --muted: #5a6673; --line: #dde3e9; --accent: #2d6ca8;
  --good: #1a7a55; --bad: #b3261e; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #0f1317; --surface: #171c22; --ink: #e8ecf1;
  --muted: #9fabb8; --line: #2e3741; --accent: #7db4ec; --good: #63c79c; --bad: #ff8f86; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem clamp(1rem, 4vw, 2.5rem); background: var(--page);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; margin: .1rem 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 0 0 .8rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; }
.kind { color: var(--accent); font-size: .85rem; font-weight: 600; letter-spacing: .03em; margin: 0; }
.about, footer, .note, figcaption { color: var(--muted); }
.about { margin: 0 0 1.4rem; }
section { background: var(--surface); border: 1px solid var(--line); border-radius: 12px; margin: 0 0 1.2rem;
  padding: 1.3rem clamp(1rem, 2.5vw, 1.6rem); }
.tiles { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); margin: 0 0 1.2rem; }
.tiles > div { background: var(--surface); border: 1px solid var(--line); border-radius: 12px; padding: .9rem 1.1rem; }
.tiles dt { color: var(--muted); font-size: .85rem; }
.tiles dd { font-size: 1.55rem; font-weight: 650; line-height: 1.25; margin: .1rem 0; overflow-wrap: anywhere; }
.tiles small { color: var(--muted); display: block; font-size: .85rem; font-weight: 400; }
ul { margin: 0; padding-left: 1.2rem; }
li { margin: .3rem 0; overflow-wrap: anywhere; }
.plots { display: grid; gap: 1.4rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 33rem), 1fr)); }
figure { margin: 0; }
img { display: block; height: auto; min-width: 33rem; width: 100%; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; min-width: 100%; }
caption { height: 1px; overflow: hidden; position: absolute; width: 1px; clip-path: inset(50%); }
th, td { border-bottom: 1px solid var(--line); padding: .45rem .8rem; text-align: right; vertical-align: top;
  white-space: nowrap; }
thead th { color: var(--muted); font-size: .82rem; font-weight: 600; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
tbody th { font-weight: 600; }
th:first-child { background: var(--surface); left: 0; position: sticky; }
td.text, th.text { text-align: left; }
tbody tr:last-child > * { border-bottom: 0; }
.good { color: var(--good); } .bad { color: var(--bad); }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .88em; }
code { overflow-wrap: anywhere; }
pre { background: var(--page); border-radius: 8px; margin: 0; overflow-x: auto; padding: .8rem 1rem; }
dl.list { display: grid; gap: .3rem 1.2rem; grid-template-columns: minmax(6rem, max-content) 1fr; margin: 0; }
dl.list dt { color: var(--muted); } dl.list dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
details > summary { cursor: pointer; font-weight: 600; margin: .2rem 0 .6rem; }
a { color: var(--accent); }
footer { font-size: .88rem; }
@media (max-width: 36rem) {
  dl.list { grid-template-columns: 1fr; } dl.list dt { font-weight: 600; margin-top: .4rem; }
}
@media print { img { min-width: 0; } body { background: #fff; font-size: 11pt; max-width: none; padding: 0; }
  section, .tiles > div { border-color: #ccc; break-inside: avoid; } .scroll { overflow: visible; }
  table { font-size: 7.5pt; } th, td { padding: .25rem .35rem; } details > pre { white-space: pre-wrap; } }
"""


def html_report(facts: Facts, plots: list[Plot]) -> str:
    """The whole file."""
    problems = [*facts.failed, *([facts.verify_problem] if facts.verify_problem else [])]
    sections = [
        section("In short", bullets(comparison.verdicts(facts.rows))),
        section("Failed", bullets(problems, "bad")) if problems else "",
        section("Plots", f'<div class="plots">{"".join(map(picture, plots))}</div>') if plots else "",
        section("Figures", figures(facts.rows)) if facts.rows else "",
        section("Held to recipes.single", verified(facts.verified)) if facts.verified else "",
        section("Left out", bullets(facts.left_out)) if facts.left_out else "",
        section("How it was measured", measured(facts)),
        section("Where", machine(facts.environment)),
        section("Runs", folders(facts)) if facts.rows else "",
        section(
            "Again",
            f"<p>The command that repeats it:</p><pre>{escape(facts.command)}</pre><details><summary>Configuration"
            f"</summary><pre>{escape(facts.config)}</pre></details>",
        ),
    ]
    return PAGE.substitute(
        title=escape(facts.title),
        style=STYLE,
        about=escape(" · ".join(f"{name} {value}".strip() for name, value in facts.about.items())),
        tiles=tiles(facts.rows),
        sections="\n".join(filter(None, sections)),
        written=escape(facts.written),
    )


def section(heading: str, content: str) -> str:
    name = "-".join("".join(letter if letter.isalnum() else " " for letter in heading.lower()).split())
    return f'<section aria-labelledby="{name}">\n<h2 id="{name}">{escape(heading)}</h2>\n{content}\n</section>'


def bullets(lines: Iterable[str], style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return "<ul>" + "".join(f"<li{kind}>{escape(line)}</li>" for line in lines) + "</ul>"


def tiles(rows: list[Row]) -> str:
    """The few numbers that everyone asks for first."""
    if not rows:
        return ""
    best = max(rows, key=lambda row: row.images_per_second)
    found = [("Fastest", f"{best.images_per_second:,.0f} images/s", best.label)]
    against = [row for row in rows if row.speedup is not None and row.efficiency is not None]
    if against:
        top = max(against, key=lambda row: row.speedup or 0)
        found.append(("Best speedup", f"{top.speedup:.2f} ×", f"{top.label}, against {top.against}"))
    exposed = [row for row in rows if row.exposed_share and not row.idle_shares]
    if exposed:
        least = min(exposed, key=lambda row: row.exposed_share or 0)
        found.append(("Least exposed communication", f"{percent(least.exposed_share)} of a step", least.label))
    held = [row for row in rows if row.memory_bytes]
    if len(held) > 1:
        small = min(held, key=lambda row: max(row.memory_bytes))
        found.append(("Least memory a rank", f"{mebibytes(max(small.memory_bytes), 0)} MiB", small.label))
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(who)}</small></dd></div>"
        for name, value, who in found
    )
    return f'<dl class="tiles">{cells}</dl>'


def picture(plot: Plot) -> str:
    """Both themes' pictures, of which the reader's screen takes one; paper takes the light one."""
    light, dark = (f"data:image/png;base64,{base64.b64encode(plot.png(theme)).decode()}" for theme in (LIGHT, DARK))
    dark_screen = "screen and (prefers-color-scheme: dark)"
    source = f'<source media="{dark_screen}" srcset="{dark}">'
    image = f'<img src="{light}" alt="{escape(plot.alt)}">'
    return f'<figure class="scroll" tabindex="0"><picture>{source}{image}</picture></figure>'


def table(caption: str, columns: dict[str, list[str]], texts: tuple[str, ...] = ()) -> str:
    """Columns of cells that are escaped already; a header of each row comes first."""
    heads = "".join(f'<th scope="col"{kind(name, texts)}{tip(name)}>{escape(name)}</th>' for name in columns)
    lines = []
    for cells in zip(*columns.values(), strict=True):
        rest = "".join(
            f"<td{kind(name, texts)}>{cell}</td>" for name, cell in zip(list(columns)[1:], cells[1:], strict=True)
        )
        lines.append(f'<tr><th scope="row">{cells[0]}</th>{rest}</tr>')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def kind(name: str, texts: tuple[str, ...]) -> str:
    return ' class="text"' if name in texts else ""


def tip(name: str) -> str:
    return f' title="{escape(MEANING[name])}"' if name in MEANING else ""


def escaped(columns: dict[str, list[str]]) -> dict[str, list[str]]:
    return {name: [escape(cell) for cell in cells] for name, cells in columns.items()}


def figures(rows: list[Row]) -> str:
    found = {heading: filled(columns, rows) for heading, columns in TABLES.items()}
    shown = {name for columns in found.values() for name in columns}
    meaning = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in MEANING.items() if name in shown
    )
    return (
        "".join(
            f"<h3>{heading}</h3>{table(heading, escaped(columns))}" for heading, columns in found.items() if columns
        )
        + f'<details><summary>What the columns mean</summary><dl class="list">{meaning}</dl></details>'
    )


def verified(rows: list[dict[str, Any]]) -> str:
    """recipes.verify's rows; a verdict is never told by its colour alone."""
    columns = escaped(comparison.verified(rows))
    style = ["bad" if cell.startswith("OFF") else "good" if cell == "equal" else "" for cell in columns["verdict"]]
    columns["verdict"] = [
        f'<span class="{name}">{cell}</span>' for name, cell in zip(style, columns["verdict"], strict=True)
    ]
    off = sum(name == "bad" for name in style)
    caption = f"Relative differences from recipes.single: {count(off, 'row') if off else 'no row is'} off."
    return f'<p class="note">{caption}</p>' + table(caption, columns, texts=("precision", "verdict"))


def measured(facts: Facts) -> str:
    rounds = max((row.rounds for row in facts.rows), default=0)
    bases = {row.against for row in facts.rows if row.against}
    against = (
        f"Speedups are against {' and '.join(sorted(bases))}, by ratios within a round, so that drift meets both sides."
        if bases
        else "There is no row that the others could be set against: add single, or another nproc."
    )
    return bullets(
        [
            f"Every recipe was started as a person would, {count(rounds, 'time')}, in turn with the others (one round "
            "after the other), with the same config.",
            against,
            "Strong scaling: the global batch is the same whatever the number of ranks, so an efficiency of 100 % "
            "means that twice the devices train twice the images a second.",
            "Speeds are global batch over the median step, without the warm-up; evaluations and checkpoints are no "
            "part of them. Communication is taken from a profile of a few steps of each run.",
            "A step taken apart: waiting for data, parts of a cut model that wait for each other (idle), exposed "
            "communication, and the rest, which is compute; means over the ranks.",
        ]
    )


def machine(found: dict[str, Any]) -> str:
    """Hosts, processors and versions, as environment.json has them."""
    gpus = found.get("devices") or []
    names = ", ".join(f"{gpus.count(name)} × {name}" for name in dict.fromkeys(gpus))
    memory = found.get("memory_bytes")
    facts = {
        "host": ", ".join(dict.fromkeys(found.get("hosts", []))),
        "processor": f"{found.get('cpu', '')}, {count(found.get('cores', 0), 'core')} to use",
        "memory": f"{memory / 2**30:,.1f} GiB" if memory else "",
        "GPUs": names or "none",
        "device": f"{found.get('device', '')}, {found.get('backend', '')}",
        "system": found.get("platform", ""),
        "python": found.get("python", ""),
        "packages": ", ".join(
            f"{name} {version}" for name, version in found.get("versions", {}).items() if version != "not installed"
        ),
        "CUDA": found.get("cuda") if gpus else "",
        "commit": found.get("git_commit") or "",
        "variables": ", ".join(f"{name}={value}" for name, value in found.get("environment", {}).items()),
    }
    lines = [f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items() if value]
    return f'<dl class="list">{"".join(lines)}</dl>'


def folders(facts: Facts) -> str:
    """Each run's folder, as a link for where this file has stayed beside them."""
    lines = "".join(
        f"<dt>{escape(row.label)}</dt><dd>"
        + ", ".join(f'<a href="{escape(folder)}/">{escape(folder)}</a>' for folder in row.folders)
        + "</dd>"
        for row in facts.rows
    )
    return f'<p class="note">In <code>{escape(facts.out)}</code>:</p><dl class="list">{lines}</dl>'
