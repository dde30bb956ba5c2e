"""systemd's descriptor store: a service's clients outlive QEMU and supervisor both.

Where the supervisor alone dies its QEMU has all that is needed (keeper.py). Where QEMU dies too, or
dies and takes the machine with it, systemd starts the machine again (Restart=on-failure), and the
guest boots. As on a real machine, its serial lines do not hang up for that: what is connected to a
character device stays connected, and ports go on listening. A monitor's QMP clients are let go:
what they know is of a QEMU that is dead.

Stored under MARK.NAME is each descriptor that NAME has in a state (saved.py) and that means
something without this QEMU. MARK is a checksum of the command line and of what is kept of it: a
machine whose file says something else by then begins with nothing.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from segue.saved import Identity, Loader, Saver, identity

if TYPE_CHECKING:
    from segue.cpr.systemd import Notifier
    from segue.kept.description import Description
    from segue.qemu.commandline import CommandLine


_STORED = re.compile(r"[0-9a-f]{8}\.(kept|control)\d+\..+")


def mark(line: CommandLine, machine: Description) -> str:
    kept = [(each.kind, each.name) for each in machine.kept]
    return f"{zlib.crc32(json.dumps([line.argv(), kept]).encode()):08x}"


class Store:
    """What systemd holds for one machine. Without systemd it is empty, and stays so."""

    def __init__(self, notifier: Notifier | None = None, passed: Mapping[str, int] = {}) -> None:
        """`passed` is what it gave to this process, and still has."""
        self._notifier = notifier
        self._passed = dict(passed)
        self._stored: dict[str, Identity] = {}
        self._mark = ""

    @classmethod
    def of_systemd(cls) -> Store:
        if "NOTIFY_SOCKET" not in os.environ:
            return cls()
        from segue.cpr.systemd import Notifier, listen_fds

        notifier = Notifier(os.environ["NOTIFY_SOCKET"], timeout=0)
        return cls(notifier, {each.name: each.fd for each in listen_fds()})

    def open(self, mark: str) -> Loader:
        """What was stored of this machine. Another's is let go of, so that its ports are free.

        What is no machine's is from a socket unit, and for whoever names its number (`fd=3`).
        """
        self._mark = mark
        found: dict[str, int] = {}
        foreign = []
        for name, fd in self._passed.items():
            whose, _, inner = name.partition(".")
            if whose == mark:
                found[inner] = fd
                self._stored[inner] = identity("self", fd)
            elif _STORED.fullmatch(name):
                foreign.append(name)
                os.close(fd)
        self._passed.clear()
        if foreign and self._notifier is not None:
            for name in foreign:
                self._notifier.remove(name)
            self._notifier.barrier()
        return Loader(False, found)

    def keep(self, saver: Saver) -> None:
        """Have systemd hold what outlives a QEMU, and nothing else. Never waits for it."""
        if self._notifier is None:
            return
        wanted = {name: each.fd for name, each in saver.found.items() if each.outlives}
        now = {name: identity("self", fd) for name, fd in wanted.items()}
        for name in [name for name, stored in self._stored.items() if now.get(name) != stored]:
            if self._notifier.remove(f"{self._mark}.{name}"):
                del self._stored[name]
        for name in now.keys() - self._stored.keys():
            # A terminal that nobody has opened looks hung up to systemd, which would let it go.
            if self._notifier.store(f"{self._mark}.{name}", [wanted[name]], poll=False):
                self._stored[name] = now[name]

    @property
    def used(self) -> bool:
        return self._notifier is not None

    def clear(self) -> None:
        """The machine has ended for good."""
        if self._notifier is not None:
            for name in self._stored:
                self._notifier.remove(f"{self._mark}.{name}")
        self._stored.clear()

    def save(self) -> dict[str, Identity]:
        """For the code that takes this process's place; of a crash `open` learns."""
        return self._stored

    def load(self, saved: Mapping[str, Identity], mark: str) -> None:
        self._mark = mark
        self._stored |= saved
