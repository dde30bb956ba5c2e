"""A child process that stays a child: known by its pidfd, which no other process can ever have."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from segue.cpr.descriptor import Descriptor


@dataclass(frozen=True)
class ChildState:
    """For a field of a section."""

    pid: int
    pidfd: Descriptor | None
    returncode: int | None


class Child:
    """`returncode` is None while it runs, negative for a signal; as in subprocess."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._pidfd = pidfd
        self._popen: subprocess.Popen[Any] | None = None

    @classmethod
    def spawn(cls, argv: Sequence[str], **options: Any) -> Child:
        """Start one; `options` are those of subprocess.Popen. A pipe to it is yours to keep."""
        popen = subprocess.Popen(argv, **options)
        child = cls(popen.pid, os.pidfd_open(popen.pid))
        child._popen = popen
        return child

    async def wait(self) -> int | None:
        """Its exit status, as soon as it ends; None where it ended as somebody else's child."""
        if self.returncode is None and self._pidfd >= 0:
            ended = asyncio.Event()
            loop = asyncio.get_running_loop()
            # asyncio allows one reader for a descriptor, and others may be waiting too.
            watched = os.dup(self._pidfd)
            loop.add_reader(watched, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(watched)
                os.close(watched)
            self._reap()
        return self.returncode

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; to nobody where it has ended, whoever has its pid now."""
        if self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                pass

    def suspend(self, name: str) -> ChildState:
        """What it is; `name` is that of its descriptor. It need not be told to go on."""
        pidfd = Descriptor(name, self._pidfd) if self._pidfd >= 0 else None
        return ChildState(self.pid, pidfd, self.returncode)

    @classmethod
    def restore(cls, state: ChildState) -> Child:
        """What `suspend` gave. If it ended meanwhile, `wait` tells its status all the same."""
        child = cls(state.pid, -1 if state.pidfd is None else state.pidfd.fd)
        child.returncode = state.returncode
        return child

    def _reap(self) -> None:
        if self._pidfd < 0:
            return
        try:
            result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        except ChildProcessError:
            result = None
        if result is not None:
            killed = result.si_code != os.CLD_EXITED
            self.returncode = -result.si_status if killed else result.si_status
        if self._popen is not None:
            # Or it would try to reap whoever has that pid next.
            self._popen.returncode = self.returncode or 0
        os.close(self._pidfd)
        self._pidfd = -1
