"""The machine as it is now, against its command line: what a successor must be given instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from segue.errors import Blocker
from segue.kept.base import Kept, Lending, Part
from segue.kept.changes import blocks, devices, graph
from segue.kept.changes.record import Record
from segue.kept.draft import Words
from segue.kept.saved import Loader, Saver
from segue.qemu.commandline import Option
from segue.qemu.monitor import Monitor

# Options that make drives.
_DRIVES = ("drive", "blockdev", "hda", "hdb", "hdc", "hdd", "cdrom", "fda", "fdb", "mtdblock", "sd")


@dataclass
class Changes(Kept):
    """What `survey` found is what `amend` gives to the next instance."""

    kind = "changes"
    name = "qmp"
    record: Record = field(default_factory=Record)
    _replaced: dict[int, list[Option | Part]] = field(default_factory=dict)
    _added: list[Option | Part] = field(default_factory=list)
    _anonymous_gone: list[int] = field(default_factory=list)

    def arguments(self, lending: Lending) -> list[str]:
        """They are spread over the command line: see `amend`."""
        return []

    def observe(
        self, command: str, arguments: dict[str, Any], fds: Sequence[int], answer: Any
    ) -> None:
        """A client's command was carried out."""
        self.record.note(command, arguments)
        self.changed()

    def device_deleted(self, id: str) -> None:
        self.record.device_deleted(id)
        self.changed()

    def save(self, saver: Saver) -> dict[str, Any]:
        return self.record.to_json()

    async def load(self, data: dict[str, Any], loader: Loader) -> None:
        self.record = Record.from_json(data)

    def identity(self) -> dict[str, Any]:
        told = {
            "devices": sorted(self.record.devices),
            "unplugged": sorted(self.record.unplugged),
            "nodes": sorted(self.record.nodes),
        }
        return {name: value for name, value in told.items() if value}

    async def learn(self, monitor: Monitor) -> None:
        """The first instance is up, and no client has changed anything."""
        if self.record.baseline:
            return
        self.record.baseline = {
            "anonymous": await devices.anonymous(monitor),
            "blocks": blocks.baseline(await graph.read(monitor)),
        }

    async def survey(self, monitor: Monitor, items: list[Option | Part]) -> list[Blocker]:
        """Describe the machine; why it cannot be built like this, if so."""
        told = [(i, item) for i, item in enumerate(items) if isinstance(item, Option)]
        disks = blocks.survey(
            await graph.read(monitor), [(i, o) for i, o in told if o.name in _DRIVES], self.record
        )
        found = await devices.survey(
            monitor, [(i, o) for i, o in told if o.name == "device"], self.record, disks.renamed
        )
        self._replaced = {index: [] for index in disks.dropped | found.dropped}
        self._replaced |= {i: [option] for i, option in (disks.altered | found.altered).items()}
        self._added = [*disks.added]
        self._added += [Words((*words,)) for words in self._objects()]
        self._added += [Words((*devices.words(properties),)) for properties in found.added]
        self._anonymous_gone = found.anonymous_gone
        return disks.blockers

    def amend(self, items: list[Option | Part]) -> list[Option | Part]:
        """What the next instance is given in place of `items`."""
        amended: list[Option | Part] = []
        for index, item in enumerate(items):
            amended += self._replaced.get(index, [item])
        return amended + self._added

    def settled(self) -> None:
        """The instance that was given all this is the machine now."""
        self.record.unplugged_anonymous = sorted(
            {*self.record.unplugged_anonymous, *self._anonymous_gone}
        )
        self._anonymous_gone = []

    def _objects(self) -> list[list[str]]:
        import json

        return [["-object", json.dumps(o)] for o in self.record.objects.values()]
