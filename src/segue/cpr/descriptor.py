"""Descriptors by name, and what proves that one is still what it was.

| kind                                        | identity                                         |
|---------------------------------------------|--------------------------------------------------|
| `socket`                                    | SO_COOKIE (unique while the host runs)           |
| `file`, `directory`, `fifo`                 | device, inode and access mode, which tells the   |
|                                             | ends of a pipe apart; a memfd is a `file` too    |
| `character`, `block`                        | the same, the device's number, and from fdinfo   |
|                                             | `iff` (the interface of a tap) and `tty-index`   |
|                                             | (the terminal of a pty master)                   |
| `pidfd`, `eventfd`, `eventpoll`, ...        | device and inode, which all of a kind share on   |
| (what /proc/self/fd says in brackets behind | older kernels, and from fdinfo `Pid`,            |
| `anon_inode:`)                              | `eventfd-id`, `clockid`                          |
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
from dataclasses import dataclass, field
from typing import Any, Protocol

from segue.cpr.errors import Reason, Refused

_SO_COOKIE = 57  # asm-generic/socket.h; Python has no name for it
_SHARED_INODE = ("iff", "tty-index", "Pid", "eventfd-id", "clockid")
_ANONYMOUS = "anon_inode:"
# Pid of a pidfd whose process has been reaped.
_REAPED = "-1"

_KINDS = {
    stat.S_IFSOCK: "socket",
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFIFO: "fifo",
    stat.S_IFCHR: "character",
    stat.S_IFBLK: "block",
}


class HasFileno(Protocol):
    def fileno(self) -> int: ...


@dataclass(frozen=True)
class Descriptor:
    """An open descriptor under a name, as the field of a section.

    In the process that saves it is lent: whoever opened it still owns it. In the process that has
    loaded it, it is the program's own, close-on-exec. The name alone is kept and compared: the
    number may be another one.
    """

    name: str
    fd: int = field(compare=False)

    @classmethod
    def of(cls, name: str, owner: int | HasFileno) -> Descriptor:
        """Raises Refused for an object that has more state than its descriptor."""
        if isinstance(owner, int):
            return cls(name, owner)
        refuse_what_hides_state(owner)
        return cls(name, owner.fileno())

    def fileno(self) -> int:
        return self.fd

    def socket(self) -> socket.socket:
        """The descriptor as a socket object, which owns it from here on."""
        return socket.socket(fileno=self.fd)


def refuse_what_hides_state(owner: object) -> None:
    """Raises Refused for objects that hold bytes or keys which nobody could take out of them."""
    # By the names of the classes, so that neither asyncio nor OpenSSL is imported for it.
    for base in type(owner).__mro__:
        module, name = base.__module__.partition(".")[0], base.__name__
        if module == "asyncio" and name in ("BaseTransport", "StreamReader", "StreamWriter"):
            raise Refused(
                f"asyncio's {type(owner).__name__} keeps bytes in a buffer of its own",
                "use segue.cpr.aio.Protocol, which owns both of its buffers",
                Reason.NOT_KEEPABLE,
            )
        if module == "asyncio" and name == "AbstractServer":
            raise Refused(
                f"asyncio's {type(owner).__name__} makes connections whose bytes are hidden",
                "use segue.cpr.aio.Server",
                Reason.NOT_KEEPABLE,
            )
        if (module, name) == ("ssl", "SSLSocket"):
            raise Refused(
                "the keys of a TLS connection are in the memory of this process",
                "end TLS in front of this process, or let such clients reconnect",
                Reason.NOT_KEEPABLE,
            )


@dataclass(frozen=True)
class Identity:
    """What a descriptor is. Two of one kind whose facts are the same are the same object."""

    kind: str
    facts: dict[str, int | str]

    @classmethod
    def of(cls, fd: int) -> Identity:
        """Raises OSError where nothing is open under this number."""
        status = os.fstat(fd)
        link = os.readlink(f"/proc/self/fd/{fd}")
        facts: dict[str, int | str] = {"device": status.st_dev, "inode": status.st_ino}
        if link.startswith(_ANONYMOUS):
            kind = link.removeprefix(_ANONYMOUS).strip("[]")
        else:
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "other")
            facts["access"] = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        if kind == "socket":
            facts = {"cookie": _cookie(fd)}
        elif kind in ("character", "block"):
            facts["rdev"] = status.st_rdev
        return cls(kind, facts | _from_fdinfo(fd))

    def same_as(self, other: Identity) -> bool:
        if self.kind != other.kind or self.facts.keys() != other.facts.keys():
            return False
        # The number goes when the process is reaped: by its parent, who need not be us.
        reaped = _REAPED in (self.facts.get("Pid"), other.facts.get("Pid"))
        return all(
            value == other.facts[name] or (name == "Pid" and reaped)
            for name, value in self.facts.items()
        )

    def __str__(self) -> str:
        return f"{self.kind} " + " ".join(f"{name}={fact}" for name, fact in self.facts.items())

    def to_plain(self) -> dict[str, Any]:
        return {"kind": self.kind, "facts": self.facts}


def check(name: str, fd: int, expected: Identity) -> None:
    """Raises Refused where `fd` is not what was saved under `name`."""
    found = None
    try:
        found = Identity.of(fd)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise Refused(
                f"descriptor {name} ({fd}): {error.strerror}", reason=Reason.DESCRIPTOR
            ) from error
    if found is None or not found.same_as(expected):
        raise Refused(
            f"descriptor {name} ({fd}) is {found or 'closed'} now, it was {expected}",
            reason=Reason.DESCRIPTOR,
        )


def _cookie(fd: int) -> int:
    borrowed = socket.socket(fileno=fd)
    try:
        raw = borrowed.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)
    finally:
        borrowed.detach()
    return int(struct.unpack("Q", raw)[0])


def _from_fdinfo(fd: int) -> dict[str, int | str]:
    found: dict[str, int | str] = {}
    with open(f"/proc/self/fdinfo/{fd}") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name in _SHARED_INODE:
                found[name] = value.strip()
    return found
