"""Seccomp user notification: a system call of another process waits until we answer it.

    struct seccomp_notif          80 bytes  id, pid, flags, nr, arch, instruction pointer, 6 args
    struct seccomp_notif_resp     24 bytes  id, value, error, flags
    struct seccomp_notif_addfd    24 bytes  id, flags, our descriptor, its descriptor, its flags

seccomp_unotify(2), linux/seccomp.h; a descriptor can be put into the caller since Linux 5.9.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

_SET_MODE_FILTER = 1
_NEW_LISTENER = 1 << 3
_WAIT_KILLABLE = 1 << 5  # Linux 5.19: a signal does not call the waiting system call off
_PR_SET_NO_NEW_PRIVS = 38

_RET_ALLOW = 0x7FFF0000
_RET_USER_NOTIF = 0x7FC00000
_LD_WORD, _JEQ, _RET = 0x20, 0x15, 0x06

_RECV, _SEND, _ID_VALID, _ADDFD = 0xC0502100, 0xC0182101, 0x40082102, 0x40182103
_NOTIF = struct.Struct("=QIIiIQ6Q")
_RESPONSE = struct.Struct("=QqiI")
_ADDITION = struct.Struct("=QIIII")
_CONTINUE = 1
_SETFD = 1

_AVAILABLE = Path("/proc/sys/kernel/seccomp/actions_avail")


@dataclass(frozen=True)
class Numbers:
    """What one architecture calls things: AUDIT_ARCH_*, and numbers of system calls."""

    arch: int
    seccomp: int
    ioctl: int
    recvmsg: int


_NUMBERS = {
    "x86_64": Numbers(0xC000003E, 317, 16, 47),
    "aarch64": Numbers(0xC00000B7, 277, 29, 212),
}


def numbers() -> Numbers:
    """This machine's. Raises KeyError where `available` says no."""
    return _NUMBERS[platform.machine()]


def available() -> bool:
    """Whether the kernel has user notification, and we know its numbers on this machine."""
    try:
        actions = _AVAILABLE.read_text().split()
    except OSError:
        return False
    return "user_notif" in actions and platform.machine() in _NUMBERS


@dataclass(frozen=True)
class Rule:
    """The system call `number` waits for us where its argument `argument` is one of `values`."""

    number: int
    argument: int
    values: Collection[int]


def program(arch: int, rules: Sequence[Rule]) -> bytes:
    """Classic BPF over struct seccomp_data; the low half of an argument is what is compared.

    A value costs two instructions, so that no jump is ever long.
    """
    code = [_load(4), _instruction(_JEQ, arch, 1, 0), _return(_RET_ALLOW)]
    for rule in rules:
        body = [_load(16 + 8 * rule.argument)]
        for value in rule.values:
            body += [_instruction(_JEQ, value, 0, 1), _return(_RET_USER_NOTIF)]
        body.append(_return(_RET_ALLOW))
        code += [_load(0), _instruction(_JEQ, rule.number, 0, len(body)), *body]
    return b"".join([*code, _return(_RET_ALLOW)])


def _instruction(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, k)


def _load(offset: int) -> bytes:
    return _instruction(_LD_WORD, offset)


def _return(action: int) -> bytes:
    return _instruction(_RET, action)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


_libc = ctypes.CDLL(None, use_errno=True)


def install(number: int, code: bytes) -> int:
    """Put the filter on this process for good; the listener. Raises OSError.

    `number` is that of seccomp(2). For use between fork and exec. Rights that are given at exec
    are renounced only where the system demands it: that is, for others than root.
    """
    filter_program = _Program(len(code) // 8, code)

    def seccomp(flags: int) -> int:
        return int(
            _libc.syscall(
                number, _SET_MODE_FILTER, _NEW_LISTENER | flags, ctypes.byref(filter_program)
            )
        )

    flags = _WAIT_KILLABLE
    listener = seccomp(flags)
    if listener < 0 and ctypes.get_errno() == errno.EINVAL:
        flags = 0
        listener = seccomp(flags)
    if listener < 0 and ctypes.get_errno() == errno.EACCES:
        _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        listener = seccomp(flags)
    if listener < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return listener


@dataclass(frozen=True)
class Notification:
    """A system call that waits; `pid` is the calling thread's id."""

    listener: int
    id: int
    pid: int
    number: int
    arguments: tuple[int, ...]

    @classmethod
    def receive(cls, listener: int) -> Notification | None:
        """The next one; None if it was called off meanwhile, or the process is dead."""
        buffer = bytearray(_NOTIF.size)
        try:
            fcntl.ioctl(listener, _RECV, buffer)
        except (FileNotFoundError, InterruptedError):
            return None
        identifier, pid, _flags, number, _arch, _ip, *arguments = _NOTIF.unpack(buffer)
        return cls(listener, identifier, pid, number, tuple(arguments))

    def read(self, address: int, size: int) -> bytes:
        """Bytes of the caller's memory. Raises OSError."""
        fd = os.open(f"/proc/{self.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(fd, size, address)
        finally:
            os.close(fd)
        self._must_wait()
        return data

    def write(self, address: int, data: bytes) -> None:
        """Write into the caller's memory. Raises OSError."""
        fd = os.open(f"/proc/{self.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        try:
            self._must_wait()
            os.pwrite(fd, data, address)
        finally:
            os.close(fd)

    def put(self, source: int, number: int) -> None:
        """Have the caller's descriptor `number` be our `source`, whatever it was before."""
        addition = _ADDITION.pack(self.id, _SETFD, source, number, os.O_CLOEXEC)
        fcntl.ioctl(self.listener, _ADDFD, addition)

    def go_on(self) -> None:
        """Let the kernel do what was asked."""
        self._answer(0, 0, _CONTINUE)

    def done(self, value: int = 0) -> None:
        """Say that it is done."""
        self._answer(value, 0, 0)

    def fail(self, number: int) -> None:
        """Say that it failed with errno `number`."""
        self._answer(0, -number, 0)

    def _answer(self, value: int, error: int, flags: int) -> None:
        try:
            fcntl.ioctl(self.listener, _SEND, _RESPONSE.pack(self.id, value, error, flags))
        except (FileNotFoundError, InterruptedError):
            return  # the caller is dead, or was called off

    def _must_wait(self) -> None:
        """Raise OSError unless the caller still waits: its pid could be another's by now."""
        fcntl.ioctl(self.listener, _ID_VALID, struct.pack("=Q", self.id))
