"""The user's devices as they are now: which are gone, which came, and where each of them is.

A device that was plugged in is given to a successor as `-device` JSON: the properties that the
user named, with the values that they have now, and the very address where the guest sees it.
QEMU makes JSON devices after all others, so that one that was plugged in finds its bus. What
nobody was seen to add (typed into a human monitor, say) is described by the properties that are
not their defaults.

Devices without an id are `device[N]` below /machine/peripheral-anon, N counting from 0 as they
are made: those of `-device` text in their order, then those of `-drive if=virtio`, then JSON.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from segue.errors import CommandFailed
from segue.kept.changes.graph import Graph
from segue.kept.changes.record import Record
from segue.qemu.commandline import Option
from segue.qemu.monitor import Monitor
from segue.qemu.options import Params

_USB = re.compile(r"Device \S+, Port (\S+), .*, ID: (.*?)\r?$", re.MULTILINE)
_NAMED, _ANONYMOUS = "/machine/peripheral", "/machine/peripheral-anon"

# Where a device is, on all kinds of buses, as properties of it; a NIC's `mac` may be QEMU's choice.
_PLACE = ("addr", "port", "nr", "channel", "scsi-id", "lun", "unit", "slot", "memaddr", "mac")
_CPU_PLACE = ("socket-id", "die-id", "core-id", "thread-id", "node-id")
# What the device becomes by being plugged in, or that is told by the state that is moved.
_NOT_SAID = frozenset(("realized", "hotplugged", "hotpluggable", "parent_bus", "requested-size"))

# Defaults that stand for a choice of QEMU's own.
_AUTOMATIC = (0, -1, 0xFFFF, 0xFFFFFFFF, (1 << 64) - 1, "auto")
_CHOSEN = frozenset(("busnr", "device_id", "ver"))


@dataclass
class Devices:
    """`dropped` and `altered` by the option's place among the command line's; `added` in order."""

    dropped: set[int] = field(default_factory=set)
    altered: dict[int, Option] = field(default_factory=dict)
    added: list[dict[str, Any]] = field(default_factory=list)
    anonymous_gone: list[int] = field(default_factory=list)


async def anonymous(monitor: Monitor) -> list[str]:
    """The types of the devices without an id; asked when nothing has been changed yet."""
    found = await _children(monitor, _ANONYMOUS)
    return [found[name] for name in sorted(found, key=_number)]


async def survey(
    monitor: Monitor,
    options: Sequence[tuple[int, Option]],
    record: Record,
    graph: Graph,
    renamed: dict[str, str],
) -> Devices:
    """Compare what there is with the command line's `-device` options.

    `renamed`: what the successor calls a block node that has no lasting name.
    """
    named, unnamed = await asyncio.gather(
        _children(monitor, _NAMED), _children(monitor, _ANONYMOUS)
    )
    found = Devices()
    types: list[str] = record.baseline["anonymous"]
    at_start = _anonymous_options(options, types)
    kept = [n for n in range(len(types)) if n not in record.unplugged_anonymous]
    where: dict[int, str] = {}
    for index, option in options:
        id = option.id
        if id is not None and id in named and id not in record.unplugged:
            where[index] = f"{_NAMED}/{id}"
            del named[id]
        elif id is not None:
            found.dropped.add(index)
    for number, place in enumerate(kept):
        index_of = at_start.get(place)
        if unnamed.pop(f"device[{number}]", None) is None:
            found.anonymous_gone.append(place)
        elif index_of is not None:
            where[index_of] = f"{_ANONYMOUS}/device[{number}]"
    gone = {*record.unplugged_anonymous, *found.anonymous_gone}
    found.dropped |= {index for place, index in at_start.items() if place in gone}
    for index, option in options:
        if index in where:
            new = await _as_it_is(
                monitor, option, where[index], graph, renamed, bool(found.dropped)
            )
            if new is not option:
                found.altered[index] = new
    paths = [f"{_NAMED}/{name}" for name in named]
    paths += [f"{_ANONYMOUS}/{name}" for name in sorted(unnamed, key=_number)]
    added = [
        await _described(monitor, path, {**named, **unnamed}[path.rpartition("/")[2]], record)
        for path in paths
    ]
    for path, (_, properties) in zip(paths, added, strict=True):
        if properties.get("drive") == "":
            properties["drive"] = graph.disk_below(path)
        _rename(properties, renamed)
        if properties.get("port") == "":
            del properties["port"]
            properties |= await _usb_port(monitor, properties.get("id"))
    found.added = _in_order(added)
    return found


async def _children(monitor: Monitor, folder: str) -> dict[str, str]:
    """Name → type."""
    listed = await monitor.execute("qom-list", {"path": folder})
    return {c["name"]: c["type"][6:-1] for c in listed if c["type"].startswith("child<")}


def _anonymous_options(
    options: Sequence[tuple[int, Option]], types: Sequence[str]
) -> dict[int, int]:
    """Place in the order of making → index, for what certainly has that place.

    Other options make devices too (-drive if=virtio, -virtfs): where the types do not agree,
    nothing is certain.
    """
    text = [(i, o) for i, o in options if o.id is None and o.params.json is None]
    json = [(i, o) for i, o in options if o.id is None and o.params.json is not None]
    found: dict[int, int] = {}
    for start, group in ((0, text), (len(types) - len(json), json)):
        made = types[max(start, 0) :]
        if len(made) >= len(group) and all(
            f"{kind}-".startswith(f"{o.params.get('driver')}-")
            for kind, (_, o) in zip(made, group, strict=False)
        ):
            found |= {start + number: index for number, (index, _) in enumerate(group)}
    return found


def _number(name: str) -> int:
    return int(name.partition("[")[2].rstrip("]") or 0)


async def _get(monitor: Monitor, path: str, name: str) -> Any:
    """None where there is no such property, or it cannot be read."""
    try:
        value = await monitor.execute("qom-get", {"path": path, "property": name})
    except CommandFailed:
        return None
    if isinstance(value, str) and value.startswith("/objects/"):
        return value.removeprefix("/objects/")
    return value


async def _values(monitor: Monitor, path: str, names: Sequence[str]) -> dict[str, Any]:
    values = await asyncio.gather(*(_get(monitor, path, name) for name in names))
    return {n: v for n, v in zip(names, values, strict=True) if v is not None}


async def _as_it_is(
    monitor: Monitor,
    option: Option,
    path: str,
    graph: Graph,
    renamed: dict[str, str],
    pinned: bool,
) -> Option:
    """A device of the command line, with the disk that it has now.

    `pinned`: with its address too, which may follow from devices that are not there any more.
    """
    params = option.params
    new: dict[str, Any] = {}
    said = params.get("drive")
    if said is not None:
        drive = await _get(monitor, path, "drive")
        drive = graph.disk_below(path) if drive == "" else drive
        drive = renamed.get(drive, drive)
        if drive == "":
            params = params.without("drive")
        elif drive is not None and drive != said:
            new["drive"] = drive
    if pinned:
        values = await _values(monitor, path, ("addr", "parent_bus"))
        bus = values.get("parent_bus")
        if bus and isinstance(values.get("addr"), int) and "addr" not in params:
            devfn = values["addr"]
            new |= {"bus": _bus(bus), "addr": f"{devfn >> 3:02x}.{devfn & 7}"}
    if not new and params is option.params:
        return option
    return option.with_params(params.update(new))


async def _described(
    monitor: Monitor, path: str, kind: str, record: Record
) -> tuple[str, dict[str, Any]]:
    """(path of the bus, properties) of a device that was plugged in."""
    folder, _, name = path.rpartition("/")
    said = record.devices.get(name) if folder == _NAMED else None
    result: dict[str, Any] = {"driver": kind}
    if folder == _NAMED:
        result["id"] = name
    is_cpu = kind.endswith("-cpu")
    if said is not None:
        result["driver"] = said["driver"]
        names = [key for key in said if key not in ("driver", "id", "bus", "requested-size")]
    elif is_cpu:
        names = list(_CPU_PLACE)
    else:
        names = await _not_default(monitor, path, kind)
    # A CPU's other properties follow from -cpu.
    names = list(dict.fromkeys((*names, *(() if is_cpu else _PLACE))))
    values = await _values(monitor, path, names)
    bus = await _get(monitor, path, "parent_bus") or ""
    if bus:
        result["bus"] = _bus(bus)
    for key in names:
        if key in values:
            result[key] = values[key]
        elif said is not None and key in said:
            result[key] = said[key]
    return bus, result


async def _usb_port(monitor: Monitor, id: str | None) -> dict[str, str]:
    """The port that QEMU chose: its property is what the user said."""
    for port, name in _USB.findall(await monitor.hmp("info usb")):
        if name == id:
            return {"port": port}
    return {}


async def _not_default(monitor: Monitor, path: str, kind: str) -> list[str]:
    listed = await monitor.execute("device-list-properties", {"typename": kind})
    defaults = {
        p["name"]: p.get("default-value")
        for p in listed
        if p["name"] not in _NOT_SAID
        and not p["name"].startswith("x-")
        and not p["type"].startswith("child<")
    }
    values = await _values(monitor, path, list(defaults))
    return [
        name
        for name, value in values.items()
        if value not in (defaults[name], "", [], None) and not _chosen(name, defaults[name])
    ]


def _chosen(name: str, default: Any) -> bool:
    """Whether QEMU chooses the value where the user says nothing."""
    return name in _CHOSEN or (not isinstance(default, bool) and default in _AUTOMATIC)


def _bus(path: str) -> str:
    return path.rpartition("/")[2]


def _rename(properties: dict[str, Any], renamed: dict[str, str]) -> None:
    drive = properties.get("drive")
    if drive == "":
        del properties["drive"]
    elif drive in renamed:
        properties["drive"] = renamed[drive]


def _in_order(devices: Sequence[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A device after those that have its bus."""
    left = list(devices)
    ordered: list[dict[str, Any]] = []
    while left:
        ids = {properties["id"] for _, properties in left if "id" in properties}
        ready = [
            device
            for device in left
            if not ids.intersection(device[0].removeprefix(f"{_NAMED}/").split("/")[:1])
        ] or left[:1]
        ordered += [properties for _, properties in ready]
        left = [device for device in left if device not in ready]
    return ordered


def words(properties: dict[str, Any]) -> list[str]:
    return ["-device", json.dumps(properties, separators=(",", ":"))]


def option(driver: str, **properties: Any) -> Option:
    return Option.of("device", Params.of([("driver", driver), *properties.items()], "driver"))
