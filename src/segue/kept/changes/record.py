"""What clients told QEMU that QEMU does not tell again. Plain data, as it goes through JSON.

{"version": 1,
 "devices": {ID: arguments of device_add},     what the user said of a device plugged in
 "unplugged": [ID, ...],                       devices of the command line that are gone
 "unplugged_anonymous": [N, ...],              the same without ids, by their place there
 "objects": {ID: arguments of object-add},
 "netdevs": {ID: arguments of netdev_add},
 "chardevs": {ID: arguments of chardev-add or chardev-change},
 "nodes": {NODE-NAME: arguments of blockdev-add},
 "private": {ID: why},                         memory that QEMU has by itself
 "links": {NAME: whether it is up},
 "passwords": [[COMMAND, arguments], ...],     of displays, one of each kind
 "actions": {EVENT: action},                   set-action, watchdog-set-action
 "properties": [[PATH, NAME, VALUE], ...],     qom-set
 "nbd": whether QEMU's NBD server was started,
 "text": ["COMMAND ID", ...],                  what was given to a human monitor
 "cpu_unplugged": whether a CPU was, from the QEMU of the moment,
 "let_go": [[KIND, NAME], ...],                what was kept and is not there any more
 "baseline": what the first instance made of the command line (survey.py)}
"""

from __future__ import annotations

import time
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
    netdevs: dict[str, Arguments] = field(default_factory=dict)
    chardevs: dict[str, Arguments] = field(default_factory=dict)
    nodes: dict[str, Arguments] = field(default_factory=dict)
    private: dict[str, str] = field(default_factory=dict)
    links: dict[str, bool] = field(default_factory=dict)
    passwords: list[list[Any]] = field(default_factory=list)
    actions: dict[str, str] = field(default_factory=dict)
    properties: list[list[Any]] = field(default_factory=list)
    nbd: bool = False
    cpu_unplugged: bool = False
    let_go: list[list[str]] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    baseline: dict[str, Any] = field(default_factory=dict)

    def note(self, command: str, arguments: Mapping[str, Any], text: bool = False) -> None:
        """A client's command that QEMU has carried out; `text`: its values have no types."""
        act = _NOTED.get(command)
        if act is not None:
            act(self, dict(arguments))
            name = f"{command} {arguments.get('id')}"
            if text and name not in self.text:
                self.text.append(name)
            elif not text and name in self.text:
                self.text.remove(name)

    def device_deleted(self, path: str, id: str | None) -> None:
        """QEMU's event, whoever asked for it: a client, or the guest."""
        if path.endswith("/lapic"):  # of an x86 CPU this alone is told
            self.cpu_unplugged = True
        if id is None:
            return
        if self.devices.pop(id, None) is None and id not in self.unplugged:
            self.unplugged.append(id)
        self._forget(id)

    def _forget(self, id: str) -> None:
        """What was set of it."""
        self.links.pop(id, None)
        self.properties = [p for p in self.properties if id not in p[0].split("/")]

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})

    def _device_add(self, arguments: Arguments) -> None:
        # One without an id is described from what it is.
        if "id" in arguments:
            self.devices[arguments["id"]] = arguments

    def _object_del(self, arguments: Arguments) -> None:
        for known in (self.objects, self.private):
            known.pop(arguments["id"], None)
        self._forget(arguments["id"])

    def _netdev_del(self, arguments: Arguments) -> None:
        self.netdevs.pop(arguments["id"], None)
        self._forget(arguments["id"])

    def _blockdev_add(self, arguments: Arguments) -> None:
        if "node-name" in arguments:
            self.nodes[arguments["node-name"]] = arguments

    def _blockdev_reopen(self, arguments: Arguments) -> None:
        for options in arguments["options"]:
            self._blockdev_add(options)

    def _set_link(self, arguments: Arguments) -> None:
        self.links[arguments["name"]] = arguments["up"]

    def _password(self, command: str, arguments: Arguments) -> None:
        since = arguments.get("time", "")
        if isinstance(since, str) and since.startswith("+"):
            arguments["time"] = str(int(time.time()) + int(since[1:]))
        kind = (command, arguments.get("protocol", "vnc"))
        self.passwords = [
            [other, given]
            for other, given in self.passwords
            if (other, given.get("protocol", "vnc")) != kind
        ]
        self.passwords.append([command, arguments])

    def _qom_set(self, arguments: Arguments) -> None:
        path, name = arguments["path"], arguments["property"]
        self.properties = [p for p in self.properties if p[:2] != [path, name]]
        # How much of a virtio-mem is asked for goes with the state that is moved.
        if name != "requested-size":
            self.properties.append([path, name, arguments["value"]])

    def _nbd(self, on: bool) -> None:
        self.nbd = on


def _by_id(kind: str) -> Callable[[Record, Arguments], None]:
    return lambda record, arguments: getattr(record, kind).update({arguments["id"]: arguments})


def _without(kind: str, key: str = "id") -> Callable[[Record, Arguments], None]:
    return lambda record, arguments: getattr(record, kind).pop(arguments[key], None)


_NOTED: Mapping[str, Callable[[Record, Arguments], None]] = {
    "device_add": Record._device_add,
    "object-add": _by_id("objects"),
    "object-del": Record._object_del,
    "netdev_add": _by_id("netdevs"),
    "netdev_del": Record._netdev_del,
    "chardev-add": _by_id("chardevs"),
    "chardev-change": _by_id("chardevs"),
    "chardev-remove": _without("chardevs"),
    "blockdev-add": Record._blockdev_add,
    "blockdev-del": _without("nodes", "node-name"),
    "blockdev-reopen": Record._blockdev_reopen,
    "set_link": Record._set_link,
    "set_password": lambda r, a: r._password("set_password", a),
    "change-vnc-password": lambda r, a: r._password("change-vnc-password", a),
    "expire_password": lambda r, a: r._password("expire_password", a),
    "set-action": lambda r, a: r.actions.update(a),
    "watchdog-set-action": lambda r, a: r.actions.update(watchdog=a["action"]),
    "qom-set": Record._qom_set,
    "nbd-server-start": lambda r, _: r._nbd(True),
    "nbd-server-stop": lambda r, _: r._nbd(False),
}
