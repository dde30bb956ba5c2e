"""Clients of a character device as non-blocking channels, and what is waited for on them.

Everything here works on plain descriptors and returns at once. asyncio's streams and transports
were rejected: they keep bytes in buffers of their own, where neither a handover nor a supervisor
that executes itself again could find them.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import socket
import stat
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from segue.saved import Loader, Saver

_SO_COOKIE = 57  # asm-generic/socket.h; Python has no name for it
# UDP has no stream to cut at will: what fits an Ethernet frame.
_DATAGRAM = 1400


class Channel(ABC):
    """One client: `reads` and `writes` are the descriptors to watch.

    `recv` gives b"" at the end of input, and both raise BlockingIOError when it is not the time.
    `two_way` says that the end of input is the end of the client (a socket); otherwise output
    goes on (stdio). `opens` is whether QEMU tells the guest that someone is there, `hangs_up`
    whether the client's end is to be noticed while there is no room for its input. `returning`:
    a client that has been greeted before, and only wants to see a monitor's prompt.
    """

    reads: int
    writes: int
    two_way = True
    opens = True
    hangs_up = False
    returning = False

    @abstractmethod
    def recv(self, size: int) -> bytes: ...

    @abstractmethod
    def send(self, data: bytes | bytearray) -> int: ...

    @abstractmethod
    def close(self) -> None: ...

    def leave(self) -> None:
        """As `close`, where others still have the connection, and it is to go on."""
        self.close()

    def identity(self) -> dict[str, Any]:
        status = os.fstat(self.reads)
        return {"device": status.st_dev, "inode": status.st_ino}

    def save(self, saver: Saver) -> dict[str, Any]:
        """Data and descriptors for the endpoint that made it to make it again."""
        return {}


class SocketChannel(Channel):
    hangs_up = True

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.reads = self.writes = sock.fileno()

    def recv(self, size: int) -> bytes:
        return self.sock.recv(size, socket.MSG_DONTWAIT)

    def send(self, data: bytes | bytearray) -> int:
        return self.sock.send(data, socket.MSG_DONTWAIT)

    def close(self) -> None:
        # An instance may hold a duplicate, which would keep the connection open.
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def leave(self) -> None:
        self.sock.close()

    def identity(self) -> dict[str, Any]:
        return {"cookie": socket_cookie(self.sock)}

    def save(self, saver: Saver) -> dict[str, Any]:
        saver.fd("socket", self.sock.fileno(), outlives=True)
        return {"returning": self.returning}


class DatagramChannel(SocketChannel):
    """UDP: nobody is ever seen to come or go, and errors of the network lose a datagram."""

    opens = False
    hangs_up = False

    def recv(self, size: int) -> bytes:
        try:
            data = self.sock.recv(65536, socket.MSG_DONTWAIT)
        except ConnectionError:
            data = b""
        if not data:
            raise BlockingIOError
        return data

    def send(self, data: bytes | bytearray) -> int:
        piece = data[:_DATAGRAM]
        with contextlib.suppress(ConnectionError):
            self.sock.send(piece, socket.MSG_DONTWAIT)
        return len(piece)


class DescriptorChannel(Channel):
    """Two descriptors, or one twice, that are not sockets made by us (stdio, pipe)."""

    two_way = False

    def __init__(self, reads: Descriptor, writes: Descriptor) -> None:
        self._input, self._output = reads, writes
        self.reads, self.writes = reads.fd, writes.fd

    def recv(self, size: int) -> bytes:
        return self._input.read(size)

    def send(self, data: bytes | bytearray) -> int:
        return self._output.write(data)

    def close(self) -> None:
        self._input.close()
        self._output.close()

    def save(self, saver: Saver) -> dict[str, Any]:
        if not saver.exact:
            return {}  # opened anew, or lost with the terminal
        return {
            "reads": self._input.save(saver.within("reads")),
            "writes": self._output.save(saver.within("writes")),
        }

    @classmethod
    def load(cls, data: dict[str, Any], loader: Loader) -> DescriptorChannel | None:
        """None unless both are there."""
        if not data:
            return None
        reads = Descriptor.load(data["reads"], loader.within("reads"))
        writes = Descriptor.load(data["writes"], loader.within("writes"))
        if reads is None or writes is None:
            return None
        return cls(reads, writes)


class Descriptor:
    """A descriptor of ours that never blocks, over a file that other processes share.

    O_NONBLOCK belongs to the open file description, which the user's shell has too, and would
    stay there if we were killed. So a terminal or a pipe is opened anew, a socket is asked call
    by call, and a regular file never blocks. Only where opening is refused (another user's
    terminal, a FIFO without a reader) the flag is set, and taken away by `close`.
    """

    def __init__(self, fd: int, access: int) -> None:
        self._was: int | None = None
        self._socket: socket.socket | None = None
        mode = os.fstat(fd).st_mode
        if stat.S_ISSOCK(mode):
            self._socket = socket.socket(fileno=os.dup(fd))
            self.fd = self._socket.fileno()
        elif stat.S_ISREG(mode):
            self.fd = os.dup(fd)
        else:
            try:
                flags = access | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                self.fd = os.open(f"/proc/self/fd/{fd}", flags)
            except OSError:
                self.fd = os.dup(fd)
                self._was = fcntl.fcntl(fd, fcntl.F_GETFL)
                fcntl.fcntl(fd, fcntl.F_SETFL, self._was | os.O_NONBLOCK)

    def save(self, saver: Saver) -> dict[str, Any]:
        saver.fd("fd", self.fd)
        return {"was": self._was}

    @classmethod
    def load(cls, data: dict[str, Any], loader: Loader) -> Descriptor | None:
        fd = loader.fd("fd")
        if fd is None:
            return None
        descriptor = cls.__new__(cls)
        descriptor.fd, descriptor._was, descriptor._socket = fd, data["was"], None
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            descriptor._socket = socket.socket(fileno=fd)
        return descriptor

    def read(self, size: int) -> bytes:
        if self._socket is not None:
            return self._socket.recv(size, socket.MSG_DONTWAIT)
        return os.read(self.fd, size)

    def write(self, data: bytes | bytearray) -> int:
        if self._socket is not None:
            return self._socket.send(data, socket.MSG_DONTWAIT)
        return os.write(self.fd, data)

    def close(self) -> None:
        if self._was is not None:
            fcntl.fcntl(self.fd, fcntl.F_SETFL, self._was)
            self._was = None
        if self._socket is not None:
            self._socket.close()
        elif self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


def socket_cookie(sock: socket.socket) -> int:
    """The kernel's number for this socket, unique while the host runs."""
    return int(struct.unpack("Q", sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8))[0])


class Watches:
    """What is waited for on some descriptors. Asking again for the same costs nothing.

    Regular files cannot be polled and are always ready: their callback runs at each turn of the
    loop for as long as it is wanted.
    """

    def __init__(self) -> None:
        self._reading: dict[int, Callable[[], None]] = {}
        self._writing: dict[int, Callable[[], None]] = {}
        self._always: dict[int, asyncio.Handle] = {}
        self._hangups: dict[int, select.epoll] = {}

    def read(self, fd: int, ready: Callable[[], None] | None) -> None:
        if self._reading.get(fd) == ready:
            return
        loop = asyncio.get_running_loop()
        if ready is None:
            del self._reading[fd]
            if (turn := self._always.pop(fd, None)) is not None:
                turn.cancel()
            else:
                loop.remove_reader(fd)
            return
        self._reading[fd] = ready
        try:
            loop.add_reader(fd, ready)
        except PermissionError:
            self._always[fd] = loop.call_soon(self._turn, fd)

    def write(self, fd: int, ready: Callable[[], None] | None) -> None:
        if self._writing.get(fd) == ready:
            return
        loop = asyncio.get_running_loop()
        if ready is None:
            del self._writing[fd]
            loop.remove_writer(fd)
        else:
            self._writing[fd] = ready
            loop.add_writer(fd, ready)

    def hangup(self, fd: int, gone: Callable[[], None] | None) -> None:
        """Watch for the other side's end alone, while its bytes are left unread.

        asyncio cannot wait for EPOLLHUP without EPOLLIN; an epoll within its epoll can.
        """
        epoll = self._hangups.get(fd)
        if gone is None:
            if epoll is not None:
                del self._hangups[fd]
                asyncio.get_running_loop().remove_reader(epoll.fileno())
                epoll.close()
        elif epoll is None:
            epoll = self._hangups[fd] = select.epoll()
            epoll.register(fd, 0)
            asyncio.get_running_loop().add_reader(epoll.fileno(), gone)

    def forget(self, *fds: int) -> None:
        """Before a descriptor is closed."""
        for fd in fds:
            self.read(fd, None)
            self.write(fd, None)
            self.hangup(fd, None)

    def close(self) -> None:
        self.forget(*{*self._reading, *self._writing, *self._hangups})

    def _turn(self, fd: int) -> None:
        self._reading[fd]()
        if fd in self._reading:
            self._always[fd] = asyncio.get_running_loop().call_soon(self._turn, fd)
