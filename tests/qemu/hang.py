"""Holding one thread of a process, as a debugger does: the others run on (ptrace(2))."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import struct
import threading
from collections.abc import Iterator

_SEIZE, _INTERRUPT, _DETACH = 0x4206, 0x4207, 17
_SYSCALL, _GET_SYSCALL_INFO = 24, 0x420E
_TRACESYSGOOD, _SYSCALL_STOP = 1, signal.SIGTRAP | 0x80
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


@contextlib.contextmanager
def hangs_when_it_reads(pid: int, name: str) -> Iterator[threading.Event]:
    """Within it, the main thread of `pid` hangs as soon as it opens a file `name` for reading.

    Whatever the process executes meanwhile. The event says that it does; only a kill ends it.
    """
    openat = {"x86_64": 257, "aarch64": 56}[os.uname().machine]
    attached, hangs, over = threading.Event(), threading.Event(), threading.Event()

    def trace() -> None:
        _ptrace(_SEIZE, pid, data=_TRACESYSGOOD)
        _ptrace(_INTERRUPT, pid)
        while not over.is_set():
            found, status = os.waitpid(pid, _WALL | os.WNOHANG)
            if not found:
                over.wait(0.0001)
                continue
            if not os.WIFSTOPPED(status):
                return
            attached.set()
            stop = os.WSTOPSIG(status)
            if stop == _SYSCALL_STOP and _opens(pid, openat, name):
                hangs.set()
                continue
            passed_on = 0 if stop in (_SYSCALL_STOP, signal.SIGTRAP) or status >> 16 else stop
            with contextlib.suppress(ProcessLookupError):  # killed meanwhile: waitpid tells
                _ptrace(_SYSCALL, pid, data=passed_on)

    thread = threading.Thread(target=trace, daemon=True)
    thread.start()
    assert attached.wait(10), f"process {pid} cannot be traced"
    try:
        yield hangs
    finally:
        over.set()
        thread.join()


def _opens(pid: int, openat: int, name: str) -> bool:
    """Whether a process at a system call is about to open that file for reading."""
    info = ctypes.create_string_buffer(96)  # struct ptrace_syscall_info
    _ptrace(_GET_SYSCALL_INFO, pid, len(info), ctypes.addressof(info))
    entering, number, path, flags = struct.unpack_from("B23xQ8xQQ", info)
    if entering != 1 or number != openat or flags & os.O_ACCMODE != os.O_RDONLY:
        return False
    with open(f"/proc/{pid}/mem", "rb", 0) as memory:
        memory.seek(path)
        return memory.read(os.pathconf("/", "PC_PATH_MAX")).split(b"\0")[0].endswith(name.encode())


def _ptrace(request: int, pid: int, address: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, pid, address, data) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
