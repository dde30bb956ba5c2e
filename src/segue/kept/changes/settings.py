"""What clients set that no command line says, told to a successor before it loads.

What QEMU tells is read from the incumbent and compared with the successor's own; the rest is what
clients were seen to set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from segue.errors import CommandFailed, SegueError
from segue.kept.changes.graph import Graph, read
from segue.kept.changes.record import Record
from segue.qemu.migration import CHANGED
from segue.qemu.monitor import Monitor

_LIMITS = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")
_THROTTLE = (
    *_LIMITS,
    *(f"{name}_max" for name in _LIMITS),
    *(f"{name}_max_length" for name in _LIMITS),
    "iops_size",
    "group",
)


@dataclass
class Settings:
    throttle: dict[str, dict[str, Any]] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    commands: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    _fresh: dict[str, Any] = field(default_factory=dict)

    async def survey(self, monitor: Monitor, graph: Graph, record: Record) -> None:
        self.throttle = _throttles(graph)
        now = await monitor.execute("query-migrate-parameters")
        was = record.baseline["parameters"]
        self.parameters = {
            name: value
            for name, value in now.items()
            if name not in CHANGED and was.get(name) != value
        }
        self.commands = [("set_link", {"name": n, "up": up}) for n, up in record.links.items()]
        if record.actions:
            self.commands.append(("set-action", actions(record.actions)))
        self.commands += [
            ("qom-set", {"path": path, "property": name, "value": value})
            for path, name, value in record.properties
        ]
        self.commands += [(command, arguments) for command, arguments in record.passwords]

    async def furnish(self, monitor: Monitor) -> None:
        """The successor is up. Raises CommandFailed, naming what it will not have."""
        self._fresh = await monitor.execute("query-migrate-parameters")
        for command, arguments in self.commands:
            await monitor.execute(command, arguments)
        theirs = _throttles(await read(monitor))
        for name in self.throttle.keys() | theirs.keys():
            limits = self.throttle.get(name, {})
            if theirs.get(name, {}) != limits:
                given = {key: limits.get(key, 0) for key in _LIMITS} | limits
                await monitor.execute("block_set_io_throttle", {"id": name, **given})

    async def settle(self, monitor: Monitor, record: Record) -> None:
        """The upgrade is over: the user's migration parameters are put back."""
        record.baseline["parameters"] = self._fresh
        lost = []
        for name, value in self.parameters.items():
            try:
                await monitor.execute("migrate-set-parameters", {name: value})
            except CommandFailed as error:
                lost.append(error.what)
        if lost:
            raise SegueError("; ".join(lost))


def actions(given: Mapping[str, Any]) -> dict[str, Any]:
    """`set-action`'s arguments for an instance: the guest's end is the supervisor's to see to."""
    ends = {"poweroff", "shutdown", "exit-failure"}
    return {
        key: "pause" if key in ("shutdown", "panic") and value in ends else value
        for key, value in given.items()
    }


def _throttles(graph: Graph) -> dict[str, dict[str, Any]]:
    """By the device that has the disk; without those that have no limit."""
    found = {}
    for backend in graph.backends.values():
        inserted: Mapping[str, Any] = backend.get("inserted") or {}
        limits = {key: inserted[key] for key in _THROTTLE if inserted.get(key)}
        if backend.get("qdev") and any(key in limits for key in _LIMITS):
            found[backend["qdev"]] = limits
    return found
