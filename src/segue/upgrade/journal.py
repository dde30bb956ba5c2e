"""The journal: how far an upgrade has come, for a supervisor that starts after a crash.

Format, version 2: a file of exactly 4096 bytes, one JSON object (sealed.py) padded with spaces:
`{"version": 2, "phase": ..., "incumbent": {"pid", "start_time"}, "successor": {...} | null,
"running": BOOL, "directory": PATH | null}`: whether the guest ran when the upgrade began, and where
it is being suspended to.
The file is made at full size, of zeros, when the machine starts and then only overwritten in
place, so that no full disk can come between an upgrade and its commit point. It is not synced: what
it guards against is the crash of a process; a crash of the host takes the guest with it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from segue.errors import Refused, SegueError
from segue.qemu.instance import Instance
from segue.sealed import Damaged, seal, unseal

_SIZE = 4096
VERSION = 2


class Journal:
    """Raises SegueError if it cannot be written at all; overwriting needs no space."""

    running = True
    directory: Path | None = None

    def __init__(self, path: Path) -> None:
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.posix_fallocate(self._fd, 0, _SIZE)
        except OSError as error:
            raise SegueError(
                f"cannot write the journal '{path}': {error.strerror}",
                hint="is the run directory's file system full?",
            ) from None

    def write(self, phase: str, incumbent: Instance, successor: Instance | None) -> None:
        record = {
            "version": VERSION,
            "phase": phase,
            "incumbent": _identity(incumbent),
            "successor": _identity(successor) if successor else None,
            "running": self.running,
            "directory": str(self.directory) if self.directory else None,
        }
        os.pwrite(self._fd, seal(record).ljust(_SIZE), 0)

    def close(self) -> None:
        os.close(self._fd)


def read(path: Path) -> dict[str, Any] | None:
    """The last record; None where there is none.

    Raises Refused for what this version does not understand: which QEMU has the guest is not known
    then.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if not data.strip(b"\0"):
        return None
    try:
        if len(data) != _SIZE:
            raise Damaged(f"it has {len(data)} bytes")
        record = unseal(data.rstrip(b" "))
        if record["version"] != VERSION:
            raise Damaged("another version of Segue has written it")
    except Damaged as error:
        raise Refused(
            f"the journal {path} cannot be read: {error}",
            hint="which QEMU of this machine has the guest is not known: end them all, and start "
            "it again",
            guest="running without a supervisor",
        ) from None
    return record


def _identity(instance: Instance) -> dict[str, int]:
    return {"pid": instance.pid, "start_time": instance.start_time}
