"""What processes hold, from /proc; and the most that a machine held while it was watched."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterable
from pathlib import Path

_PERIOD = 0.02


def resident(pid: int) -> int:
    """VmRSS in bytes, as `ps` shows it."""
    return _kib(f"/proc/{pid}/status", "VmRSS")


def proportional(pid: int) -> int:
    """PSS in bytes: pages that several processes share count for each by its part."""
    return _kib(f"/proc/{pid}/smaps_rollup", "Pss")


def private(pids: Iterable[int]) -> int:
    """Bytes that belong to these processes alone (RssAnon): no program text, no guest RAM.

    Read from /proc/PID/status, which costs the process nothing; /proc/PID/smaps* would walk its
    page tables, guest RAM among them, under a lock that the guest needs.
    """
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += _kib(f"/proc/{pid}/status", "RssAnon")
    return total


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
    """The most private memory of a process's family above what it held when this was made."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._rest = self._most = private(family(pid))
        self._task = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        while True:
            self._most = max(self._most, private(family(self._pid)))
            await asyncio.sleep(_PERIOD)

    def stop(self) -> int:
        """End watching; the bytes."""
        self._task.cancel()
        return self._most - self._rest
