"""User networks: given to a passt where there is one that can do what they say, else to slirp.

slirp lives inside QEMU: its established connections end with the incumbent. Its listening ports
cannot be bound twice, so a successor is started without them and given them by `hostfwd_add`
once the incumbent is dead.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from segue.errors import SegueError
from segue.kept import cards, usernet
from segue.kept.base import Kept, Lending
from segue.kept.draft import Draft
from segue.qemu.commandline import Option
from segue.qemu.monitor import Monitor

if TYPE_CHECKING:
    from segue.kept.passt import Found

AUTO, PASST, SLIRP = "auto", "passt", "slirp"

DROPS = "user networking lives inside QEMU: connections through it will drop at an upgrade"
_DEFAULT_CARD = "the default network card"
# Machines to which QEMU adds one; in others it would complain about a card without a place.
_HAVE_DEFAULT_CARD = ("pc", "q35", "virt")


_NETWORK = re.compile(r"^Hub -?\d+ \((.*)\):\r?$", re.MULTILINE)
# Protocol, descriptor, then the host's address and port, then the guest's.
_FORWARD = re.compile(
    r"^ *(TCP|UDP)\[HOST_FORWARD\] +\d+ +(\S+) +(\d+) +(\S+) +(\d+) ", re.MULTILINE
)
# A rule that QEMU lists among the forwards.
_LISTED = re.compile(r"(tcp|udp)?:[^:]*:\d+-[^:]*:\d+$")


class ForwardedPorts(Kept):
    """One network of slirp's and its `hostfwd`, which clients may change (`hostfwd_add`)."""

    kind = "hostfwd"

    def __init__(self, option: Option) -> None:
        self._first = option.argv()
        self._forwards = usernet.values(option.params, "hostfwd")
        self._later = option.with_params(option.params.without("hostfwd")).argv()
        self._id = option.params.get("id")
        self.name = self._id or "user"

    def arguments(self, lending: Lending) -> list[str]:
        return self._first if lending.first else self._later

    def learn_from(self, usernet: str) -> None:
        """What HMP's `info usernet` tells; where `hostfwd` said port 0, the port that it became."""
        _, *rest = _NETWORK.split(usernet)
        listed = dict(zip(rest[::2], rest[1::2], strict=True))
        if self._id is None and len(listed) == 1:
            (text,) = listed.values()
        elif self._id in listed:
            text = listed[self._id]
        else:
            return  # QEMU gave it a name of its own
        unlisted = [rule for rule in self._forwards if not _LISTED.match(rule)]
        self._forwards = unlisted + [
            f"{protocol.lower()}:{host.replace('*', '')}:{port}-{guest}:{number}"
            for protocol, host, port, guest, number in _FORWARD.findall(text)
        ]

    async def settle(self, monitor: Monitor) -> None:
        for forward in self._forwards:
            where = f"{self._id} {forward}" if self._id else forward
            said = await monitor.hmp(f"hostfwd_add {where}")
            if said.strip():
                raise SegueError(f"hostfwd {forward}: {said.strip()}")

    def identity(self) -> dict[str, Any]:
        return {"hostfwd": self._forwards} if self._forwards else {}


class UserRule:
    """`net_user` is what the user wants."""

    def __init__(self, net_user: str = AUTO) -> None:
        self._net_user = net_user
        self._found: Found | str | None = None

    def apply(self, draft: Draft) -> None:
        default = _default_card(draft)
        users = _users(draft) + default
        if not users:
            return
        plans = draft.decide(
            "user networks",
            lambda: [self._plan(option) for option in users],
            otherwise=[{"why": "the machine was started so"}] * len(users),
        )
        for option, plan in zip(users, plans, strict=True):
            if "why" in plan:
                said = _DEFAULT_CARD if default else f"-{option.name} {option.value}"
                if self._net_user == PASST:
                    raise SegueError(
                        f"{said}: {plan['why']}", hint="--net-user=auto uses slirp then"
                    )
                draft.note(said, f"{DROPS} ({plan['why']})")
        if any("why" not in p and o.name == "nic" for o, p in zip(users, plans, strict=True)):
            draft.add(*default)
            cards.split(draft)
        every = draft.decide("ports that clients forward", lambda: True, otherwise=False)
        for option, plan in zip(_users(draft), plans, strict=not default):
            if "why" not in plan:
                _give_to_passt(draft, option, plan)
            elif every or usernet.values(option.params, "hostfwd"):
                kept = ForwardedPorts(option)
                draft.kept.append(kept)
                draft.replace(option, kept)

    def _plan(self, option: Option) -> dict[str, Any]:
        """How passt is to be run for a network, or why it is not."""
        if self._net_user == SLIRP:
            return {"why": "--net-user=slirp was given"}
        # Only where it is needed: each module is paid for in the memory of every supervisor.
        from segue.kept import passt

        if self._found is None:
            self._found = passt.find()
        if isinstance(self._found, str):
            return {"why": self._found}
        try:
            words = usernet.translate(option.params)
        except usernet.Untranslatable as error:
            return {"why": str(error)}
        plan: dict[str, Any] = {
            "command": [self._found.path, *words],
            "version": self._found.version,
        }
        return plan | {"restrict": True} if usernet.restricted(option.params) else plan


def _users(draft: Draft) -> list[Option]:
    return [o for o in draft.options("netdev", "nic", "net") if o.params.get("type") == "user"]


def _default_card(draft: Draft) -> list[Option]:
    """The network card that QEMU adds by itself, spelled out."""
    if draft.options("netdev", "nic", "net") or draft.flag("nodefaults"):
        return []
    default = "" if draft.binary.target == "aarch64" else "pc"
    machine = draft.command_line.machine_type or default
    return [Option.of("nic", "user")] if machine.startswith(_HAVE_DEFAULT_CARD) else []


def _give_to_passt(draft: Draft, option: Option, plan: dict[str, Any]) -> None:
    from segue.kept.passt import Passt

    name = cards.name_of(draft, option)
    more = cards.plugged_in(option, name)
    kept = Passt(name, plan["command"], plan["version"], more, plan.get("restrict", False))
    draft.kept.append(kept)
    draft.replace(option, kept)
