"""Other processes: a helper that is run to its end, a descriptor of somebody else's."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from segue.errors import TimedOut

# pidfd_getfd(2), the same number on every architecture; Python has no wrapper.
_PIDFD_GETFD = 438

_libc = ctypes.CDLL(None, use_errno=True)


def run(command: Sequence[str], pass_fds: Sequence[int] = ()) -> int:
    """Run a helper to its end; its exit status as a shell shows it, 127 if it cannot be run."""
    try:
        status = subprocess.run(command, pass_fds=pass_fds, stdin=subprocess.DEVNULL).returncode
    except OSError:
        return 127
    return status if status >= 0 else 128 - status


def duplicate_of(pid: int, fd: int) -> int:
    """A duplicate, close-on-exec, of what descriptor `fd` of process or thread `pid` means.

    Raises OSError.
    """
    status = Path(f"/proc/{pid}/status").read_text()
    leader = int(re.findall(r"^Tgid:\s+(\d+)", status, re.MULTILINE)[0])
    pidfd = os.pidfd_open(leader)
    try:
        duplicate = int(_libc.syscall(_PIDFD_GETFD, pidfd, fd, 0))
    finally:
        os.close(pidfd)
    if duplicate < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return duplicate


def kill(pid: int) -> None:
    """Return when it is dead: it is no child of ours. Raises TimedOut."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(30000):
            raise TimedOut(f"QEMU (pid {pid}) does not die", hint="it waits in the kernel")
    finally:
        os.close(pidfd)
