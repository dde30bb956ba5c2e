"""What processes hold, from /proc; and the most that a machine held while it was watched."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

_PERIOD = 0.05


def resident(pid: int) -> int:
    """VmRSS in bytes, as `ps` shows it."""
    return _kib(f"/proc/{pid}/status", "VmRSS")


def proportional(pid: int) -> int:
    """PSS in bytes: pages that several processes share count for each by its part."""
    return _kib(f"/proc/{pid}/smaps_rollup", "Pss")


def held(pids: Iterable[int]) -> int:
    """Bytes that these processes have for themselves, and in memfds, each counted once.

    Guest RAM lies in memfds, so that a copy of it shows. Read from /proc/PID/status and by stat(),
    which costs the processes nothing; /proc/PID/smaps* would walk their page tables, guest RAM
    among them, under a lock that the guest needs.
    """
    total = 0
    memfds: dict[int, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            total += _kib(f"/proc/{pid}/status", "RssAnon")
            memfds |= _memfds(pid)
    return total + sum(memfds.values())


def _memfds(pid: int) -> dict[int, int]:
    """Inode → allocated bytes of the memfds that a process has open."""
    found = {}
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(entry.path).startswith("/memfd:"):
                status = os.stat(entry.path)
                found[status.st_ino] = status.st_blocks * 512
    return found


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def _kib(path: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path(path).read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


class Peak:
    """The most memory of a process's family above what it held when this was made."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._rest = self._most = held(family(pid))
        self._task = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        while True:
            self._most = max(self._most, held(family(self._pid)))
            await asyncio.sleep(_PERIOD)

    def stop(self) -> int:
        """End watching; the bytes."""
        self._task.cancel()
        return self._most - self._rest
