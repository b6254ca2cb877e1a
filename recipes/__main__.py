"""`python -m recipes`: every recipe with the first line of its docstring."""

import ast
from pathlib import Path


def first_lines() -> dict[str, str]:
    """{recipe: its docstring's first line}, read without importing them: each would load torch."""
    files = sorted(Path(__file__).parent.glob("[!_]*.py"))
    docs = {file.stem: ast.get_docstring(ast.parse(file.read_text())) or "" for file in files}
    return {name: doc.partition("\n")[0] for name, doc in docs.items()}


def main() -> None:
    print("Run one with `python -m recipes.NAME`; `python -m recipes.NAME --help` explains it and lists its keys.\n")
    for name, line in first_lines().items():
        print(f"  {name:18} {line}")


if __name__ == "__main__":
    main()
