"""`make docs` builds a site of docs/, in which every link leads somewhere."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.registry import list_recipes
from tests.helpers.harness import ROOT, clean_environment

PICTURES = runpy.run_path(str(ROOT / "docs" / "pictures.py"))["PICTURES"]


def copy_pages(folder: Path) -> None:
    """And the files that they link to."""
    for name in ("docs", "recipes", "examples", "conf", "src"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    for path in [*ROOT.glob("*.md"), ROOT / "mkdocs.yml", ROOT / "LICENSE"]:
        shutil.copy(path, folder)


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """What `make docs` does."""
    words = [sys.executable, "-m", "mkdocs", "build", "--strict"]  # --quiet would not count warnings
    environment = clean_environment() | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_every_page_and_every_file_that_a_page_names_is_in_the_site(tmp_path: Path) -> None:
    copy_pages(tmp_path)
    done = build(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "site"
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / page.with_suffix(".html").name).is_file(), page.name
    assert "DistributedDataParallel" in (site / "source" / "recipes" / "ddp.py.html").read_text()
    keys = (site / "keys.html").read_text()
    for key in ("global_batch_size", "optim.lr", "cluster.partition", "accumulate_by", "museum"):  # shared and own ones
        assert f"<code>{key}</code>" in keys
    for name in PICTURES:
        page = (site / "source" / "recipes" / f"{name}.py.html").read_text()
        assert '<svg class="technique"' in page, name
        assert "The loop" in page, name
        assert ("What it costs, measured" in page) == (name != "checkpoint_resume"), (
            "it measures itself: docs/benchmarks.md"
        )
    for path in site.rglob("*.html"):
        fetched = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', path.read_text())
        assert not fetched, f"{path.name} needs a network"


def test_every_technique_has_a_picture() -> None:
    assert set(PICTURES) == {*list_recipes(), "checkpoint_resume"}
    for name, picture in PICTURES.items():
        used = {letter for step in picture.steps for letter in step if letter.isdigit()}
        named = 0 if any("v" in step for step in picture.steps) else len(picture.sends)
        assert used == {str(number) for number in range(1, named + 1)}, f"{name}: a digit for each of `sends`"
        assert len({len(step.replace("|", "")) for step in picture.steps}) == 1, f"{name}: ranks end together"


@pytest.mark.slow
def test_a_broken_link_is_named(tmp_path: Path) -> None:
    copy_pages(tmp_path)
    page = tmp_path / "docs" / "slurm.md"
    page.write_text(page.read_text() + "\n[there](no_such_page.md) and [here](memory.md#no-such-part)\n")
    done = build(tmp_path)
    assert done.returncode != 0
    assert "no_such_page.md" in done.stderr
    assert "no-such-part" in done.stderr
    page.write_text("# Slurm\n\n[there](../recipes/no_such_recipe.py)\n")
    done = build(tmp_path)
    assert done.returncode != 0
    assert "recipes/no_such_recipe.py" in done.stderr + done.stdout
