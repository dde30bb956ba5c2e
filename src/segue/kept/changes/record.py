"""What clients told QEMU that QEMU does not tell again. Plain data, as it goes through JSON.

{"version": 1,
 "devices": {ID: arguments of device_add},     what the user said of a device plugged in
 "unplugged": [ID, ...],                       devices of the command line that are gone
 "unplugged_anonymous": [N, ...],              the same without ids, by their place there
 "objects": {ID: arguments of object-add}, "objects_gone": [ID, ...],
 "netdevs": {ID: arguments of netdev_add}, "netdevs_gone": [ID, ...],
 "nodes": {NODE-NAME: arguments of blockdev-add},
 "baseline": what the first instance made of the command line (survey.py)}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

VERSION = 1

Arguments = dict[str, Any]


@dataclass
class Record:
    devices: dict[str, Arguments] = field(default_factory=dict)
    unplugged: list[str] = field(default_factory=list)
    unplugged_anonymous: list[int] = field(default_factory=list)
    objects: dict[str, Arguments] = field(default_factory=dict)
    objects_gone: list[str] = field(default_factory=list)
    netdevs: dict[str, Arguments] = field(default_factory=dict)
    netdevs_gone: list[str] = field(default_factory=list)
    nodes: dict[str, Arguments] = field(default_factory=dict)
    baseline: dict[str, Any] = field(default_factory=dict)

    def note(self, command: str, arguments: Mapping[str, Any]) -> None:
        """A client's command that QEMU has carried out."""
        act = _NOTED.get(command)
        if act is not None:
            act(self, dict(arguments))

    def device_deleted(self, id: str) -> None:
        """QEMU's event, whoever asked for it: a client, or the guest."""
        if self.devices.pop(id, None) is None and id not in self.unplugged:
            self.unplugged.append(id)

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})

    def _device_add(self, arguments: Arguments) -> None:
        # One without an id is described from what it is.
        if "id" in arguments:
            self.devices[arguments["id"]] = arguments

    def _object_add(self, arguments: Arguments) -> None:
        self.objects[arguments["id"]] = arguments

    def _object_del(self, arguments: Arguments) -> None:
        _forget(self.objects, self.objects_gone, arguments["id"])

    def _netdev_add(self, arguments: Arguments) -> None:
        self.netdevs[arguments["id"]] = arguments

    def _netdev_del(self, arguments: Arguments) -> None:
        _forget(self.netdevs, self.netdevs_gone, arguments["id"])

    def _blockdev_add(self, arguments: Arguments) -> None:
        if "node-name" in arguments:
            self.nodes[arguments["node-name"]] = arguments

    def _blockdev_del(self, arguments: Arguments) -> None:
        self.nodes.pop(arguments["node-name"], None)

    def _blockdev_reopen(self, arguments: Arguments) -> None:
        for options in arguments["options"]:
            self.nodes[options["node-name"]] = options


def _forget(added: dict[str, Arguments], gone: list[str], id: str) -> None:
    if added.pop(id, None) is None and id not in gone:
        gone.append(id)


_NOTED: Mapping[str, Callable[[Record, Arguments], None]] = {
    "device_add": Record._device_add,
    "object-add": Record._object_add,
    "object-del": Record._object_del,
    "netdev_add": Record._netdev_add,
    "netdev_del": Record._netdev_del,
    "blockdev-add": Record._blockdev_add,
    "blockdev-del": Record._blockdev_del,
    "blockdev-reopen": Record._blockdev_reopen,
}
