"""Which networks are kept and how, and a reason for every one that is not."""

from __future__ import annotations

import os

from segue.kept import cards, seccomp
from segue.kept.draft import Draft
from segue.kept.tap import VHOST_NET, Tap
from segue.qemu.commandline import Option

# User networks were dealt with (user.py).
_HARMLESS = ("none", "nic", "hubport", "user", None)

_WIRES = ("stream", "dgram", "socket")

_UNKNOWN = "Segue does not know this kind of network"
_INSTEAD = "use -netdev tap, bridge, user, stream or dgram"


class NetworkRule:
    def apply(self, draft: Draft) -> None:
        if any(option.params.get("type") in _WIRES for option in draft.options("nic")):
            cards.split(draft)
        for option in draft.options("netdev", "nic", "net"):
            kind = option.params.get("type")
            if kind in ("tap", "bridge"):
                self._tap(draft, option)
            elif kind in _WIRES:
                _keep_wire(draft, option)
            elif kind not in _HARMLESS:
                why, remedy = _UNKEPT.get(kind or "", (_UNKNOWN, _INSTEAD))
                draft.block(f"-{option.name} {option.value}", why, remedy)

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


def _keep_wire(draft: Draft, option: Option) -> None:
    # Only where they are needed: each module is paid for in the memory of every supervisor.
    from segue.kept.plug import is_stream, plug_of
    from segue.kept.wire import Wire

    name = cards.name_of(draft, option)
    fd = option.params.get("fd")
    streams = draft.decide(f"fd of {name}", lambda: fd is None or is_stream(fd), otherwise=True)
    kept = Wire(name, plug_of(name, option.params, streams), cards.plugged_in(option, name))
    draft.kept.append(kept)
    draft.replace(option, kept)


# type -> (why, remedy)
_PROCESS = "its back end shares the guest's memory and rings with one process"
_UNKEPT = {
    "vhost-user": (_PROCESS, "use -netdev tap"),
    "vhost-vdpa": ("a vDPA device belongs to one process", "use -netdev tap"),
    "vde": ("its connection to the switch lives inside QEMU", "use -netdev tap"),
    "l2tpv3": ("its counters and session live inside QEMU", "end the tunnel on the host"),
    "af-xdp": ("its sockets and rings belong to one process", "use -netdev tap"),
    "netmap": ("its rings belong to one process", "use -netdev tap"),
    "passt": ("its passt belongs to one process", "use -netdev user"),
}
