"""Which character devices are kept, and what an instance's command line says in their place."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial

from segue.kept import chardev as keeping
from segue.kept.base import Kept, Lending, Part
from segue.kept.draft import Computed, Draft, Words
from segue.kept.mux import Front
from segue.qemu.chardevs import Chardev, find_chardevs, monitors

# Front ends whose protocol sends descriptors through the chardev, or belongs to one process.
_PRIVATE = {
    "tpmdev": "a TPM emulator talks to one process, and descriptors pass through its channel",
    "netdev": "a vhost-user back end serves one process",
    "device": "a vhost-user back end serves one process",
}
_MONITOR_OBJECTS = (11, 1, 0)
_ONE_PROCESS_DEVICES = ("vhost-user", "ivshmem", "usb-redir", "ccid-card-passthru")


class CharactersRule:
    """Replaces each connected chardev by a kept one; control monitors go to `control`."""

    def __init__(self) -> None:
        self.control: list[tuple[Chardev, bool]] = []

    def apply(self, draft: Draft) -> None:
        line = draft.command_line
        control = {m.chardev: m.pretty for m in monitors(line) if m.mode == "control"}
        readline = {m.chardev for m in monitors(line) if m.mode == "readline"}
        private = dict(self._private(draft))
        presence = {
            option.params.get("chardev")
            for option in draft.options("device")
            if option.params.get("driver") == "virtserialport"
        }
        for chardev in find_chardevs(line):
            said = f"chardev '{chardev.id}' ({chardev.backend})"
            if chardev.id in private:
                draft.block(said, private[chardev.id], "unplug it, or start without it")
            elif chardev.id in control and not chardev.mux:
                if chardev.backend != "socket" or not chardev.params.boolean("server", False):
                    draft.block(said, "QMP is served on listening sockets only", "use server=on")
                    continue
                self.control.append((chardev, control[chardev.id]))
                self._forget(draft, chardev)
            elif chardev.frontend in ("gdb", "qtest"):
                continue
            elif reason := keeping.unsupported(chardev):
                draft.block(said, reason, "use a unix socket, a pty or stdio")
            elif chardev.backend in keeping.IN_MEMORY:
                draft.note(said, "what it holds is lost with its QEMU: read it out before")
            elif chardev.mux and chardev.monitor == "readline" and chardev.frontend == "serial":
                self._mux(draft, chardev)
            elif keeping.is_kept(chardev):
                kept = keeping.make(
                    chardev,
                    monitor=chardev.id in readline and not chardev.mux,
                    presence=chardev.id in presence,
                    gated=chardev.id in readline,
                    out=_say,
                    err=_complain,
                )
                draft.kept.append(kept)
                self._replace(draft, chardev, kept)

    def _mux(self, draft: Draft, chardev: Chardev) -> None:
        """`mon:stdio` and its like: a monitor and a serial port behind one client."""
        monitor = f"{chardev.id}.mon"
        escape = draft.command_line.value("echr")
        kept = keeping.make_mux(
            chardev,
            [Front(monitor, monitor=True), Front(chardev.id)],
            escape=int(escape, 0) if escape else 1,
            out=_say,
            err=_complain,
        )
        draft.kept.append(kept)
        words = Words(("-monitor", f"chardev:{monitor}", "-serial", f"chardev:{chardev.id}"))
        if chardev.origin is None:
            draft.add(kept, words)
        else:
            draft.replace(chardev.origin, kept, words)

    def _private(self, draft: Draft) -> Iterable[tuple[str, str]]:
        for name, why in _PRIVATE.items():
            for option in draft.options(name):
                kind = option.params.get("driver") or ""
                used = option.params.get("chardev")
                if used and (name != "device" or kind.startswith(_ONE_PROCESS_DEVICES)):
                    yield used, why

    def _replace(self, draft: Draft, chardev: Chardev, kept: Kept) -> None:
        words: list[Part] = []
        if chardev.frontend in ("serial", "parallel", "debugcon"):
            words.append(Words((f"-{chardev.frontend}", f"chardev:{chardev.id}")))
        if chardev.monitor == "readline":
            words.append(Computed(partial(_monitor, chardev.id)))
        if chardev.origin is None:
            draft.add(kept, *words)
        else:
            draft.replace(chardev.origin, kept, *words)

    def _forget(self, draft: Draft, chardev: Chardev) -> None:
        """Take a control monitor and its chardev off the command line.

        QEMU would make its default monitor then, which it does not beside a `-qmp`.
        """
        if not draft.flag("monitor"):
            draft.add(Words(("-monitor", "none")))
        for option in draft.options("mon", "object"):
            if option.params.get("chardev") == chardev.id:
                draft.replace(option)
        if chardev.origin is not None:
            draft.replace(chardev.origin)


def _monitor(chardev: str, lending: Lending) -> list[str]:
    """Not -mon, which QEMU 11.1 warns about.

    Nor -monitor there: it gives the monitor's object the chardev's name, `compat_monitor0`, and
    QEMU aborts when the gdb stub, by which interrupts are given again, makes one of that name.
    """
    if lending.target.version >= _MONITOR_OBJECTS:
        return ["-object", f"monitor-hmp,id=segue-{chardev},chardev={chardev}"]
    return ["-monitor", f"chardev:{chardev}"]


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _complain(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
