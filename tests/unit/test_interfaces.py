"""Variables that name a network interface or a GPU: what is not there is refused in one line, before ranks start."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from lockstep.distributed import devices
from lockstep.distributed.devices import agree_on_devices, resolve_device
from lockstep.distributed.interfaces import check_interfaces
from lockstep.errors import UserError
from recipes import ddp
from tests.helpers.command_line import assert_one_line, run_main
from tests.helpers.harness import command
from tests.helpers.processes import free_port

HERE = ", ".join(name for _, name in socket.if_nameindex())


@pytest.mark.parametrize(
    ("variables", "nccl", "wrong"),
    [
        ({"GLOO_SOCKET_IFNAME": "ib9"}, False, "ib9"),
        ({"GLOO_SOCKET_IFNAME": "lo,ib9"}, True, "ib9"),
        ({"GLOO_SOCKET_IFNAME": "l"}, False, "l"),
        ({"NCCL_SOCKET_IFNAME": "ib"}, True, "ib"),
        ({"NCCL_SOCKET_IFNAME": "=l"}, True, "l"),
        ({}, True, ""),
        ({"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": ""}, True, ""),
        ({"GLOO_SOCKET_IFNAME": "lo"}, True, ""),
        ({"GLOO_SOCKET_IFNAME": "lo:1"}, False, ""),
        ({"NCCL_SOCKET_IFNAME": "ib9"}, False, ""),
        ({"NCCL_SOCKET_IFNAME": "ib,l"}, True, ""),
        ({"NCCL_SOCKET_IFNAME": "=lo"}, True, ""),
        ({"NCCL_SOCKET_IFNAME": "^ib,docker"}, True, ""),
    ],
)
def test_an_interface_is_one_of_the_host_s(variables: dict[str, str], nccl: bool, wrong: str) -> None:
    if not wrong:
        check_interfaces(variables, nccl)
        return
    with pytest.raises(UserError) as found:
        check_interfaces(variables, nccl)
    name, value = next(iter(variables.items()))
    assert str(found.value) == f"{name}={value}: this host has no interface {wrong}; allowed are {HERE}, or unset it"


def test_a_command_is_refused_before_it_makes_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib9")
    assert run_main(ddp.train, [], monkeypatch) == 2
    assert_one_line(capfd, [f"GLOO_SOCKET_IFNAME=ib9: this host has no interface ib9; allowed are {HERE}, or unset it"])
    assert list(tmp_path.iterdir()) == []


def test_so_is_a_rank_that_was_started_by_hand(tmp_path: Path) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = command("-m", "recipes.ddp", cwd=tmp_path, GLOO_SOCKET_IFNAME="ib9", **place)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "GLOO_SOCKET_IFNAME=ib9: this host has no interface ib9" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_all_ranks_hear_of_one_host_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib9")
    store = torch.distributed.HashStore()
    with pytest.raises(UserError, match="GLOO_SOCKET_IFNAME=ib9: this host has no interface ib9"):
        agree_on_devices(store, 0, ["here"], 0, "cpu", "gloo", 5)


@pytest.mark.parametrize(("visible", "refused"), [("7", True), ("garbage", True), ("", False), ("-1", False)])
def test_gpus_that_a_variable_hides_by_mistake_are_missed(
    visible: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run would train on the CPU of a machine that has GPUs, and say so only in its header."""
    monkeypatch.setattr(devices, "DRIVER", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if refused:
        with pytest.raises(UserError, match=f"^CUDA_VISIBLE_DEVICES={visible}: names no GPU of this machine; allowed"):
            resolve_device("auto", "auto")
    else:
        assert resolve_device("auto", "auto") == ("cpu", "gloo")
    assert resolve_device("cpu", "auto") == ("cpu", "gloo")
