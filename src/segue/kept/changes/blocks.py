"""Disks as they are now, as a successor's `-drive` and `-blockdev`.

What is as the command line made it stays as the user wrote it. Where snapshots, commits, streams,
mirrors, other media or plugging changed it, the options are made from the live graph: each node
that has a name (or that something refers to) is a `-blockdev`, the others lie inside of those
above them; a `-drive` gets all of its nodes inside. A node's own options are those that the user
gave for it. One that QEMU made (an overlay, a mirror's target) has the driver, file name and cache
mode that QEMU tells, and the `aio` and `discard` of the node on which it was put.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from segue.errors import BadCommandLine, Blocker
from segue.kept import confined
from segue.kept.changes.graph import OURS, Graph, made_up
from segue.kept.changes.record import Record
from segue.qemu.commandline import Option
from segue.qemu.jsontree import flatten
from segue.qemu.options import Params

# What `-drive` says of the backend, or of every node in it; the rest describes its first node.
_OF_DRIVE = frozenset(
    "if id index bus unit media group werror rerror copy-on-read cache aio discard "
    "detect-zeroes readonly read-only node-name".split()
)
_OF_DRIVE_GROUPS = ("throttling", "bps", "iops", "stats-", "cache.")
_FILES = ("file", "host_device", "host_cdrom")
_CDROM = re.compile(r"ide(\d+)-cd(\d+)")
_INHERITED = ("aio", "discard", "detect-zeroes")


@dataclass
class Blocks:
    """As Devices; `renamed` nodes have no lasting name on the incumbent."""

    dropped: set[int] = field(default_factory=set)
    altered: dict[int, Option] = field(default_factory=dict)
    added: list[Option] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    blockers: list[Blocker] = field(default_factory=list)


def baseline(graph: Graph) -> dict[str, Any]:
    """What the first instance made of the command line."""
    return {
        "drives": {name: _drive_text(graph, name) for name in graph.drives},
        "files": {name: graph.facts[root]["file"] for name, root in graph.drives.items() if root},
        "nodes": _nodes(graph),
        "opened": _opened(graph, graph.children),
    }


def opened_inside(graph: Graph, record: Record) -> list[Blocker]:
    """Of a QEMU that gave up its root: the files that it has opened since."""
    before = record.baseline["blocks"].get("opened", [])
    added = {node for name in record.nodes if name in graph.children for node in graph.below(name)}
    now = {*_opened(graph, added), *(set(_opened(graph, graph.children)) - set(before))}
    return [confined.opened_inside(f"disk image {name}") for name in sorted(now)]


def _opened(graph: Graph, nodes: Iterable[str]) -> list[str]:
    found = {graph.facts[node]["file"] for node in nodes if graph.facts[node]["drv"] in _FILES}
    return sorted(name for name in found if not confined.is_lent(name))


def survey(graph: Graph, options: Sequence[tuple[int, Option]], record: Record) -> Blocks:
    """Compare what there is with the command line's `-drive` and `-blockdev` options."""
    found = Blocks()
    writer = _Writer(graph, _said(options, record), found)
    before = record.baseline.get("blocks") or {"drives": {}, "files": {}, "nodes": []}
    drives = {name: option for name, option in _drive_options(options, before)}
    for name, (index, _) in drives.items():
        if name in before["drives"] and name not in graph.drives:
            found.dropped.add(index)
    for name, root in graph.drives.items():
        if before["drives"].get(name) == _drive_text(graph, name):
            continue
        if root is None and name not in drives and not graph.backends[name].get("qdev"):
            continue  # one that some releases make for nothing
        if name in drives:
            index, option = drives[name]
            found.altered[index] = option.with_params(_drive(writer, option.params, root))
        else:
            found.added.append(Option.of("drive", _drive(writer, _new_drive(name), root)))
    if _nodes(graph) != before["nodes"]:
        found.dropped |= {index for index, option in options if option.name == "blockdev"}
        found.added[:0] = writer.standalone()
    return found


def _drive_text(graph: Graph, name: str) -> str:
    root = graph.drives[name]
    return graph.text(root) if root else "empty"


def _nodes(graph: Graph) -> list[str]:
    """What is not inside of a `-drive`."""
    inside = graph.of_drives()
    above = (n for n in graph.children if n not in inside and not graph.parents(n))
    used = sorted(f"{device}={node}" for device, node in graph.devices.items())
    return [*sorted(graph.text(node) for node in above), *used]


def _drive_options(
    options: Sequence[tuple[int, Option]], before: Mapping[str, Any]
) -> Iterable[tuple[str, tuple[int, Option]]]:
    """Each `-drive` (or -hda, -cdrom, ...) with its backend's name, which QEMU may have chosen."""
    left = {name: os.path.realpath(path) for name, path in before["files"].items()}
    anonymous = []
    for index, option in options:
        if option.name == "blockdev":
            continue
        if option.name == "drive" and option.id is not None:
            left.pop(option.id, None)
            yield option.id, (index, option)
        else:
            anonymous.append((index, option))
    for index, option in anonymous:
        path = option.params.get("file") if option.name == "drive" else option.value
        if path is None:
            continue
        name = next((n for n, p in left.items() if p == os.path.realpath(path)), None)
        if name is not None:
            del left[name]
            yield name, (index, _as_drive(option, name))


def _as_drive(option: Option, name: str) -> Option:
    if option.name == "drive":
        return option
    return Option.of("drive", _new_drive(name))


def _new_drive(name: str) -> Params:
    """For a drive that no option speaks of: QEMU's own empty CD drive, or HMP's `drive_add`."""
    if match := _CDROM.fullmatch(name):
        return Params.of({"if": "ide", "bus": match[1], "unit": match[2], "media": "cdrom"})
    if match := re.fullmatch(r"ide(\d+)-hd(\d+)", name):
        return Params.of({"if": "ide", "bus": match[1], "unit": match[2]})
    return Params.of({"if": "none", "id": name})


def _drive(writer: _Writer, old: Params, root: str | None) -> Params:
    kept = [
        (key, value)
        for key, value in old.items()
        if key in _OF_DRIVE or key.startswith(_OF_DRIVE_GROUPS)
    ]
    params = Params.of([pair for pair in kept if pair[0] != "node-name"])
    if root is None:
        return params.without("read-only", "readonly")
    if writer.facts(root)["ro"] and "readonly" not in params:
        params = params.set("read-only", "on")
    cache = writer.facts(root)["cache"]
    if "cache" not in params and "cache.direct" not in params:
        params = params.update({f"cache.{k}": cache[k] for k in ("direct", "no-flush")})
    return params.update(_as_text(writer.tree(root, inside=True)))


def _as_text(tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key, value) for key, value in flatten(_without_null(tree))]


def _without_null(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_null(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if value is not None
    }


@dataclass
class _Said:
    """The user's own options by node name; `text` were not given as JSON.

    `inner` nodes were given inside of another, and go with it.
    """

    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    text: set[str] = field(default_factory=set)
    inner: set[str] = field(default_factory=set)

    def collect(self, tree: dict[str, Any], text: bool, inner: bool = False) -> None:
        name = tree.get("node-name")
        if name is not None:
            self.options[name] = tree
            (self.text.add if text else self.text.discard)(name)
            (self.inner.add if inner else self.inner.discard)(name)
        for below in tree.values():
            if isinstance(below, dict):
                self.collect(below, text, True)


def _said(options: Sequence[tuple[int, Option]], record: Record) -> _Said:
    said = _Said()
    for _, option in options:
        try:
            tree = option.params.tree() if option.name in ("blockdev", "drive") else {}
        except BadCommandLine:
            continue  # `file=NAME,file.locking=off`, which QEMU takes for a drive
        if option.name == "blockdev":
            said.collect(tree, option.params.json is None)
        elif option.name == "drive":
            of_node = {
                key: value
                for key, value in tree.items()
                if key == "node-name"
                or (key not in _OF_DRIVE | {"file", "format", "throttling"})
                or isinstance(value, dict)
            }
            said.collect(of_node, True)
    for tree in record.nodes.values():
        said.collect(tree, False)
    return said


class _Writer:
    def __init__(self, graph: Graph, said: _Said, blocks: Blocks) -> None:
        self._graph = graph
        self._said = said
        self._blocks = blocks
        inside = graph.of_drives()
        used = {*graph.devices.values()}
        self._standalone = [
            node
            for node in graph.children
            if node not in inside
            and (
                not (made_up(node) or node in said.inner)
                or node in used
                or len(graph.parents(node)) != 1
            )
        ]
        taken = {name for name in graph.children if name.startswith(OURS)}
        for node in self._standalone:
            if node.startswith("#"):
                number = next(n for n in range(1 << 20) if f"{OURS}{n}" not in taken)
                taken.add(f"{OURS}{number}")
                blocks.renamed[node] = f"{OURS}{number}"

    def standalone(self) -> list[Option]:
        """`-blockdev` options, each after those that it refers to."""
        done: list[str] = []

        def visit(node: str) -> None:
            if node in done:
                return
            for below in self._graph.children[node].values():
                visit(below)
            done.append(node)

        for node in self._standalone:
            visit(node)
        return [self._option(node) for node in done if node in self._standalone]

    def facts(self, node: str) -> Mapping[str, Any]:
        return self._graph.facts[node]

    def _option(self, node: str) -> Option:
        tree = self.tree(node)
        if node in self._said.text:
            # In text no value has a type, and JSON's must be right.
            return Option.of("blockdev", Params.of(_as_text(tree)))
        return Option.of("blockdev", json.dumps(tree, separators=(",", ":")))

    def tree(
        self, node: str, inside: bool = False, said: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The options of a node and of all that lies inside of it; `inside`: of a `-drive`."""
        graph = self._graph
        facts, below = graph.facts[node], graph.children[node]
        said = self._said.options.get(node, said)
        if said is not None and said.get("driver", facts["drv"]) == facts["drv"]:
            options = {k: v for k, v in said.items() if not isinstance(v, dict | type(None))}
            options = {k: v for k, v in options.items() if k not in below}
        else:
            said = None
            options = self._made_by_qemu(node, inside)
        options["driver"] = facts["drv"]
        if not node.startswith("#"):
            options["node-name"] = node
        elif node in self._blocks.renamed:
            options["node-name"] = self._blocks.renamed[node]
        if below and "auto-read-only" not in options and not inside:
            self._set_read_only(options, facts["ro"], node in self._said.text)
        for edge, child in below.items():
            if child in self._standalone:
                options[edge] = self._blocks.renamed.get(child, child)
            else:
                nested = said.get(edge) if said else None
                nested = nested if isinstance(nested, dict) else None
                options[edge] = self.tree(child, inside, nested)
        if "backing" not in below and _has_backing(facts) and not inside:
            options["backing"] = None
        return options

    def _set_read_only(self, options: dict[str, Any], now: bool, text: bool) -> None:
        if now or "read-only" in options:
            options["read-only"] = ("on" if now else "off") if text else now

    def _made_by_qemu(self, node: str, inside: bool) -> dict[str, Any]:
        facts = self._graph.facts[node]
        options: dict[str, Any] = {}
        if not inside and (facts["cache"]["direct"] or facts["cache"]["no-flush"]):
            options["cache"] = {k: facts["cache"][k] for k in ("direct", "no-flush")}
        if not self._graph.children[node]:
            name: str = facts["file"]
            if facts["drv"] in _FILES:
                options["filename"] = name
            elif name.startswith("json:"):
                options |= json.loads(name[len("json:") :])
            elif facts["drv"] not in ("null-co", "null-aio"):
                self._blocks.blockers.append(
                    Blocker(
                        f"block node {node} ({facts['drv']}, {name})",
                        "QEMU opened it by itself, and does not tell with which options",
                        "open it with blockdev-add, under a name of its own, before it is used",
                    )
                )
        if not inside:
            options |= self._inherited(node)
        return options

    def _inherited(self, node: str) -> dict[str, Any]:
        """Of what the user said of the node on which QEMU put this one."""
        graph = self._graph
        leaf = not graph.children[node]
        above = graph.parents(node)[:1] if leaf else [node]
        for one in above:
            while "backing" in graph.children[one]:
                one = graph.children[one]["backing"]
                said = self._said.options.get(one)
                if said is not None and leaf:
                    file = said.get("file")
                    said = file if isinstance(file, dict) else self._said.options.get(str(file))
                if said is not None:
                    return {k: said[k] for k in _INHERITED if k in said}
        return {}


def _has_backing(facts: Mapping[str, Any]) -> bool:
    return facts["drv"] in ("qcow2", "qcow", "qed", "vmdk")
