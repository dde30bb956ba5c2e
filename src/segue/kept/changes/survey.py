"""The machine as it is now, against its command line: what a successor must be given instead."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from segue.errors import Blocker
from segue.kept import confined
from segue.kept.base import Kept, Lending, Part
from segue.kept.changes import backends, blocks, carried, devices, graph, hmp, jobs
from segue.kept.changes.record import Record
from segue.kept.changes.settings import Settings, actions
from segue.kept.display import VncAddress
from segue.kept.draft import Draft, Note, Words
from segue.kept.unkeepable import UnkeepableRule
from segue.kept.user import ForwardedPorts
from segue.qemu.commandline import CommandLine, Option
from segue.qemu.monitor import Monitor
from segue.saved import Loader, Saver

# Options that make drives.
_DRIVES = ("drive", "blockdev", "hda", "hdb", "hdc", "hdd", "cdrom", "fda", "fdb", "mtdblock", "sd")
_MADE_BY = {"object": "objects", "netdev": "netdevs", "chardev": "chardevs"}
_REMOVES = {"object-del": "objects", "netdev_del": "netdevs", "chardev-remove": "chardevs"}
_KINDS = {
    "ram": "objects",
    "tap": "netdevs",
    "passt": "netdevs",
    "hostfwd": "netdevs",
    "chardev": "chardevs",
}

_FORGETS_NO_CPU = (11, 1)

Key = tuple[str, str]


class Gone(Kept):
    """In the place of what the command line made and a client has removed."""

    def __init__(self, kind: str, name: str) -> None:
        self.kind, self.name = kind, name

    def arguments(self, lending: Lending) -> list[str]:
        return []

    def identity(self) -> dict[str, Any]:
        return {}


@dataclass
class Changes(Kept):
    """What `survey` found is what `amend` gives to the next instance.

    `parts` are what was added while the machine ran and the supervisor owns, by kind and id: they
    live as other kept objects do, by way of this one. `incumbent()` is the instance's monitor and
    number.
    """

    draft: Draft
    incumbent: Callable[[], tuple[Monitor, int]] = field(init=False, repr=False)
    say: Callable[[str], None] = field(default=lambda line: None, repr=False)
    record: Record = field(default_factory=Record)
    parts: dict[Key, Kept] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    _settings: Settings = field(default_factory=Settings)
    _replaced: dict[int, list[Option | Part]] = field(default_factory=dict)
    _added: list[Option | Part] = field(default_factory=list)
    _anonymous_gone: list[int] = field(default_factory=list)
    _to_settle: list[Kept] = field(default_factory=list)

    kind = "changes"
    name = "qmp"

    # -- what clients do ------------------------------------------------------------------

    def carries_out(self) -> dict[str, Callable[[dict[str, Any]], Awaitable[Any] | None]]:
        """Commands that the supervisor carries out on QEMU in a client's place."""
        return {
            "object-add": self._object_add,
            "chardev-add": lambda arguments: self._chardev_add("chardev-add", arguments),
            "chardev-change": lambda arguments: self._chardev_add("chardev-change", arguments),
            "set-action": self._set_action,
        }

    def observe(
        self, command: str, arguments: dict[str, Any], fds: Sequence[int], answer: Any
    ) -> None:
        """A client's command was carried out."""
        if command == "human-monitor-command":
            said = hmp.translate(arguments["command-line"])
            # A human monitor says nothing when it has done it.
            if said is not None and not str(answer).strip():
                self.record.note(*said, text=True)
        self.record.note(command, arguments)
        if command in _REMOVES:
            key = (_REMOVES[command], arguments["id"])
            part = self.parts.pop(key, None)
            if part is not None:
                part.close()
            self._let_go(key)
        self.changed()

    def device_deleted(self, path: str, id: str | None) -> None:
        self.record.device_deleted(path, id)
        self.changed()

    def _object_add(self, arguments: dict[str, Any]) -> Awaitable[Any] | None:
        ram = carried.memory(self.draft, arguments)
        if not str(arguments.get("qom-type")).startswith("memory-backend-"):
            return None
        if ram is None or confined.is_confined(self.draft.command_line):
            self.record.private[str(arguments.get("id"))] = (
                "QEMU gave up its view of /proc (chroot=, user=), so its memory cannot be shared"
                if ram is not None
                else "it is QEMU's own, and cannot be shared"
            )
            return None

        async def add() -> Any:
            reply = await carried.add_memory(self.incumbent()[0], ram, arguments)
            if "return" in reply:
                self._own("objects", ram)
            return reply

        return add()

    def _own(self, kind: str, part: Kept) -> None:
        part.changed = lambda: self.changed()
        self.parts[kind, part.name] = part

    def _chardev_add(self, command: str, arguments: dict[str, Any]) -> Awaitable[Any] | None:
        kept = carried.broker(carried.chardev(arguments), self.say)
        if kept is None and command == "chardev-add":
            return None
        monitor, number = self.incumbent()

        async def add() -> Any:
            if kept is None:
                reply = await monitor.relay({"execute": command, "arguments": arguments})
            else:
                lending = Lending(number, self.draft.binary)
                reply = await carried.add_chardev(monitor, command, kept, lending, arguments)
            if "return" in reply:
                key = ("chardevs", str(arguments["id"]))
                old = self.parts.pop(key, None)
                if kept is not None:
                    self._own("chardevs", kept)
                if old is not None:
                    old.close()
                self._let_go(key)
            return reply

        return add()

    def _set_action(self, arguments: dict[str, Any]) -> Awaitable[Any] | None:
        """The guest's end is told to the supervisor first, which does what was said."""
        monitor, _ = self.incumbent()
        return monitor.relay({"execute": "set-action", "arguments": actions(arguments)})

    # -- describing -----------------------------------------------------------------------

    async def learn(self, monitor: Monitor) -> None:
        """The first instance is up, and no client has changed anything."""
        if self.record.baseline:
            return
        self.record.baseline = {
            "anonymous": await devices.anonymous(monitor),
            "blocks": blocks.baseline(await graph.read(monitor)),
            "backends": (await backends.look(monitor)).names(),
            "parameters": await monitor.execute("query-migrate-parameters"),
        }
        self.changed()

    async def survey(self, monitor: Monitor) -> list[Blocker]:
        """Describe the machine; why it cannot be built like this, if so."""
        items, record = self.draft.items, self.record
        told = [(i, item) for i, item in enumerate(items) if isinstance(item, Option)]
        now = await graph.read(monitor)
        disks = blocks.survey(now, [(i, o) for i, o in told if o.name in _DRIVES], record)
        if confined.has_own_root(self.draft.command_line):
            disks.blockers += blocks.opened_inside(now, record)
        found = await devices.survey(
            monitor, [(i, o) for i, o in told if o.name == "device"], record, now, disks.renamed
        )
        rest = await backends.survey(monitor, record, self.parts, self.draft)
        gone = {i for i, item in enumerate(items) if _made(item) in rest.gone}
        for key in rest.gone:
            self._let_go(key)
        self._replaced = {index: [] for index in disks.dropped | found.dropped | gone}
        self._replaced |= {i: [option] for i, option in (disks.altered | found.altered).items()}
        self._added = [*rest.added, *disks.added]
        self._added += [Words((*devices.words(properties),)) for properties in found.added]
        self._anonymous_gone = found.anonymous_gone
        self._to_settle = rest.kept
        self.notes = rest.notes
        await self._settings.survey(monitor, now, record)
        for kept in self.draft.kept:
            if isinstance(kept, VncAddress):
                await kept.learn(monitor)  # a client may have given it another
        ports = [k for k in (*self.draft.kept, *rest.kept) if isinstance(k, ForwardedPorts)]
        usernet = await monitor.hmp("info usernet") if ports else ""
        for each in ports:
            each.learn_from(usernet)
        return [
            *disks.blockers,
            *rest.blockers,
            *_unkeepable(self.draft, found.added),
            *await jobs.blockers(monitor, now, record),
            *await _unplugged_cpu(monitor, record),
        ]

    def _let_go(self, key: Key) -> None:
        """QEMU may have something else under its descriptors' numbers by now."""
        for index, kept in enumerate(self.draft.kept):
            if _made(kept) == key and not isinstance(kept, Gone):
                self.draft.kept[index] = Gone(kept.kind, kept.name)
                self.record.let_go.append([kept.kind, kept.name])
                kept.close()
                self.changed()

    def against_suspend(self) -> list[Blocker]:
        """A directory has the command line that the machine was started with, and no more."""
        if not (self._replaced or self._added or self._settings.commands):
            return []
        return [
            Blocker(
                "what was changed since the start",
                "devices, disks or settings that clients changed are not in a suspended machine",
                "undo the changes first",
            )
        ]

    def amend(self, items: list[Option | Part]) -> list[Option | Part]:
        """What the next instance is given in place of `items`."""
        amended: list[Option | Part] = []
        for index, item in enumerate(items):
            amended += self._replaced.get(index, [item])
        return amended + self._added

    def settled(self) -> None:
        """The instance that was given all this is the machine now."""
        gone = {*self.record.unplugged_anonymous, *self._anonymous_gone}
        self.record.unplugged_anonymous = sorted(gone)
        self._anonymous_gone = []
        self.record.cpu_unplugged = False
        self.changed()

    # -- as every kept object -------------------------------------------------------------

    def arguments(self, lending: Lending) -> list[str]:
        """They are spread over the command line: see `amend`."""
        return []

    def save(self, saver: Saver) -> dict[str, Any]:
        parts = [[*key, part.save(saver.within(".".join(key)))] for key, part in self.parts.items()]
        return {"record": self.record.to_json(), "parts": parts}

    async def load(self, data: dict[str, Any], loader: Loader) -> None:
        self.record = Record.from_json(data["record"])
        for index, kept in enumerate(self.draft.kept):
            if [kept.kind, kept.name] in self.record.let_go:
                self.draft.kept[index] = Gone(kept.kind, kept.name)
        for kind, id, saved in data["parts"]:
            part: Kept | None
            if kind == "objects":
                part = carried.memory(self.draft, self.record.objects[id])
            else:
                part = carried.broker(carried.chardev(self.record.chardevs[id]), self.say)
            assert part is not None, f"{kind} {id} was kept"
            await part.load(saved, loader.within(f"{kind}.{id}"))
            self._own(kind, part)

    async def quiet(self) -> None:
        for part in self.parts.values():
            await part.quiet()

    async def furnish(self, monitor: Monitor) -> None:
        await self._settings.furnish(monitor)
        for part in self.parts.values():
            await part.furnish(monitor)

    def freeze(self) -> None:
        for part in self.parts.values():
            part.freeze()

    def hold(self) -> None:
        for part in self.parts.values():
            part.hold()

    def take_back(self) -> None:
        for part in self.parts.values():
            part.take_back()

    def pass_on(self, number: int) -> None:
        for part in self.parts.values():
            part.pass_on(number)

    def restore(self) -> None:
        for part in self.parts.values():
            part.restore()

    def switch(self, number: int) -> None:
        for part in self.parts.values():
            part.switch(number)

    async def settle(self, monitor: Monitor) -> None:
        for part in (*self.parts.values(), *self._to_settle):
            await part.settle(monitor)
        await self._settings.settle(monitor, self.record)

    def give_back(self) -> None:
        for part in self.parts.values():
            part.give_back()

    def drop(self, number: int) -> None:
        for part in self.parts.values():
            part.drop(number)

    def close(self) -> None:
        for part in self.parts.values():
            part.close()

    def identity(self) -> dict[str, Any]:
        record = self.record
        told = {
            "devices": sorted(record.devices),
            "unplugged": sorted(record.unplugged),
            "nodes": sorted(record.nodes),
            "objects": sorted(record.objects),
            "netdevs": sorted(record.netdevs),
            "chardevs": sorted(record.chardevs),
        }
        return {name: value for name, value in told.items() if value}


def _made(item: Option | Part) -> Key | None:
    """What an item of the command line makes, as Backends.gone names it."""
    if isinstance(item, Option):
        kind = _MADE_BY.get(item.name)
        return None if kind is None or item.id is None else (kind, item.id)
    if isinstance(item, Kept) and item.kind in _KINDS:
        return _KINDS[item.kind], item.name
    return None


async def _unplugged_cpu(monitor: Monitor, record: Record) -> list[Blocker]:
    """Under TCG QEMU before 11.1 forgets to take an unplugged CPU from those whose memory's
    listeners it calls at the start of a migration: 7.2 then ends by SIGABRT, 10.0 hangs.
    """
    if not record.cpu_unplugged or (await monitor.execute("query-kvm"))["enabled"]:
        return []
    version = (await monitor.execute("query-version"))["qemu"]
    if (version["major"], version["minor"]) >= _FORGETS_NO_CPU:
        return []
    return [
        Blocker(
            "a CPU that was unplugged",
            "without KVM, QEMU before 11.1 hangs or crashes when it is migrated after that",
            "start the machine again",
        )
    ]


def _unkeepable(draft: Draft, added: Sequence[dict[str, Any]]) -> list[Blocker]:
    """Devices that could not be kept on a command line either."""
    options = tuple(devices.option(**properties) for properties in added)
    judged = Draft(CommandLine(draft.command_line.program, options), draft.binary)
    UnkeepableRule().apply(judged)
    return judged.blockers
