"""The museum in words: the list for a terminal, and docs/museum.md.

python -m lockstep.verify.museum.page > docs/museum.md
"""

from __future__ import annotations

from lockstep.verify.museum.bug import REFUSED, Bug
from lockstep.verify.museum.of_tutorials import TUTORIALS
from lockstep.verify.museum.table import BUGS
from lockstep.verify.rows import COMPARED

PAGE_HEAD = """# The museum of silent bugs

Each of these bugs really happened: a training ran to its end with them, and computed something else. Each is here as a
mutant of one of our recipes. `python -m recipes.verify museum=NAME` breaks the recipe before your eyes, and shows by
which number of its row the bug is seen first: the loss of a step, the gradients of the first one, the weights or the
buffers at the end, or the evaluation. Without the mutant the same row is equal, which a test holds. The stories are
told from the threads that the links lead to; the code is ours. {count} bugs, and [{others} mistakes more](#mistakes-of-tutorials);
this page is written by `python -m lockstep.verify.museum.page`.

| name | what happened | recipe | seen by |
|---|---|---|---|
"""

MATRIX = """
## Which number names it

| mutant | {columns} |
|---|{rule}|
{rows}
"""
OTHERS = """
## Mistakes of tutorials

Each is in a test, which holds that `verify` names the recipe.

| mistake | recipe |
|---|---|
{rows}
"""
NAMED_BY = (*COMPARED, REFUSED)


def museum_list() -> str:
    """The names, with the recipe that each bug breaks and the number that it is seen by."""
    width = max(len(bug.name) for bug in BUGS)
    lines = [f"{bug.name:{width}}  {bug.recipe}: {seen_by(bug)}" for bug in BUGS]
    return "\n".join([*lines, "python -m recipes.verify museum=NAME shows one; docs/museum.md tells of all"])


def seen_by(bug: Bug) -> str:
    return f"{bug.row}, resumed" if bug.interrupt else bug.row


def written() -> str:
    """The page."""
    rows = []
    for bug in BUGS:
        links = ", ".join(f"[{name}]({link})" for name, link in zip(bug.upstream, bug.links, strict=True))
        rows.append(f"| {bug.name} | {bug.story} {links} | {bug.recipe} | {seen_by(bug)} |\n")
    marks = [f"| {bug.name} | {' | '.join('×' * (bug.row == name) for name in NAMED_BY)} |" for bug in BUGS]
    matrix = MATRIX.format(
        columns=" | ".join(NAMED_BY), rule=":-:|" * (len(NAMED_BY) - 1) + ":-:", rows="\n".join(marks)
    )
    others = [f"| {mistake} | {recipe} |" for mistake, (recipe, _, _) in TUTORIALS.items()]
    head = PAGE_HEAD.format(count=len(BUGS), others=len(TUTORIALS))
    return head + "".join(rows) + matrix + OTHERS.format(rows="\n".join(others))


if __name__ == "__main__":
    print(written(), end="")
