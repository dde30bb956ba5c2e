"""The block graph of an instance: which node lies on which, and what hangs on them.

From `x-debug-query-block-graph` (QEMU 3.0 and later) and the `query-*` commands of the block
layer. Names that QEMU makes up (`#block123`) are drawn anew in each instance and compare as none;
so do those that we give in their place (`segue-N`), where something has to refer to the node.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from segue.qemu.monitor import Monitor

_INHERITED = re.compile(r"/proc/self/fd/\d+")
_COUNTED = re.compile(r"\[\d+\]")
OURS = "segue-block"


@dataclass(frozen=True)
class Graph:
    """`children`: node → edge's name → node. `drives`: each backend with a name → its root node,
    or None for an empty drive. `devices`: what a device without one of those has, by its id or
    path. `facts`: query-named-block-nodes by name. `backends`: query-block by name or device.
    """

    children: Mapping[str, Mapping[str, str]]
    drives: Mapping[str, str | None]
    devices: Mapping[str, str]
    facts: Mapping[str, Mapping[str, Any]]
    backends: Mapping[str, Mapping[str, Any]]

    def parents(self, node: str) -> list[str]:
        return [p for p, below in self.children.items() if node in below.values()]

    def below(self, node: str) -> set[str]:
        """The node, and all that it lies on."""
        found: set[str] = set()
        todo = [node]
        while todo:
            one = todo.pop()
            if one not in found:
                found.add(one)
                todo += self.children[one].values()
        return found

    def of_drives(self) -> set[str]:
        found: set[str] = set()
        for root in self.drives.values():
            if root is not None:
                found |= self.below(root)
        return found

    def disk_below(self, path: str) -> str:
        """The drive or node of what a device has made (a usb-storage's disk); empty for none."""
        for backend in self.backends.values():
            if str(backend.get("qdev", "")).startswith(f"{path}/") and "inserted" in backend:
                return str(backend["device"] or backend["inserted"]["node-name"])
        return ""

    def text(self, node: str) -> str:
        """One line that is the same for the same graph in another instance."""
        facts = self.facts[node]
        below = self.children[node]
        # Filters and formats have the file name of what they lie on, or one made up of it.
        name = "" if below else " " + _INHERITED.sub("/proc/self/fd", facts["file"])
        mark = "" if made_up(node) else f" '{node}'"
        inner = "; ".join(f"{edge}: {self.text(below[edge])}" for edge in sorted(below))
        return f"{facts['drv']}{mark}{name}" + (f" ({inner})" if inner else "")

    def lines(self) -> Iterable[str]:
        """What two instances must have in common."""
        for name, root in self.drives.items():
            if root is not None:
                yield f"drive {name}: {self.text(root)}"
            elif self.backends[name].get("qdev"):
                # Without a device it is nothing: QEMU before 9 makes an `sd0` for every machine.
                yield f"drive {name}: empty"
        for device, root in self.devices.items():
            # A device without an id has its path, which may be counted otherwise.
            yield f"disk of {_COUNTED.sub('', device)}: {self.text(root)}"
        for node in self.children:
            if not made_up(node):
                yield f"node {self.text(node)}"


def made_up(name: str) -> bool:
    """Whether this name of a node is not the user's."""
    return name.startswith(("#", OURS))


async def read(monitor: Monitor) -> Graph:
    graph, named, blocks = await asyncio.gather(
        monitor.execute("x-debug-query-block-graph"),
        monitor.execute("query-named-block-nodes", {"flat": True}),
        monitor.execute("query-block"),
    )
    return build(graph, named, blocks)


def build(
    graph: Mapping[str, Any], named: list[dict[str, Any]], blocks: list[dict[str, Any]]
) -> Graph:
    names = {n["id"]: n["name"] for n in graph["nodes"]}
    drivers = {n["id"] for n in graph["nodes"] if n["type"] == "block-driver"}
    backends = {n["id"] for n in graph["nodes"] if n["type"] == "block-backend"}
    children: dict[str, dict[str, str]] = {names[id]: {} for id in drivers}
    roots: dict[str, str] = {}
    for edge in graph["edges"]:
        if edge["child"] not in drivers:
            continue
        if edge["parent"] in drivers:
            children[names[edge["parent"]]][edge["name"]] = names[edge["child"]]
        elif edge["parent"] in backends:
            roots[names[edge["parent"]]] = names[edge["child"]]
    drives = {b["device"]: roots.get(b["device"]) for b in blocks if b["device"]}
    return Graph(
        children={name: dict(sorted(below.items())) for name, below in sorted(children.items())},
        drives=drives,
        devices={name: node for name, node in roots.items() if name and name not in drives},
        facts={n["node-name"]: n for n in named},
        backends={b["device"] or b.get("qdev", ""): b for b in blocks},
    )
