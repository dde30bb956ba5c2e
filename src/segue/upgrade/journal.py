"""The journal: how far an upgrade has come, for a supervisor that starts after a crash.

Format, version 1: a file of exactly 4096 bytes, one JSON object padded with spaces:
`{"version": 1, "phase": ..., "incumbent": {"pid", "start_time"}, "successor": {...} | null,
"running": BOOL, "directory": PATH | null}`: whether the guest ran when the upgrade began, and where
it is being suspended to.
The file is made at full size when the machine starts and then only overwritten in place, so that
no full disk can come between an upgrade and its commit point. It is not synced: what it guards
against is the crash of a process; a crash of the host takes the guest with it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from segue.errors import SegueError
from segue.qemu.instance import Instance

_SIZE = 4096
VERSION = 1


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
        os.pwrite(self._fd, json.dumps(record).encode().ljust(_SIZE), 0)

    def close(self) -> None:
        os.close(self._fd)


def read(path: Path) -> dict[str, Any] | None:
    """The last record; None where there is none, or not one that this version understands."""
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return record if record.get("version") == VERSION else None


def _identity(instance: Instance) -> dict[str, int]:
    return {"pid": instance.pid, "start_time": instance.start_time}
