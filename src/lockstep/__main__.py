"""`python -m lockstep recipes` lists the recipes; `python -m lockstep new NAME` copies one to start from; `export` and
`import` exchange a GPT with Hugging Face's transformers; `completion` has the shell complete a recipe's keys."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import sys
from pathlib import Path
from typing import NoReturn

from lockstep.errors import UserError
from lockstep.registry import first_lines, grouped_lines
from lockstep.utils.places import as_installed, folder
from lockstep.utils.reflow import filled_lines
from lockstep.utils.standard_streams import protect

# Hydra completes `python FILE.py`; of `python -m recipes.NAME` it is handed the part that it knows.
# https://hydra.cc/docs/tutorials/basic/running_your_app/tab_completion
COMPLETION = r"""
_lockstep_complete() {
    local words=($COMP_LINE) choices word=""
    [[ $COMP_LINE == *" " ]] || word=${words[-1]}
    if [[ ${words[1]} != -m || ${words[2]} != *recipes* ]]; then
        return
    elif (( ${#words[@]} == 3 )) && [[ -n $word ]]; then
        choices="%s"
    else
        choices=$(COMP_LINE="lockstep${COMP_LINE#*"${words[2]}"}" "${words[0]}" -m "${words[2]}" -sc query=bash 2>/dev/null)
    fi
    COMPREPLY=($(compgen -W "$choices" -- "$word"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _lockstep_complete python python3
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists what is allowed")


def show_recipes() -> None:
    """Every recipe with the first line of its docstring, by what it is."""
    from lockstep.utils.tables import terminal_width

    width, wide = terminal_width(), max(map(len, first_lines())) + 4
    how = "Run one with `python -m recipes.NAME`; `python -m recipes.NAME --help` explains it and lists its keys."
    print(*filled_lines(as_installed(how), width), sep="\n")
    for group, lines in grouped_lines().items():
        print(f"\n{group}:")
        for name, line in lines.items():
            print(*filled_lines(line, width, f"  {name}".ljust(wide), " " * wide), sep="\n")


def copy_recipe(name: str, source: str) -> None:
    """Write a recipe to NAME.py in the current folder; its own commands then start the copy.

    Raises:
        UserError: there is no such recipe, NAME cannot be used, or the file is there already.
    """
    every = list(first_lines())
    if source not in every:
        near = difflib.get_close_matches(source, every, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"--from {source}: no such recipe; {hint}allowed are {', '.join(every)}")
    name = name.removesuffix(".py")
    file = Path(f"{name}.py")
    if not name.isidentifier():
        raise UserError(f"{name}: no name of a Python module; allowed are letters, digits and _, such as my_{source}")
    if file.exists():
        raise UserError(f"{file}: is there already, and is not overwritten; choose another name, or remove it")
    if importlib.util.find_spec(name):
        raise UserError(f"{name}: {file} would hide the module of that name; choose another, such as my_{source}")
    text = (folder("recipes") / f"{source}.py").read_text(encoding="utf-8")
    with file.open("x", encoding="utf-8") as stream:
        stream.write(as_installed(text.replace(f"-m recipes.{source}", f"{file}")))
    print(f"{file}: a copy of recipes/{source}.py. Run it with: python {file}")


def main() -> None:
    protect()
    parser = Parser("python -m lockstep", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    commands.add_parser("recipes", help="list the recipes")
    commands.add_parser(
        "completion", help='Tab completes recipes and keys in bash: eval "$(python -m lockstep completion)"'
    )
    new = commands.add_parser("new", help="copy a recipe to NAME.py in the current folder, to start from")
    new.add_argument("name", metavar="NAME")
    new.add_argument("--from", dest="source", metavar="RECIPE", default="ddp", help="the recipe to copy (ddp)")
    export = commands.add_parser(
        "export", help="write a run's GPT as transformers' LlamaForCausalLM, or Mixtral's, loads it"
    )
    export.add_argument("run", metavar="RUN", type=Path, help="folder of a run with task=language")
    export.add_argument("folder", metavar="FOLDER", type=Path, help="a new folder")
    export.add_argument("--weights", metavar="FILE", default="model.pt", help="model.pt or best.pt, in RUN (model.pt)")
    taken = commands.add_parser("import", help="make of such a folder a file of weights for resume=FILE")
    taken.add_argument("folder", metavar="FOLDER", type=Path)
    taken.add_argument("file", metavar="FILE", type=Path, help="a new file")
    try:
        asked = parser.parse_args()
        if asked.command == "recipes":
            show_recipes()
        elif asked.command == "completion":
            names = [as_installed(f"python -m recipes.{name}").rpartition(" ")[2] for name in first_lines()]
            print(COMPLETION % " ".join(names))
        elif asked.command == "new":
            copy_recipe(asked.name, asked.source)
        else:  # seconds to import
            from lockstep.integrations import hugging_face

            if asked.command == "export":
                print(hugging_face.export_llama(asked.run, asked.folder, asked.weights))
            else:
                print(hugging_face.import_llama(asked.folder, asked.file))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
