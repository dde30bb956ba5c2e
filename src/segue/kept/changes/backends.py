"""Objects, network back ends and character devices as they are now: what came, what is gone.

QEMU tells which there are. What a new one is, is what a client said when it added it; one that
nobody was seen to add (typed into a human monitor) is described if all of it can be read, or is a
blocker.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from segue.errors import Blocker, CommandFailed
from segue.kept import confined
from segue.kept.base import Kept, Part
from segue.kept.changes import carried
from segue.kept.changes.record import Record
from segue.kept.draft import Draft, Note, Words
from segue.kept.network import NetworkRule
from segue.kept.user import DROPS, ForwardedPorts
from segue.qemu.commandline import CommandLine, Option
from segue.qemu.jsontree import flatten
from segue.qemu.monitor import Monitor
from segue.qemu.options import Params

_NETDEV = re.compile(
    r"^(?: \\ )?(?:hub\d+port\d+: )?(.*?): index=\d+,type=([a-z0-9-]+)", re.MULTILINE
)
# Objects all of whose properties can be read again, and those of 7.2 and later.
_READABLE = {
    "iothread": (
        *("poll-max-ns", "poll-grow", "poll-shrink"),
        *("aio-max-batch", "thread-pool-min", "thread-pool-max"),
    ),
    "rng-builtin": (),
    "rng-random": ("filename",),
    "throttle-group": ("limits",),
}
_UNSAID = "nobody was seen to add it, and QEMU does not tell how it was made"
_BY_QMP = "unplug it; what is added through QMP can be kept"


@dataclass
class There:
    """What an instance has, by name; objects and back ends with their types."""

    objects: dict[str, str]
    netdevs: dict[str, str]
    chardevs: list[str]

    def names(self) -> dict[str, list[str]]:
        return {
            "objects": sorted(self.objects),
            "netdevs": sorted(self.netdevs),
            "chardevs": sorted(self.chardevs),
        }


async def look(monitor: Monitor) -> There:
    objects, network, chardevs = await asyncio.gather(
        monitor.execute("qom-list", {"path": "/objects"}),
        monitor.hmp("info network"),
        monitor.execute("query-chardev"),
    )
    return There(
        objects={
            o["name"]: o["type"][6:-1]
            for o in objects
            # Since 11.1 each monitor is an object too.
            if o["type"].startswith("child<") and not o["type"].startswith("child<monitor-")
        },
        # Those of `-nic` have no id of the user's: QEMU numbers them, each release in its own way.
        netdevs={
            name: kind
            for name, kind in _NETDEV.findall(network)
            if kind != "nic" and not name.startswith("#")
        },
        # QEMU makes one for as long as a human monitor's command is carried out.
        chardevs=[c["label"] for c in chardevs if not c["label"].startswith("#")],
    )


@dataclass
class Backends:
    """`gone`: (kind, id) of what the command line made."""

    gone: set[tuple[str, str]] = field(default_factory=set)
    added: list[Option | Part] = field(default_factory=list)
    blockers: list[Blocker] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)


async def survey(
    monitor: Monitor, record: Record, parts: Mapping[tuple[str, str], Kept], draft: Draft
) -> Backends:
    """Compare what there is with what there was at the start."""
    there = await look(monitor)
    found = Backends()
    before: dict[str, list[str]] = record.baseline["backends"]
    for kind, names in there.names().items():
        said: Mapping[str, Any] = getattr(record, kind)
        found.gone |= {(kind, name) for name in before[kind] if name not in names}
        # Changed, or removed and added again.
        found.gone |= {(kind, name) for name in before[kind] if name in said}
    found.blockers += [
        Blocker(f"memory '{id}'", why, "unplug it, or start the machine with it")
        for id, why in record.private.items()
        if id in there.objects
    ]
    found.blockers += _opened_inside(there, record, draft)
    new = [id for id in record.objects if id in there.objects]
    new += [i for i in there.objects if i not in new and i not in before["objects"]]
    for id in new:
        if id not in record.private:
            await _object(monitor, found, id, there.objects[id], record, parts)
    for id in there.netdevs:
        if id in record.netdevs:
            _netdev(found, record.netdevs[id], draft)
        elif id not in before["netdevs"]:
            found.blockers.append(Blocker(f"network '{id}'", _UNSAID, _BY_QMP))
    for id in there.chardevs:
        if ("chardevs", id) in parts:
            found.added.append(parts["chardevs", id])
        elif id in record.chardevs:
            _chardev(found, id, record.chardevs[id])
        elif id not in before["chardevs"]:
            found.blockers.append(Blocker(f"chardev '{id}'", _UNSAID, _BY_QMP))
    return found


def _opened_inside(there: There, record: Record, draft: Draft) -> list[Blocker]:
    if not confined.has_own_root(draft.command_line):
        return []
    found = [
        f"object '{id}'"
        for id, arguments in record.objects.items()
        if id in there.objects and id not in record.private and confined.names(arguments)
    ]
    for id, arguments in record.chardevs.items():
        made = carried.chardev(arguments)
        said = dict(made.params.items()) if made is not None and made.backend == "file" else {}
        if id in there.chardevs and confined.names(said):
            found.append(f"chardev '{id}'")
    return [confined.opened_inside(what) for what in found]


async def _object(
    monitor: Monitor,
    found: Backends,
    id: str,
    kind: str,
    record: Record,
    parts: Mapping[tuple[str, str], Kept],
) -> None:
    if ("objects", id) in parts:
        found.added.append(parts["objects", id])
    elif kind.startswith("memory-backend-"):
        why = "it was added by a human monitor, and is QEMU's own"
        found.blockers.append(Blocker(f"memory '{id}'", why, _BY_QMP))
    elif id in record.objects:
        given = record.objects[id]
        text = f"object-add {id}" in record.text
        words = str(Params.of(given, "qom-type")) if text else _json(given)
        found.added.append(Words(("-object", words)))
    elif kind in _READABLE:
        try:
            properties = await _properties(monitor, id, _READABLE[kind])
        except CommandFailed:
            return  # removed since it was listed: before the machine is frozen clients may do that
        told = {"qom-type": kind, "id": id, **properties}
        found.added.append(Words(("-object", _json(told))))
    else:
        found.blockers.append(Blocker(f"object '{id}' ({kind})", _UNSAID, _BY_QMP))


def _json(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, separators=(",", ":"))


async def _properties(monitor: Monitor, id: str, names: Sequence[str]) -> dict[str, Any]:
    path = f"/objects/{id}"
    values = [await monitor.execute("qom-get", {"path": path, "property": name}) for name in names]
    return dict(zip(names, values, strict=True))


def _netdev(found: Backends, arguments: Mapping[str, Any], draft: Draft) -> None:
    kind, id = arguments.get("type"), arguments["id"]
    if kind in ("tap", "bridge"):
        found.blockers.append(
            Blocker(
                f"network '{id}' ({kind})",
                "its interface was opened by the QEMU that runs, while it ran",
                "unplug it, or start the machine with -netdev tap",
            )
        )
        return
    option = Option.of("netdev", Params.of(list(flatten(dict(arguments)))))
    if kind == "user":
        ports = ForwardedPorts(option)
        found.added.append(ports)
        found.kept.append(ports)
        found.notes.append(Note(f"network '{id}'", DROPS))
        return
    judged = Draft(CommandLine(draft.command_line.program, (option,)), draft.binary)
    NetworkRule().apply(judged)
    found.added += judged.items
    found.kept += judged.kept
    found.blockers += judged.blockers
    found.notes += judged.notes


def _chardev(found: Backends, id: str, arguments: Mapping[str, Any]) -> None:
    made = carried.chardev(arguments)
    why = carried.why_not(made)
    if made is None or why is not None:
        remedy = "use a unix socket or a pty, added through QMP"
        found.blockers.append(Blocker(f"chardev '{id}'", why or "", remedy))
    else:
        found.added.append(Words(tuple(carried.words(made))))
