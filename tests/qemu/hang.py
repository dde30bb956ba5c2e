"""Holding one thread of a process, as a debugger does: the others run on (ptrace(2))."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator

_SEIZE, _INTERRUPT, _DETACH = 0x4206, 0x4207, 17
_WALL = 0x40000000  # __WALL

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


@contextlib.contextmanager
def main_thread_hangs(pid: int) -> Iterator[None]:
    """Within it, the main thread of `pid` does not move, but for being killed."""
    hangs, over = threading.Event(), threading.Event()

    def trace() -> None:
        # All of it from one thread: to the kernel it alone is the tracer.
        _ptrace(_SEIZE, pid)
        _ptrace(_INTERRUPT, pid)
        os.waitpid(pid, _WALL)
        hangs.set()
        # A traced process that was killed is its tracer's to reap first.
        while not over.is_set():
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, _WALL | os.WNOHANG)[0]:
                    return
            over.wait(0.01)
        _ptrace(_DETACH, pid)

    thread = threading.Thread(target=trace, daemon=True)
    thread.start()
    assert hangs.wait(10), f"process {pid} cannot be traced"
    try:
        yield
    finally:
        over.set()
        thread.join()


def _ptrace(request: int, pid: int) -> None:
    if _libc.ptrace(request, pid, None, None) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
