"""A QEMU that gives up its root or its user once it is built (`-run-with`, `-chroot`, `-runas`).

What it had not opened before it cannot open then, or it opens something else. So:

- `auto-read-only`, which is on for `-drive`, makes QEMU open an image anew whenever it begins or
  ceases to write, by name. Both happen at an upgrade, so images are opened for writing at once.
- A name that a client used after the start means something within `chroot=`, where a successor,
  which opens everything before it goes there, would find another file: a blocker.
- Each release has its own words for it: `-chroot` and `-runas` went when `-run-with` had come.
- It has no view of /proc, so its own memory cannot be lent to it later (changes/carried.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from segue.errors import Blocker
from segue.kept.base import Lending, Part
from segue.qemu.commandline import CommandLine, Option
from segue.qemu.options import Params

if TYPE_CHECKING:
    from segue.kept.draft import Draft

_KEY = "auto-read-only"
_FDSET = "/dev/fdset/"
# What options that are only a path stand for.
_SHORT = {
    **{f"hd{'abcd'[n]}": {"index": str(n), "media": "disk"} for n in range(4)},
    **{f"fd{'ab'[n]}": {"if": "floppy", "index": str(n)} for n in range(2)},
    "mtdblock": {"if": "mtd"},
    "sd": {"if": "sd"},
    "pflash": {"if": "pflash"},
}
# Since when `-run-with` has it, and what there was before.
_RUN_WITH = {"chroot": ((8, 1, 0), "-chroot"), "user": ((9, 1, 0), "-runas")}
# Properties of objects that name a file or a folder.
_NAMES = ("file", "filename", "dir", "mem-path", "path")


def is_confined(line: CommandLine) -> bool:
    return _gives_up(line, "user", "runas") or has_own_root(line)


def has_own_root(line: CommandLine) -> bool:
    return _gives_up(line, "chroot", "chroot")


def _gives_up(line: CommandLine, key: str, old: str) -> bool:
    return line.flag(old) or any(key in option.params for option in line.all("run-with"))


class ConfinedRule:
    """In the words of the user at first, then in those of each QEMU."""

    def apply(self, draft: Draft) -> None:
        for option in draft.options("chroot", "runas", "run-with"):
            params = option.params if option.name == "run-with" else Params()
            chroot = option.value if option.name == "chroot" else params.get("chroot")
            user = option.value if option.name == "runas" else params.get("user")
            if chroot is not None or user is not None:
                rest = params.without("chroot", "user")
                draft.replace(option, _GivesUp(option, chroot, user, rest))
        if has_own_root(draft.command_line):
            for option in draft.options("vnc"):
                if (option.params.get("vnc") or "").startswith("unix:"):
                    draft.block(
                        f"-vnc {option.value}",
                        "after chroot= QEMU cannot take its socket over from another",
                        "use -vnc with a port",
                    )


@dataclass(frozen=True)
class _GivesUp(Part):
    option: Option
    chroot: str | None
    user: str | None
    rest: Params

    def arguments(self, lending: Lending) -> list[str]:
        if lending.first:
            return self.option.argv()
        words: list[str] = []
        together = self.rest
        for key, value in (("chroot", self.chroot), ("user", self.user)):
            since, old = _RUN_WITH[key]
            if value is not None and lending.target.version >= since:
                together = together.set(key, value)
            elif value is not None:
                words += [old, value]
        return [*words, *(["-run-with", str(together)] if len(together) else [])]


def opened_once(option: Option) -> Option:
    """The option so that its image need not be opened a second time."""
    if option.name in _SHORT and option.value:
        option = Option.of("drive", Params.of({**_SHORT[option.name], "file": option.value}))
    if option.name == "drive":
        return _drive(option)
    return _blockdev(option) if option.name == "blockdev" else option


def _drive(option: Option) -> Option:
    params = option.params
    name = params.get("file") or params.get("file.filename") or ""
    if (
        params.get("media") == "cdrom"
        or params.boolean("readonly", False)
        or params.boolean("read-only", False)
        or not os.access(name, os.W_OK)
    ):
        return option
    return option.with_params(params.set(_KEY, "off"))


def _blockdev(option: Option) -> Option:
    params = option.params
    if params.json is not None:
        tree = params.tree()
        return option.with_value(json.dumps(_off(tree)))
    keys = [key for key in params.keys() if key.rpartition(".")[2] == _KEY]
    return option.with_params(params.update({key: "off" for key in keys})) if keys else option


def _off(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    return {key: False if key == _KEY else _off(below) for key, below in node.items()}


def opened_inside(what: str) -> Blocker:
    return Blocker(
        what,
        "QEMU opened it after chroot=, where names mean something else than before",
        "remove it, or start the machine with it; a descriptor (/dev/fdset/N) can be kept",
    )


def names(arguments: Mapping[str, Any], keys: Iterable[str] = _NAMES) -> bool:
    """Whether one of these arguments names a file, rather than a descriptor."""
    return any(key in arguments and not is_lent(str(arguments[key])) for key in keys)


def is_lent(name: str) -> bool:
    return name.startswith(_FDSET)
