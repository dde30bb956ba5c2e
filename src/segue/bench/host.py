"""The machine that everything ran on, so that a figure can be judged by a reader."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    """Processor, CPUs that may be used, memory in bytes, kernel, distribution, Python."""
    return {
        "processor": _found("/proc/cpuinfo", r"^model name\s*: (.*)$") or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "system": _found("/etc/os-release", r'^PRETTY_NAME="?([^"\n]*)"?$'),
        "virtual": bool(
            re.search(r"^flags\s*:.*\bhypervisor\b", _text("/proc/cpuinfo"), re.MULTILINE)
        ),
        "python": platform.python_version(),
    }


def load() -> list[float]:
    """The load averages of 1, 5 and 15 minutes; what is measured is in them too."""
    return [round(value, 2) for value in os.getloadavg()]


class Others:
    """How many CPUs other processes than some of ours kept busy, on average, since this was made.

    Clock ticks are what the kernel tells (proc_stat(5)), so a second shows 1/100 of a CPU.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = tuple(pids)
        self._begin = self._now()
        self._since = time.monotonic()

    def cpus(self) -> float:
        ticks = self._now() - self._begin
        seconds = time.monotonic() - self._since
        return round(max(0.0, ticks / os.sysconf("SC_CLK_TCK") / seconds), 2)

    def _now(self) -> int:
        words = _text("/proc/stat").splitlines()[0].split()[1:9]
        user, nice, system, _idle, _iowait, irq, softirq, _steal = map(int, words)
        return user + nice + system + irq + softirq - sum(_ticks(pid) for pid in self._pids)


def _ticks(pid: int) -> int:
    """User and system time of a process; 0 for one that has ended (proc_pid_stat(5))."""
    words = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(words[11]) + int(words[12]) if words else 0


def _found(path: str, pattern: str) -> str | None:
    found = re.search(pattern, _text(path), re.MULTILINE)
    return found[1] if found else None


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
