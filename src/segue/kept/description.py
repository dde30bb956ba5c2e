"""A machine as its user described it: what is kept, what each instance is given, what blocks."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

from segue.errors import Blocker
from segue.kept.base import Kept, Lending
from segue.kept.broker import Broker
from segue.kept.changes.survey import Changes
from segue.kept.characters import CharactersRule
from segue.kept.confined import ConfinedRule
from segue.kept.display import DisplayRule
from segue.kept.draft import Draft, Rule, apply
from segue.kept.files import FilesRule
from segue.kept.lent import LentRule
from segue.kept.lifecycle import Lifecycle, LifecycleRule
from segue.kept.mux import Mux
from segue.kept.network import NetworkRule
from segue.kept.ram import GuestRam, RamRule
from segue.kept.renamed import RenamedRule
from segue.kept.unkeepable import UnkeepableRule
from segue.kept.user import AUTO, UserRule
from segue.kept.values import Values, ValuesRule
from segue.kept.yank import OUR_OWN
from segue.qemu.binary import Binary
from segue.qemu.chardevs import Chardev, find_chardevs
from segue.qemu.commandline import CommandLine
from segue.qemu.monitor import Monitor

_CONSOLES = ("isa-serial", "pci-serial", "virtconsole", "sclpconsole", "spapr-vty")


@dataclass(frozen=True)
class Description:
    """`control` are the QMP monitors that the user asked for, with whether they print pretty.

    `changes` is what became of it since.
    """

    draft: Draft
    values: Values
    started_as: Lifecycle
    control: tuple[tuple[Chardev, bool], ...]
    changes: Changes

    @property
    def kept(self) -> list[Kept]:
        return self.draft.kept

    @property
    def lifecycle(self) -> Lifecycle:
        """What the command line says of its end, or a client's `set-action` since."""
        actions = self.changes.record.actions
        return replace(
            self.started_as,
            shutdown=actions.get("shutdown", self.started_as.shutdown),
            panic=actions.get("panic", self.started_as.panic),
        )

    @property
    def ram_bytes(self) -> int:
        return sum(kept.size for kept in self._all_kept() if isinstance(kept, GuestRam))

    def _all_kept(self) -> list[Kept]:
        return [*self.kept, *self.changes.parts.values()]

    def console(self) -> Broker | Mux | None:
        """The first serial device that is kept; else the first other console."""
        brokers = {kept.name: kept for kept in self.kept if isinstance(kept, Broker | Mux)}
        for chardev in find_chardevs(self.draft.command_line):
            if chardev.frontend == "serial" and chardev.id in brokers:
                return brokers[chardev.id]
        for option in self.draft.command_line.all("serial", "device"):
            used = (option.value or "").removeprefix("chardev:")
            if option.name == "device":
                if option.params.get("driver") not in _CONSOLES:
                    continue
                used = option.params.get("chardev") or ""
            if used in brokers:
                return brokers[used]
        return None

    def argv(self, lending: Lending) -> list[str]:
        if lending.first:
            return self.draft.argv(lending)
        words = self.draft.argv(lending, self.changes.amend(self.draft.items))
        return [*words, "-S", *lending.incoming]

    async def survey(self, monitor: Monitor) -> list[Blocker]:
        """See what became of the machine, for `argv`; what of it stands against an upgrade."""
        return await self.changes.survey(monitor)

    async def learn(self, monitor: Monitor) -> None:
        await self.values.learn(monitor)
        for kept in self.kept:
            await kept.learn(monitor)

    def correct_chardevs(self, reply: dict[str, Any]) -> dict[str, Any]:
        """An answer to `query-chardev`: the ends that the user has, where QEMU knows only ours."""
        brokers = {kept.name: kept for kept in self._all_kept() if isinstance(kept, Broker)}
        reply["return"] = [
            entry | {"filename": brokers[entry["label"]].filename}
            if entry["label"] in brokers
            else entry
            for entry in reply["return"]
            if entry["label"] not in OUR_OWN
        ]
        return reply

    def receipts_of(self, pid: int) -> list[dict[str, Any]]:
        """What is kept, each with the identity that proves it and, where it can, /proc's word."""
        told = []
        for kept in self._all_kept():
            identity = kept.identity()
            if not identity:
                continue  # there is nothing of its kind at the moment
            entry: dict[str, Any] = {"kind": kept.kind, "name": kept.name, "identity": identity}
            with contextlib.suppress(OSError):  # the process is gone
                held = kept.held_by(pid)
                if held is not None:
                    entry["held"] = held
            told.append(entry)
        return told


def describe(
    command_line: CommandLine,
    binary: Binary,
    decisions: dict[str, Any] | None = None,
    *,
    net_user: str = AUTO,
) -> Description:
    """Judge a command line; nothing is opened yet. Raises BadCommandLine.

    `decisions` are those of the machine that runs already (Draft.decide); `net_user` is what user
    networks are to be given to (user.py).
    """
    values = Values()
    characters = CharactersRule()
    rules: list[Rule] = [
        UnkeepableRule(),
        RenamedRule(),
        ConfinedRule(),
        LentRule(),
        FilesRule(),
        RamRule(),
        ValuesRule(values),
        characters,
        UserRule(net_user),
        NetworkRule(),
        DisplayRule(),
        LifecycleRule(),
    ]
    draft = Draft(command_line, binary, decisions=decisions or {}, recalled=decisions is not None)
    apply(draft, rules)
    changes = Changes(draft)
    # The first that is taken up by another process: it knows what of the others is gone.
    draft.kept.insert(0, changes)
    control = tuple(characters.control)
    return Description(draft, values, LifecycleRule.read(draft), control, changes)
