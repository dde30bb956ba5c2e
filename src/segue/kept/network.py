"""User networking (slirp) as far as it can be kept, and a reason for every other network.

slirp lives inside QEMU: its established connections end with the incumbent. Its listening ports
cannot be bound twice, so a successor is started without them and given them by `hostfwd_add`
once the incumbent is dead.
"""

from __future__ import annotations

from typing import Any

from segue.errors import SegueError
from segue.kept.base import Kept, Lending
from segue.kept.draft import Draft
from segue.qemu.commandline import Option
from segue.qemu.monitor import Monitor

_HARMLESS = ("user", "none", "nic", "hubport", None)


class ForwardedPorts(Kept):
    """One user network with `hostfwd`."""

    kind = "hostfwd"

    def __init__(self, option: Option) -> None:
        self._first = option.argv()
        self._forwards = option.params.all("hostfwd")
        self._later = option.with_params(option.params.without("hostfwd")).argv()
        self._id = option.params.get("id")
        self.name = self._id or "user"

    def arguments(self, lending: Lending) -> list[str]:
        return self._first if lending.first else self._later

    async def settle(self, monitor: Monitor) -> None:
        for forward in self._forwards:
            where = f"{self._id} {forward}" if self._id else forward
            said = await monitor.hmp(f"hostfwd_add {where}")
            if said.strip():
                raise SegueError(f"hostfwd {forward}: {said.strip()}")

    def identity(self) -> dict[str, Any]:
        return {"hostfwd": self._forwards}


class NetworkRule:
    def apply(self, draft: Draft) -> None:
        options = draft.options("netdev", "nic", "net")
        for option in options:
            kind = option.params.get("type")
            if kind not in _HARMLESS:
                draft.block(
                    f"-{option.name} {option.value}",
                    f"a network of type {kind} is not kept by this version",
                    "use -netdev user, or no network",
                )
            elif kind == "user":
                self._slirp(draft, option)
        if not options and not draft.flag("nodefaults") and draft.binary.target != "aarch64":
            draft.note("the default network card", _DROPS)

    def _slirp(self, draft: Draft, option: Option) -> None:
        draft.note(f"-{option.name} {option.value}", _DROPS)
        if option.params.get("hostfwd") is not None:
            kept = ForwardedPorts(option)
            draft.kept.append(kept)
            draft.replace(option, kept)


_DROPS = "user networking lives inside QEMU: connections through it will drop at an upgrade"
