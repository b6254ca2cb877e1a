"""docs/claims.md names a test for each promise, and each of them is there."""

from __future__ import annotations

import ast
import re
import tomllib

from tests.helpers.harness import ROOT

CLAIMS = ROOT / "docs" / "claims.md"


def rows() -> list[tuple[str, str, str]]:
    """(claim, file, test) of each row."""
    return re.findall(r"^\| (.+?) \| `([\w/]+\.py)::(\w+)` \|$", CLAIMS.read_text(), re.MULTILINE)


def test_each_claim_names_a_test_that_is_there() -> None:
    lines = [line for line in CLAIMS.read_text().splitlines() if re.match(r"\| (?!claim )", line)]
    assert len(rows()) == len(lines) > 80, "a row that does not name one test as the others do"
    for claim, file, test in rows():
        path = ROOT / "tests" / file
        assert path.is_file(), f"{claim}: there is no tests/{file}"
        names = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        assert test in names, f"{claim}: there is no {test} in tests/{file}"


def test_no_claim_is_made_twice() -> None:
    claims = [claim for claim, _, _ in rows()]
    assert len(claims) == len(set(claims))


def test_the_files_of_tests_that_the_docs_name_are_there() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for name in re.findall(r"`(tests/[\w/]+\.py)`", page.read_text()):
            assert (ROOT / name).is_file(), f"{page.name}: there is no {name}"


def test_the_changelog_s_newest_version_is_the_package_s() -> None:
    versions = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    own = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert versions[0] == "Unreleased"
    assert re.fullmatch(rf"{re.escape(own)} \(\d{{4}}-\d\d-\d\d\)", versions[1])
