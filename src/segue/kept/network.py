"""Which networks are kept and how, and a reason for every one that is not.

slirp lives inside QEMU: its established connections end with the incumbent. Its listening ports
cannot be bound twice, so a successor is started without them and given them by `hostfwd_add`
once the incumbent is dead.
"""

from __future__ import annotations

import os
from typing import Any

from segue.errors import SegueError
from segue.kept import seccomp
from segue.kept.base import Kept, Lending
from segue.kept.draft import Draft
from segue.kept.tap import VHOST_NET, Tap
from segue.qemu.commandline import Option
from segue.qemu.monitor import Monitor

_HARMLESS = ("none", "nic", "hubport", None)

_UNKNOWN = "Segue does not know this kind of network"
_INSTEAD = "use -netdev tap, bridge or user"


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
            if kind in ("tap", "bridge"):
                self._tap(draft, option)
            elif kind == "user":
                self._slirp(draft, option)
            elif kind not in _HARMLESS:
                why, remedy = _UNKEPT.get(kind or "", (_UNKNOWN, _INSTEAD))
                draft.block(f"-{option.name} {option.value}", why, remedy)
        if not options and not draft.flag("nodefaults") and draft.binary.target != "aarch64":
            draft.note("the default network card", _DROPS)

    def _tap(self, draft: Draft, option: Option) -> None:
        said = f"-{option.name} {option.value}"
        if not seccomp.available():
            draft.block(
                said,
                "the kernel has no seccomp user notification, by which a starting QEMU is kept "
                "from changing the interface",
                "use Linux 5.9 or newer, on x86_64 or aarch64",
            )
            return
        given = option.params.get("vhostfd") or option.params.get("vhostfds")
        if given and not os.access(VHOST_NET, os.R_OK | os.W_OK):
            draft.block(
                said,
                "a vhost descriptor serves one process, and later ones cannot open "
                f"{VHOST_NET} themselves",
                f"give the user of `segue run` access to {VHOST_NET}, or start without vhost",
            )
        kept = Tap(option, draft.command_line.program)
        draft.kept.append(kept)
        draft.replace(option, kept)

    def _slirp(self, draft: Draft, option: Option) -> None:
        draft.note(f"-{option.name} {option.value}", _DROPS)
        if option.params.get("hostfwd") is not None:
            kept = ForwardedPorts(option)
            draft.kept.append(kept)
            draft.replace(option, kept)


_DROPS = "user networking lives inside QEMU: connections through it will drop at an upgrade"

# type -> (why, remedy)
_PROCESS = "its back end shares the guest's memory and rings with one process"
_UNKEPT = {
    "vhost-user": (_PROCESS, "use -netdev tap"),
    "vhost-vdpa": ("a vDPA device belongs to one process", "use -netdev tap"),
    "vde": ("its connection to the switch lives inside QEMU", "use -netdev tap"),
    "l2tpv3": ("its counters and session live inside QEMU", "end the tunnel on the host"),
    "af-xdp": ("its sockets and rings belong to one process", "use -netdev tap"),
    "netmap": ("its rings belong to one process", "use -netdev tap"),
    "socket": ("its connection lives inside QEMU", _INSTEAD),
    "stream": ("its connection lives inside QEMU", _INSTEAD),
    "dgram": ("its connection lives inside QEMU", _INSTEAD),
    "passt": ("its passt belongs to one process", "use -netdev user"),
}
