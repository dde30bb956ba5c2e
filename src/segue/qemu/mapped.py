"""What a running QEMU maps, and whether that is still what its path holds.

A binary is *outdated* when a new start from the same path would run other code. That is judged
by device, inode and GNU build id, never by times: package managers set a file's times to the
build's, and a reinstalled package of the same build is no news.

A `Started` is recorded when QEMU starts, because later the files are gone from their paths:

    {"script": str or null, "path": str, "device": int, "inode": int, "build_id": str}

`script` is the text of what was executed if that is no ELF file (a distribution's wrapper), its
bytes taken as Latin-1; the rest is the QEMU program itself, wherever a wrapper or a dynamic loader
found it.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from segue.qemu import elf

_DELETED = " (deleted)"
_MAX_SCRIPT = 64 << 10
# A mapping: addresses, permissions, offset, device, inode, path. Only mapped files of which code
# is run matter here: guest RAM and the like are deleted files too.
_CODE = re.compile(rb"([0-9a-f]+-[0-9a-f]+) ..x. [0-9a-f]+ [0-9a-f]+:[0-9a-f]+ (\d+) +(/.*)")
# TCG's own code buffer with split-wx, shared anonymous memory, System V segments.
_NO_FILES = ("/memfd:", "/dev/zero", "/SYSV", "/anon_hugepage", "/dev/shm/")  # noqa: S108


@dataclass(frozen=True)
class MainObject:
    """The QEMU program that a process runs; `build_id` falls back to the file's SHA-256."""

    path: str
    device: int
    inode: int
    build_id: str


@dataclass(frozen=True)
class Started(MainObject):
    """What a process was started from, to be kept for as long as it runs."""

    script: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Started:
        return cls(**value)


def main_object(pid: int) -> MainObject | None:
    """The program that `pid` runs, behind wrappers and a dynamic loader given by name.

    None if the process is gone, is another user's, or runs no program that can be found.
    """
    executed = f"/proc/{pid}/exe"
    try:
        header = elf.read(executed)
        if header and header.program:
            return _identify(os.readlink(executed), executed, header.build_id)
        # `ld.so PROGRAM` is executed as ld.so, which then maps the program itself.
        for line in _maps(pid):
            if match := _CODE.fullmatch(line):
                path = os.fsdecode(match[3])
                header = elf.read(path)
                if header and header.program and os.stat(path).st_ino == int(match[2]):
                    return _identify(path, path, header.build_id)
    except OSError:
        pass
    return None


def remember(path: Path, pid: int) -> Started | None:
    """To be called once `pid`, started from `path`, runs QEMU (its monitor has answered)."""
    main = main_object(pid)
    if main is None:
        return None
    return Started(**asdict(main), script=_script(path))


def outdated(pid: int, path: Path, started: Started | None) -> str | None:
    """Why `pid` is not what a start from `path` would run now; None if it is, or if unknown.

    Without a record of the start, a wrapper's script is taken to be the same as it was.
    """
    started = started or remember(path, pid)
    if started is None:
        return None
    if started.script is None:
        reason = _replaced(path, started)
    elif (script := _script(path)) != started.script:
        reason = f"{path} has changed" if script or path.exists() else f"{path} is gone"
    else:
        reason = _replaced(Path(started.path), started)
    return reason or _deleted_library(pid, started)


def _replaced(path: Path, started: Started) -> str | None:
    try:
        now = os.stat(path)
    except FileNotFoundError:
        return f"{path} is gone"
    except OSError:
        return None
    if (now.st_dev, now.st_ino) == (started.device, started.inode):
        return None
    if _identity(str(path)) == started.build_id:
        return None
    return f"{path} holds another binary now"


def _deleted_library(pid: int, started: Started) -> str | None:
    try:
        # The ending first: there are hundreds of lines, and `segue ls` asks of every machine.
        gone = [line for line in _maps(pid) if line.endswith(b" (deleted)")]
    except OSError:
        return None
    for match in filter(None, map(_CODE.fullmatch, gone)):
        addresses = match[1].decode()
        path = os.fsdecode(match[3]).removesuffix(_DELETED)
        if path.startswith(_NO_FILES) or path == started.path:
            continue
        # The mapped file itself can be read only with privileges; without them a library that was
        # reinstalled as it was counts as another one, which errs on the safe side.
        old = elf.build_id(f"/proc/{pid}/map_files/{addresses}")
        if old is None or old != elf.build_id(path):
            return f"{path}, which it uses, was replaced"
    return None


def _maps(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/maps").read_bytes().splitlines()


def _identify(path: str, readable: str, build_id: str | None) -> MainObject:
    status = os.stat(readable)
    return MainObject(
        path.removesuffix(_DELETED),
        status.st_dev,
        status.st_ino,
        build_id or _hash(readable),
    )


def _identity(path: str) -> str | None:
    try:
        return elf.build_id(path) or _hash(path)
    except OSError:
        return None


def _hash(path: str) -> str:
    # Here, because it costs 0.6 MiB, and nearly every QEMU has a build id.
    import hashlib

    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _script(path: Path) -> str | None:
    """None for an ELF file, and for what cannot be read. Wrappers are a few hundred bytes."""
    try:
        with open(path, "rb") as file:
            start = file.read(_MAX_SCRIPT)
    except OSError:
        return None
    return None if start.startswith(b"\x7fELF") else start.decode("latin-1")
