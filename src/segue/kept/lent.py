"""Descriptors that somebody lends to QEMU, by `getfd`, `add-fd` or `-add-fd`.

QEMU forgets them when its process ends; so a duplicate of each is held here, and a later instance
is given it under the same name, or in the same fd set, before it is compared. One that was taken
back (`closefd`, `remove-fd`) or used up is forgotten: QEMU gives a name up to the command that
names it (`monitor_get_fd`), and what that command made is somebody else's to keep.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from segue.errors import SegueError
from segue.kept.base import Kept, Lending
from segue.kept.draft import Draft
from segue.qemu.commandline import Option
from segue.qemu.monitor import Monitor
from segue.saved import Loader, Saver

_WORD = re.compile(r"[^\s,=:]+")


@dataclass
class _Fd:
    """One of an fd set; `number` is what QEMU calls it, of the instance of the moment."""

    fd: int
    fdset: int
    opaque: str | None
    number: int
    next_number: int = -1


@dataclass
class Lent(Kept):
    """What clients have given through QMP since the start."""

    kind = "descriptors"
    name = "qmp"
    _named: dict[str, int] = field(default_factory=dict)
    _sets: list[_Fd] = field(default_factory=list)

    def arguments(self, lending: Lending) -> list[str]:
        return []

    def save(self, saver: Saver) -> dict[str, Any]:
        for name, fd in self._named.items():
            saver.fd(f"named.{name}", fd, lent=True)
        for index, lent in enumerate(self._sets):
            saver.fd(f"set{index}", lent.fd, lent=True)
        return {
            "named": list(self._named),
            "sets": [[lent.fdset, lent.opaque, lent.number] for lent in self._sets],
        }

    async def load(self, data: dict[str, Any], loader: Loader) -> None:
        for name in data["named"]:
            if (fd := loader.fd(f"named.{name}")) is not None:
                self._named[name] = fd
        for index, (fdset, opaque, number) in enumerate(data["sets"]):
            if (fd := loader.fd(f"set{index}")) is not None:
                self._sets.append(_Fd(fd, fdset, opaque, number))

    def observe(self, command: str, arguments: dict[str, Any], fds: list[int], answer: Any) -> None:
        """A client's command was carried out; `answer` is what it returned.

        A descriptor that is taken out of `fds` is ours.
        """
        match command:
            case "getfd":
                self._forget(arguments["fdname"])
                self._named[arguments["fdname"]] = fds.pop()
            case "add-fd":
                opaque = arguments.get("opaque")
                self._sets.append(_Fd(fds.pop(), answer["fdset-id"], opaque, answer["fd"]))
            case "remove-fd":
                self._remove(arguments["fdset-id"], arguments.get("fd"))
            case _ if self._named:
                for name in set(_words(arguments)).intersection(self._named):
                    self._forget(name)
            case _:
                return
        self.changed()

    def _forget(self, name: str) -> None:
        if name in self._named:
            os.close(self._named.pop(name))

    def _remove(self, fdset: int, number: int | None) -> None:
        for lent in [each for each in self._sets if each.fdset == fdset]:
            if number in (None, lent.number):
                self._sets.remove(lent)
                os.close(lent.fd)

    async def furnish(self, monitor: Monitor) -> None:
        for name, fd in self._named.items():
            await monitor.execute("getfd", {"fdname": name}, fds=[fd])
        for lent in self._sets:
            opaque = {} if lent.opaque is None else {"opaque": lent.opaque}
            answer = await monitor.execute(
                "add-fd", {"fdset-id": lent.fdset, **opaque}, fds=[lent.fd]
            )
            lent.next_number = answer["fd"]

    def switch(self, number: int) -> None:
        for lent in self._sets:
            lent.number = lent.next_number

    def identity(self) -> dict[str, Any]:
        if not self._named and not self._sets:
            return {}
        return {
            "names": {name: _inode(fd) for name, fd in self._named.items()},
            "sets": [{"fdset": lent.fdset, **_inode(lent.fd)} for lent in self._sets],
        }

    def close(self) -> None:
        for fd in (*self._named.values(), *(lent.fd for lent in self._sets)):
            os.close(fd)
        self._named.clear()
        self._sets.clear()


class AddFd(Kept):
    """`-add-fd`: a descriptor that whoever called `segue run` has left open for QEMU."""

    kind = "descriptor"

    def __init__(self, option: Option) -> None:
        self._option = option
        self.name = f"fdset {option.params.get('set')}"
        self._fd: int | None = None

    async def start(self) -> None:
        try:
            self._fd = int(self._option.params.get("fd") or "")
            os.set_inheritable(self._fd, False)
        except (ValueError, OSError):
            self._fd = None
            raise SegueError(
                f"{self._option}: there is no such descriptor",
                hint="it must be open in the caller of segue run",
            ) from None

    def save(self, saver: Saver) -> dict[str, Any]:
        if self._fd is not None:
            saver.fd("fd", self._fd, lent=True)
        return {}

    async def load(self, data: dict[str, Any], loader: Loader) -> None:
        self._fd = loader.fd("fd")

    def arguments(self, lending: Lending) -> list[str]:
        if self._fd is None:
            return []
        number = lending.inherit(self._fd)
        return self._option.with_params(self._option.params.set("fd", str(number))).argv()

    def observe(
        self, command: str, arguments: dict[str, Any], fds: Sequence[int], answer: Any
    ) -> None:
        """As `Lent.observe`. A set is taken back as a whole: which number is ours is not known."""
        if command == "remove-fd" and "fd" not in arguments:
            if str(arguments["fdset-id"]) == self._option.params.get("set"):
                self.close()

    def identity(self) -> dict[str, Any]:
        return {} if self._fd is None else _inode(self._fd)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class LentRule:
    """`-add-fd`, and what clients will lend later."""

    def apply(self, draft: Draft) -> None:
        draft.kept.append(Lent())
        for option in draft.options("add-fd"):
            kept = AddFd(option)
            draft.kept.append(kept)
            draft.replace(option, kept)


def _words(value: Any) -> Iterator[str]:
    """Every text in a command's arguments, and the words of it (a human monitor's line)."""
    if isinstance(value, str):
        yield value
        yield from _WORD.findall(value)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _words(each)
    elif isinstance(value, list):
        for each in value:
            yield from _words(each)


def _inode(fd: int) -> dict[str, int]:
    status = os.fstat(fd)
    return {"device": status.st_dev, "inode": status.st_ino}
