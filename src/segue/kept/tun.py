"""Taps and macvtaps as the kernel shows them: one descriptor is one queue of an interface.

    struct ifreq    40 bytes    name[16], then here a 16-bit field of flags

linux/if_tun.h, drivers/net/tun.c. What `SETTERS` set belongs to the interface, but for
TUNSETQUEUE, which is the queue's own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from pathlib import Path

DEVICE = Path("/dev/net/tun")

IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
IFF_MULTI_QUEUE, IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE = 0x0100, 0x0200, 0x0400

TUNSETIFF = 0x400454CA
TUNGETFEATURES = 0x800454CF
TUNSETOFFLOAD = 0x400454D0
TUNGETIFF = 0x800454D2
TUNGETSNDBUF, TUNSETSNDBUF = 0x800454D3, 0x400454D4
TUNGETVNETHDRSZ, TUNSETVNETHDRSZ = 0x800454D7, 0x400454D8
TUNSETQUEUE = 0x400454D9
TUNSETVNETLE, TUNGETVNETLE = 0x400454DC, 0x800454DD
TUNSETVNETBE, TUNGETVNETBE = 0x400454DE, 0x800454DF
TUNSETSTEERINGEBPF = 0x800454E0
TUNSETCARRIER = 0x400454E2

IFREQ = struct.Struct("=16sH22x")
INT = struct.Struct("=i")

# Those with an int behind the pointer, and how to ask for it.
INT_SETTERS = {
    TUNSETSNDBUF: TUNGETSNDBUF,
    TUNSETVNETHDRSZ: TUNGETVNETHDRSZ,
    TUNSETVNETLE: TUNGETVNETLE,
    TUNSETVNETBE: TUNGETVNETBE,
}
SETTERS = frozenset({TUNSETOFFLOAD, TUNSETQUEUE, TUNSETSTEERINGEBPF, TUNSETCARRIER, *INT_SETTERS})
GETTERS = {TUNGETFEATURES: INT.size, TUNGETIFF: IFREQ.size} | {
    getter: INT.size for getter in INT_SETTERS.values()
}

# TUN_F_CSUM, TSO4, TSO6, TSO_ECN, UFO, USO4 with USO6, UDP_TUNNEL_GSO, UDP_TUNNEL_GSO_CSUM: each
# is taken only together with those before it that it needs.
_OFFLOADS = (0x01, 0x02, 0x04, 0x08, 0x10, 0x60, 0x80, 0x100)


def features() -> int:
    """The flags that TUNSETIFF can take. Raises OSError."""
    fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        return get_int(fd, TUNGETFEATURES)
    finally:
        os.close(fd)


def open_queue(name: str, flags: int) -> tuple[int, str]:
    """A new queue of interface `name` (which may hold a %d), and the interface's name.

    It does not block. Raises OSError.
    """
    fd = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        request = bytearray(IFREQ.pack(name.encode()[:15], flags))
        fcntl.ioctl(fd, TUNSETIFF, request)
    except BaseException:
        os.close(fd)
        raise
    return fd, _name(request)


def interface(fd: int) -> tuple[str, int]:
    """Name and flags of the interface that the queue belongs to. Raises OSError for no tap."""
    request = bytearray(IFREQ.size)
    fcntl.ioctl(fd, TUNGETIFF, request)
    return _name(request), IFREQ.unpack(request)[1]


def _name(request: bytes | bytearray) -> str:
    name: bytes = IFREQ.unpack(request)[0]
    return name.rstrip(b"\0").decode()


def get(fd: int, getter: int) -> bytes:
    """What a getter of `GETTERS` writes. Raises OSError."""
    buffer = bytearray(GETTERS[getter])
    fcntl.ioctl(fd, getter, buffer)
    return bytes(buffer)


def get_int(fd: int, getter: int) -> int:
    value: int = INT.unpack(get(fd, getter))[0]
    return value


def set_value(fd: int, setter: int, value: int) -> None:
    """Set by number; for TUNSETQUEUE the number is a flag. Raises OSError."""
    if setter == TUNSETOFFLOAD:
        fcntl.ioctl(fd, setter, value)
    elif setter == TUNSETQUEUE:
        fcntl.ioctl(fd, setter, IFREQ.pack(b"", value))
    else:
        fcntl.ioctl(fd, setter, INT.pack(value))


def known_offloads(fd: int) -> int:
    """The offloads that this kernel knows; they are off afterwards. Raises OSError."""
    known = 0
    for offload in _OFFLOADS:
        with contextlib.suppress(OSError):
            set_value(fd, TUNSETOFFLOAD, known | offload)
            known |= offload
    set_value(fd, TUNSETOFFLOAD, 0)
    return known


def same_interface(pid: int, number: int, fd: int) -> bool:
    """Whether a process's descriptor is a queue of the same interface as ours.

    A tap's interface is in its fdinfo (`iff:`); a macvtap has a device number of its own.
    """
    try:
        theirs, ours = os.stat(f"/proc/{pid}/fd/{number}"), os.fstat(fd)
        if theirs.st_rdev != ours.st_rdev:
            return False
        return _iff(f"{pid}/fdinfo/{number}") == _iff(f"self/fdinfo/{fd}")
    except FileNotFoundError:
        return False


def _iff(path: str) -> str | None:
    for line in Path("/proc", path).read_text().splitlines():
        if line.startswith("iff:"):
            return line
    return None
