"""Letting whoever takes a machine up have the descriptors of its QEMU (`pidfd_getfd`).

Where kernel.yama.ptrace_scope is 1 (Ubuntu, Arch), that is only for a process's ancestors and for
root; and the ancestor is who was killed. A process may itself allow it to others of its own user,
as all processes do where the scope is 0. That outlives exec: Yama keeps it with the task.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)
_SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")

_libc = ctypes.CDLL(None)


def traceable(before_exec: Callable[[], None] | None) -> Callable[[], None] | None:
    """What is to be called before exec, with that permission where it takes one."""
    if os.geteuid() == 0 or not _restricted():
        return before_exec

    def allow() -> None:
        _libc.prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)
        if before_exec is not None:
            before_exec()

    return allow


def _restricted() -> bool:
    with contextlib.suppress(OSError):  # a kernel without Yama
        return _SCOPE.read_text().strip() == "1"
    return False
