"""What is installed: whether it fits together, and is the same on all hosts."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib import metadata

import torch

from lockstep.diagnose.findings import Facts, Findings
from lockstep.diagnose.probes.ranks import differences, on_all, rank_and_host
from lockstep.utils.system import git_commit, package_versions


def probe_versions() -> Facts:
    packages = package_versions()
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": packages,
        "imported torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None,
        "git_commit": git_commit(),
        "unmet": list(unmet_requirements(list(packages))),
    }


def unmet_requirements(packages: list[str]) -> Iterator[str]:
    """Requirements of these packages that what is installed does not meet: `torchvision 0.29.2 wants torch==2.15.0`.

    Such a set can be imported, and breaks later: pip only warns of it, and a conda environment need not know.
    """
    from packaging.requirements import Requirement  # needed nowhere else

    for package in packages:
        for line in metadata.requires(package) or ():
            wanted = Requirement(line)
            if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
                continue
            who = f"{package} {metadata.version(package)} wants {wanted.name}{wanted.specifier}"
            try:
                there = metadata.version(wanted.name)
            except metadata.PackageNotFoundError:
                yield f"{who}, which is not installed"
                continue
            if not wanted.specifier.contains(there, prereleases=True):
                yield f"{who}, and {there} is installed"


def judge_versions(ranks: list[Facts]) -> Findings:
    found = Findings("versions")
    packages = [each | {"versions": each["versions"]["packages"]} for each in ranks]
    for package in dict.fromkeys(name for each in packages for name in each["versions"]):
        if figure := differences(packages, "versions", package, "none"):
            add = found.fails if package in ("torch", "lockstep") else found.warning
            add(f"{package} {figure}", "install the same on every host")
    for name in ("python", "cuda", "nccl", "git_commit"):
        if figure := differences(ranks, "versions", name):
            same = "run the same commit everywhere" if name == "git_commit" else "install the same on every host"
            found.warning(f"{name} {figure}", same)
    for line in dict.fromkeys(line for each in ranks for line in each["versions"]["unmet"]):
        found.warning(line, "install versions that fit: pip install -c constraints.txt …")
    for each in ranks:
        imported, installed = each["versions"]["imported torch"], each["versions"]["packages"].get("torch", "none")
        if imported.partition("+")[0] != installed.partition("+")[0]:
            figure = f"{rank_and_host(each)} imports torch {imported}, and {installed} is installed"
            found.warning(figure, "there are two: look at PYTHONPATH")
            break
    if not found:
        first = ranks[0]["versions"]
        some = [f"{name} {first['packages'][name]}" for name in ("torch", "torchvision") if name in first["packages"]]
        same = f"the same {on_all(ranks)}; all requirements are met"
        found.ok(f"python {first['python']}, {', '.join(some)}: {same}")
    return found
