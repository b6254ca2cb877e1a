"""The Kubernetes manifests of examples/kubernetes start a run of two nodes, as their pods would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.harness import ROOT, clean_environment, result
from tests.helpers.processes import free_port

FOLDER = ROOT / "examples" / "kubernetes"
SMALL = ("data=synthetic", "data.size=16", "data.image_size=8", "global_batch_size=8", "max_steps=2", "eval_every=0")


def container(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a node's container runs, and the variables that it finds."""
    spec = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["spec"]
    if name == "jobset":
        pod = spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        return pod["containers"][0], pod["containers"][0]["env"]
    trainer = spec["trainer"]  # what Kubeflow's runtime for torch adds
    return trainer, [
        {"name": "PET_NNODES", "value": str(trainer["numNodes"])},
        {"name": "PET_NPROC_PER_NODE", "value": str(trainer["numProcPerNode"])},
        {"name": "PET_MASTER_ADDR", "value": "lockstep-node-0-0.lockstep"},
        {"name": "PET_MASTER_PORT", "value": "29500"},
        {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": "the pod's index"}}},
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jobset", "trainjob"])
def test_two_pods_train_together(name: str, tmp_path: Path) -> None:
    """One rank per pod, in place of four GPUs; the addresses of pods are this machine's."""
    described, variables = container(name)
    command = [word.replace("/runs", str(tmp_path)) for word in described["command"]]
    assert command[:3] == ["torchrun", "-m", "recipes.ddp"]
    port = str(free_port())
    pods = []
    for index in ("0", "1"):
        found = {each["name"]: each.get("value", index) for each in variables}
        found |= {"PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
        words = [sys.executable, "-m", "torch.distributed.run", *command[1:], *SMALL]
        pods.append(
            subprocess.Popen(
                words,
                env=clean_environment() | found,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [pod.communicate(timeout=240)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], said
    ended = result(tmp_path / "my_run")
    assert (ended["status"], ended["world_size"], ended["steps"]) == ("finished", 2, 2)


@pytest.mark.parametrize("name", ["jobset", "trainjob"])
def test_a_pod_has_time_and_room(name: str) -> None:
    """A save after SIGTERM, memory for NCCL's and the workers' shared buffers, a volume that outlives the pods."""
    text = (FOLDER / f"{name}.yaml").read_text()
    assert "terminationGracePeriodSeconds: 120" in text
    assert "mountPath: /dev/shm" in text
    assert "persistentVolumeClaim" in text
    assert any(word.startswith("out=/runs/") for word in container(name)[0]["command"])
