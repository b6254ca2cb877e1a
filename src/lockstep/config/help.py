"""`--help`: what a recipe does, and its keys, those that people use first; `--help all` has every one of them."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from lockstep.config.declared import CommandLine, own_keys
from lockstep.config.explain import options
from lockstep.config.keys import walk
from lockstep.config.schema import ClusterConfig, Config
from lockstep.config.tasks import IMAGES, short_name, with_defaults
from lockstep.utils.places import as_installed
from lockstep.utils.reflow import reflow

WIDTH = 80
INDENT = 30  # where the help of a key begins
FIRST = {  # the keys that people use first, by what they are about
    "What is trained": ("task.name", "model", "data", "data.root"),
    "How long, how large": ("epochs", "max_steps", "global_batch_size", "accumulate", "seed"),
    "How it is optimized": ("optim", "optim.lr", "precision", "compile"),
    "Where it runs": ("nproc", "device", "cluster"),
    "What is kept": ("out", "resume", "checkpoint.every", "logger", "metric"),
}
GROUP_HELP = {
    "model": "architecture",
    "data": "data set",
    "optim": "optimizer",
    "logger": "where curves go, besides metrics.jsonl; several as [csv,wandb]",
    "cluster": "a cluster to run on, written +cluster=…",
    "tune": "how settings are searched",
    "debug": "settings to look for mistakes with, written +debug=…",
}
NO_GROUPS = {"plan"}  # folders of conf/ whose files are not configs: hardware that recipes.plan knows


def text(recipe: CommandLine, schema: type[Config], folders: list[Path], everything: bool) -> str:
    """The whole page.

    Args:
        folders: where config files are looked for, one after the other.
        everything: every key, or those that people use first.
    """
    groups = config_groups(folders)
    keys: dict[str, tuple[Any, dict[str, Any]]] = {name: (value, rule) for name, value, rule in walk(schema())}
    own = own_keys(schema)
    mine = [name for name in keys if name.partition(".")[0] in own]
    sections: dict[str, list[str]] = {}
    if (task := schema().task.name) != IMAGES:
        named = [name for name in keys if name.startswith("task.") and name != "task.name"]
        sections[f"Of task={short_name(task)}"] = named
    if mine:
        sections[f"Of recipes.{recipe.name} alone"] = mine
    if everything:
        for name in keys:
            if name not in mine:
                head = name.partition(".")[0] if "." in name else "run"
                sections.setdefault(f"{head}.*" if head != "run" else "The run", []).append(name)
        keys |= {f"cluster.{name}": (value, rule) for name, value, rule in walk(ClusterConfig())}
        sections["cluster.*, with +cluster=…"] = [name for name in keys if name.startswith("cluster.")]
    else:
        images = {"model", "data", "data.root"} if task != IMAGES else set()  # task=images alone has these
        sections |= {
            head: [name for name in names if (name in keys or name in groups) and name not in images]
            for head, names in FIRST.items()
        }
    lines = [reflow(as_installed(recipe.doc.strip()), WIDTH), ""]
    if everything:
        lines += [
            "Groups, GROUP=OPTION:",
            *(entry(f"{name}=", f"{', '.join(found)}") for name, found in groups.items()),
        ]
        lines.append("")
    for head, names in sections.items():
        lines.append(f"{head}:")
        for name in names:
            if name in groups:
                chosen = getattr(schema(), name, None)
                default = getattr(chosen, "name", "")
                lines.append(entry(f"{name}={default}", f"{GROUP_HELP.get(name, '')} [{'|'.join(groups[name])}]"))
            else:
                value, rule = keys[name]
                allowed = f" [{'|'.join(map(shown, rule['choices']))}]" if rule["choices"] else ""
                label = "task" if name == "task.name" else name
                lines.append(entry(f"{label}={shown(value)}", rule["help"] + allowed))
        lines.append("")
    declared = with_defaults([], schema)
    if declared:
        lines += ["Defaults of this task:", *(f"  {word}" for word in declared), ""]
    more = len(keys) - sum(name in keys for names in sections.values() for name in names)
    if more:
        lines += [f"--help all lists {more} more keys.", ""]
    lines += [
        "Set a key with KEY=VALUE. Also:",
        entry("--cfg job", "print the composed config and stop"),
        entry("-m KEY=A,B", "one run for each value"),
        entry("--config-dir DIR", "config files of your own, such as DIR/cluster/mysite.yaml"),
    ]
    return "\n".join(lines)


def config_groups(folders: list[Path]) -> dict[str, list[str]]:
    """{group: its options}, from the folders of config files."""
    files = [
        file for folder in folders for file in sorted(folder.glob("*/*.yaml")) if file.parent.name not in NO_GROUPS
    ]
    names = dict.fromkeys(file.parent.name for file in files)
    return {name: options(file.stem for file in files if file.parent.name == name) for name in names}


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def entry(left: str, right: str) -> str:
    """`key=default   what it does`, wrapped."""
    start = f"  {left}".ljust(INDENT - 1)
    room = WIDTH - INDENT
    words = " ".join(word if len(word) <= room else word.replace("|", "| ") for word in right.split())
    lines = textwrap.wrap(words, room, break_long_words=False, break_on_hyphens=False)
    wrapped = [line.replace("| ", "|") for line in lines] or [""]
    if len(start) >= INDENT:
        return "\n".join([start, *(" " * INDENT + line for line in wrapped)])
    return "\n".join([f"{start} {wrapped[0]}".rstrip(), *(" " * INDENT + line for line in wrapped[1:])])
