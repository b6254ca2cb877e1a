"""Hardware that a plan is made for: what a device computes, holds and sends, read from `conf/plan/*.yaml`.

A profile has published peaks and, beside each, the share of it that is achieved. Both have their source in the file. A
file of your own with the same keys is a profile too: `hardware=my_cluster.yaml`.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from lockstep.errors import UserError
from lockstep.plan.measured_seconds import read_curves
from lockstep.utils.places import folder

MEASURED = "here"  # what is measured on this machine
PROFILE = "hardware.yaml"  # the file of it, in a run's folder
ACROSS = " between nodes"
MEASURED_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "broadcast", "send")  # that are measured
MAY_BE_NOTHING = ("nodes", "reserved", "latency", "launch", "collective", "dtensor", "fsdp", "functional")


@dataclass(frozen=True)
class Link:
    """What carries messages between two ranks.

    Attributes:
        bandwidth: bytes per second that a device sends in one direction, as published.
        achieved: the share of it that a large collective achieves.
        latency: seconds of a hop from one rank to the next, whatever the message's size.
    """

    bandwidth: float
    achieved: float
    latency: float

    @property
    def rate(self) -> float:
        """Bytes per second that a collective achieves."""
        return self.bandwidth * self.achieved


@dataclass(frozen=True)
class OffloadHost:
    """A device's part of the host that it shares with the others of its node, for `offload=true`.

    Attributes:
        memory: bytes of the host's memory.
        memory_bandwidth: bytes per second between the host's processors and it.
        memory_achieved: the share of it that an optimizer's update achieves.
        bandwidth: bytes per second between host and device in one direction, as published.
        achieved: the share of it that a copy from or to pinned memory achieves.
    """

    memory: float
    memory_bandwidth: float
    memory_achieved: float
    bandwidth: float
    achieved: float

    @property
    def update_rate(self) -> float:
        """Bytes per second that are read and written in an update."""
        return self.memory_bandwidth * self.memory_achieved

    @property
    def copy_rate(self) -> float:
        """Bytes per second of a copy to the device, or from it."""
        return self.bandwidth * self.achieved


@dataclass(frozen=True)
class Hardware:
    """One kind of device, and how many of them are linked.

    Attributes:
        name: for people.
        memory: bytes of a device.
        reserved: bytes of them that torch cannot have: the driver's context, NCCL's buffers.
        flops: {precision: floating-point operations per second of matrix products, without sparsity}.
        achieved: the share of them that a large matrix product achieves.
        memory_bandwidth: bytes per second between a device and its memory.
        memory_achieved: the share of it that a large copy achieves.
        launch: seconds that any operation takes at least.
        collective: seconds that any collective takes besides its hops and its bytes.
        per_node: devices in a node.
        inside, between: the link of two devices in one node, and of two in different nodes.
        overlaps: whether messages travel while the device computes.
        device: what torch calls it.
        measured: {class of operation, or kind of collective: points of (work, seconds)}, in place of a rate for all sizes.
            Collectives have two curves, among the ranks of a node and, with ACROSS behind their kind, among those of all nodes.
        ranks_per_core: ranks that share a processor's core; more than 1 where there are fewer cores than threads.
        host: {way in which an operation is issued: seconds of the host}; on a CPU they add to its work.
        offload: the host, for what is kept and updated there; None: not known.
        nodes: that it was measured on; 0: these are published figures.
    """

    name: str
    memory: float
    reserved: float
    flops: dict[str, float]
    achieved: float
    memory_bandwidth: float
    memory_achieved: float
    launch: float
    collective: float
    per_node: int
    inside: Link
    between: Link
    overlaps: bool = True
    device: str = "cuda"
    measured: dict[str, Any] = field(default_factory=dict)
    ranks_per_core: float = 1.0
    host: dict[str, float] = field(default_factory=dict)
    offload: OffloadHost | None = None
    nodes: int = 0

    def rate(self, dtype: str) -> float:
        """Operations per second that matrix products of this precision achieve."""
        return self.flops[dtype] * self.achieved

    def as_yaml(self) -> str:
        """The text of a profile."""
        return str(yaml.safe_dump(json.loads(json.dumps(asdict(self))), sort_keys=False))  # tuples as lists


def hardware_names() -> list[str]:
    """The profiles there are."""
    return sorted(file.stem for file in (folder("conf") / "plan").glob("*.yaml"))


def load_hardware(name: str) -> Hardware:
    """A profile by its name, or by the path of its file.

    Raises:
        UserError: there is none, or it lacks a key.
    """
    own = name.endswith((".yaml", ".yml"))
    file = Path(name).expanduser() if own else folder("conf") / "plan" / f"{name}.yaml"
    if not file.is_file():
        allowed = f"allowed are {', '.join(hardware_names())}, {MEASURED}, or a FILE.yaml of yours"
        raise UserError(f"hardware={name}: no such {'file' if own else 'profile'}; {allowed}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"hardware={name}: is not YAML: {str(error).splitlines()[0]}") from None
    content = checked(content, Hardware, f"hardware={name}")
    for link in ("inside", "between"):
        content[link] = Link(**numbers(checked(content[link], Link, f"hardware={name}: {link}"), f"hardware={name}"))
    flops = content["flops"]
    if not isinstance(flops, dict) or missing_of(flops, ("fp32", "bf16", "fp16", "fp64")):
        raise UserError(f"hardware={name}: flops: must have fp32, bf16, fp16 and fp64, in operations per second")
    content["flops"] = numbers(flops, f"hardware={name}")
    if "measured" in content:
        content["measured"] = read_curves(content["measured"], f"hardware={name}")
    if "host" in content:
        content["host"] = numbers(content["host"] or {}, f"hardware={name}: host")
    if content.get("offload") is not None:
        where = f"hardware={name}: offload"
        content["offload"] = OffloadHost(**numbers(checked(content["offload"], OffloadHost, where), where))
    plain = {"name", "flops", "inside", "between", "overlaps", "device", "measured", "host", "offload"}
    content |= numbers({key: value for key, value in content.items() if key not in plain}, f"hardware={name}")
    for whole in sorted(content.keys() & {"per_node", "nodes"}):
        if content[whole] % 1:
            raise UserError(f"hardware={name}: {whole}={content[whole]:g}: allowed are whole numbers")
        content[whole] = int(content[whole])
    found = Hardware(**content)
    if found.nodes < 2 and any(ACROSS in curve for curve in found.measured):
        raise UserError(f"hardware={name}: nodes={found.nodes}: has curves{ACROSS}; set on how many they were measured")
    return found


def link_names() -> list[str]:
    """The links that can be chosen."""
    return sorted(known_links())


def known_links() -> dict[str, dict[str, Any]]:
    """{name: keys of a link, and whether a node's devices share it}."""
    found = yaml.safe_load((folder("conf") / "plan" / "links" / "links.yaml").read_text(encoding="utf-8"))
    return dict(found)


def with_links(hardware: Hardware, network: str | None, interconnect: str | None) -> Hardware:
    """The same devices, linked otherwise; what was measured of a link that is replaced is left out.

    Raises:
        UserError: there is no such link.
    """
    for key, name, place in (("network", network, "between"), ("interconnect", interconnect, "inside")):
        if name is None:
            continue
        known = known_links()
        suited = [each for each, about in known.items() if about["where"] == place]
        if name not in suited:
            raise UserError(f"{key}={name}: no such link; allowed are {', '.join(sorted(suited))}")
        about = numbers({each: value for each, value in known[name].items() if each not in ("where", "shared")}, name)
        if known[name].get("shared"):  # one card per node
            about["bandwidth"] /= hardware.per_node
        over = {kind + (ACROSS if place == "between" else "") for kind in MEASURED_KINDS}
        measured = {curve: points for curve, points in hardware.measured.items() if curve.partition(",")[0] not in over}
        changed: dict[str, Any] = {place: Link(**about), "measured": measured}
        hardware = replace(hardware, name=f"{hardware.name}, {name}", **changed)
    return hardware


def doubt_of_links(hardware: Hardware, ranks: int, network: str | None, shown: str) -> str:
    """What a measured profile does not know of the links that so many devices need; empty where it knows them.

    Args:
        network: the link between nodes that was chosen.
        shown: the profile, as typed.

    Raises:
        UserError: it knows no link at all.
    """
    if not hardware.nodes or network or ranks <= hardware.per_node or hardware.nodes > 1:
        return ""
    if hardware.per_node == 1:
        raise UserError(
            f"hardware={shown}: was measured with one rank, and knows no link between {ranks}; measure with "
            "more, or set network=NAME in recipes.plan"
        )
    return (
        f"hardware={shown}: was measured on one node of {hardware.per_node} ranks; nodes are taken to be linked as these are "
        "(network=NAME: otherwise)"
    )


def missing_of(content: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    return [name for name in names if name not in content]


def numbers(content: dict[str, Any], where: str) -> dict[str, float]:
    """The same, as floats: YAML reads 3e12 as a text.

    Raises:
        UserError: one is not a number above 0.
    """
    found = {}
    for key, value in content.items():
        try:
            found[key] = float(value)
        except (TypeError, ValueError):
            found[key] = -1.0
        if not found[key] >= (0 if key in MAY_BE_NOTHING else 1e-12):
            raise UserError(f"{where}: {key}={value}: allowed are numbers above 0")
    return found


def checked(content: Any, kind: type, where: str) -> dict[str, Any]:
    """A mapping with the keys of a dataclass, no more and no fewer than it needs.

    Raises:
        UserError: it is not one.
    """
    known = fields(kind)
    if not isinstance(content, dict):
        raise UserError(f"{where}: must be keys and values: {', '.join(each.name for each in known)}")
    needed = tuple(each.name for each in known if each.default is MISSING and each.default_factory is MISSING)
    if missing := missing_of(content, needed):
        raise UserError(f"{where}: lacks {', '.join(missing)}")
    if unknown := [key for key in content if key not in {each.name for each in known}]:
        raise UserError(f"{where}: {unknown[0]}: no such key; allowed are {', '.join(each.name for each in known)}")
    return dict(content)
