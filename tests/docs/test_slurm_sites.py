"""docs/slurm_sites.md: each site's file becomes the lines that the page shows under it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from launchers import slurm
from recipes import ddp
from tests.helpers.harness import ROOT, compose_config

PAGE = (ROOT / "docs" / "slurm_sites.md").read_text()
SECTIONS = PAGE.split("\n## ")[1:]
SITES = {
    text.partition("\n")[0]: re.findall(r"^```(?:yaml)?\n(.*?)^```$", text, re.M | re.S)
    for text in SECTIONS
    if "```" in text
}


def test_the_page_has_the_sites_that_it_names() -> None:
    assert len(SITES) == PAGE.count("```yaml") == 7


@pytest.mark.parametrize("site", SITES)
def test_a_file_becomes_what_is_shown_under_it(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, shown = SITES[site]
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "site.yaml").write_text(file)
    config = compose_config(ddp.train, f"--config-dir={tmp_path}", "+cluster=site")
    assert config.cluster is not None
    accepted = subprocess.CompletedProcess([], 0, "", "")  # no cluster of ours has these partitions
    monkeypatch.setattr(slurm.subprocess, "run", lambda *_, **__: accepted)
    slurm.dry_run("recipes.ddp", [(tmp_path / "run", {})], config.cluster, name="ddp", max_restarts=0)
    said = capsys.readouterr().out
    ranks = said.partition("# ranks   ")[2].partition("\n")[0]
    for line in shown.splitlines():
        if line.startswith("srun "):
            assert re.fullmatch(".*".join(map(re.escape, line.split("…"))) + ".*", ranks), (line, ranks)
        else:
            assert line in said.splitlines(), said
