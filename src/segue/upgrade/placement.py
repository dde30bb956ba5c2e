"""Where a process runs: what somebody gave the incumbent, the successor is given too."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from pathlib import Path

from segue.qemu.monitor import Monitor

# ioprio_get(2), ioprio_set(2): the C library has no wrappers, so neither has Python.
_IOPRIO = {"x86_64": (252, 251), "aarch64": (31, 30)}
_IOPRIO_WHO_PROCESS = 1


def copy(source: int, target: int) -> None:
    """Affinity, scheduling, niceness, I/O priority, OOM score and cgroups of `source`, a pid.

    What the supervisor may not set, it leaves: it could not have been set by it before either.
    """
    with contextlib.suppress(OSError):
        _cgroups(source, target)
    copy_thread(source, target)
    with contextlib.suppress(OSError):
        score = Path(f"/proc/{source}/oom_score_adj").read_text()
        Path(f"/proc/{target}/oom_score_adj").write_text(score)


def copy_thread(source: int, target: int) -> None:
    """The same for one thread, without what belongs to the whole process."""
    with contextlib.suppress(OSError):
        affinity = os.sched_getaffinity(source)
        if affinity != os.sched_getaffinity(target):
            os.sched_setaffinity(target, affinity)
    with contextlib.suppress(OSError):
        policy = os.sched_getscheduler(source)
        if policy != os.sched_getscheduler(target):
            os.sched_setscheduler(target, policy, os.sched_getparam(source))
    with contextlib.suppress(OSError):
        nice = os.getpriority(os.PRIO_PROCESS, source)
        if nice != os.getpriority(os.PRIO_PROCESS, target):
            os.setpriority(os.PRIO_PROCESS, target, nice)
    _io_priority(source, target)


async def copy_vcpus(incumbent: Monitor, successor: Monitor) -> None:
    """Each vCPU's thread is placed as its counterpart is (libvirt pins them one by one)."""
    ours = await incumbent.execute("query-cpus-fast")
    theirs = await successor.execute("query-cpus-fast")
    threads = {cpu["cpu-index"]: cpu["thread-id"] for cpu in theirs}
    for cpu in ours:
        if cpu["cpu-index"] in threads:
            copy_thread(cpu["thread-id"], threads[cpu["cpu-index"]])


def _io_priority(source: int, target: int) -> None:
    numbers = _IOPRIO.get(platform.machine())
    if numbers is None:
        return
    get, put = numbers
    libc = ctypes.CDLL(None, use_errno=True)
    value = libc.syscall(get, _IOPRIO_WHO_PROCESS, source)
    if value > 0:
        libc.syscall(put, _IOPRIO_WHO_PROCESS, target, value)


def _cgroups(source: int, target: int) -> None:
    """Both hierarchies: v2 has one line `0::/path`, v1 one for each set of controllers."""
    theirs = Path(f"/proc/{target}/cgroup").read_text().splitlines()
    for line in Path(f"/proc/{source}/cgroup").read_text().splitlines():
        if line in theirs:
            continue
        _, controllers, path = line.split(":", 2)
        root = Path("/sys/fs/cgroup")
        if controllers:
            root /= controllers.removeprefix("name=")
        with contextlib.suppress(OSError):
            (root / path.lstrip("/") / "cgroup.procs").write_text(str(target))
