"""What a kept object leaves to the process that takes it up: plain data, and descriptors by name.

Twice, in the same words:

exact       other code takes the supervisor's place in the same process (`segue reexec`), while
            nothing moves: every byte that waits here is part of it
not exact   written beforehand, against the supervisor being killed (machine.json). What changes
            with every byte is left out, since bytes that have moved on must not be sent again;
            and what nobody holds any more is missing from the descriptors

Plain data is what JSON knows; bytes go through `text` and `raw`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from segue.kept.guard import Guard


Identity = list[str]


@dataclass(frozen=True)
class Named:
    """A descriptor of ours. `lent`: every instance has it anyway, so that none need be asked to
    hold a duplicate; `held` are its numbers in the instances, where they alone tell it from others
    of its kind. `outlives`: it means something to the next QEMU of this command line even where
    this one dies with its guest (store.py).
    """

    fd: int
    lent: bool = False
    held: Mapping[int, int] | None = None
    outlives: bool = False


@dataclass
class Saver:
    """Where `Kept.save` puts its descriptors. They stay open, and its own."""

    exact: bool
    found: dict[str, Named] = field(default_factory=dict)
    prefix: str = ""

    def within(self, name: str) -> Saver:
        """For a part of the object: names in it begin with `name`."""
        return Saver(self.exact, self.found, f"{self.prefix}{name}.")

    def fd(
        self,
        name: str,
        fd: int,
        *,
        lent: bool = False,
        held: Mapping[int, int] | None = None,
        outlives: bool = False,
    ) -> None:
        key = self.prefix + name
        assert key not in self.found, f"two descriptors are called {key}"
        self.found[key] = Named(fd, lent or held is not None, held, outlives)

    def bytes(self, data: bytes | bytearray) -> str:
        """Bytes that wait here: only an exact state has them."""
        return text(data) if self.exact else ""


@dataclass
class Loader:
    """Where `Kept.load` finds them. What it takes is its own from then on.

    `guards` are those of the instances, by number. `held`: an upgrade was under way, so nothing
    may flow before `switch` or `give_back`.
    """

    exact: bool
    found: dict[str, int]
    guards: Mapping[int, Guard] = field(default_factory=dict)
    held: bool = False
    prefix: str = ""

    def within(self, name: str) -> Loader:
        return Loader(self.exact, self.found, self.guards, self.held, f"{self.prefix}{name}.")

    def fd(self, name: str) -> int | None:
        """None where it is lost; an exact state has all."""
        return self.found.pop(self.prefix + name, None)

    def needed(self, name: str) -> int:
        """As `fd`, of what must be there. Raises KeyError."""
        return self.found.pop(self.prefix + name)

    def socket(self, name: str) -> socket.socket | None:
        fd = self.fd(name)
        return None if fd is None else socket.socket(fileno=fd)


def text(data: bytes | bytearray) -> str:
    return data.decode("latin-1")


def raw(data: str) -> bytes:
    return data.encode("latin-1")


def identity(pid: int | str, fd: int | str) -> Identity:
    """What tells an open file from others, as /proc shows it. Raises OSError.

    fdinfo tells taps and ptys apart, which share the inode of their device.
    """
    path = f"/proc/{pid}/fd/{fd}"
    status = os.stat(path)
    known = [str(status.st_dev), str(status.st_ino), str(status.st_rdev)]
    link = os.readlink(path)
    if link.startswith("anon_inode:"):
        return [*known, link]
    if status.st_rdev:
        with open(f"/proc/{pid}/fdinfo/{fd}") as file:
            known += [line.strip() for line in file if line.startswith(("iff:", "tty-index:"))]
    return known
