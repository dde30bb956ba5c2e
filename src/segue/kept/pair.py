"""The socketpair that joins one instance's character device to the supervisor.

The supervisor keeps `ours` and a duplicate of the instance's end, `theirs`: what the instance
left unread can be read back from it. The instance inherits both in turn, so that neither end
dies with a supervisor that is killed. The end of an instance therefore never shows as an end of
file here; `Broker.drop` tells it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from dataclasses import dataclass
from typing import Any

from segue.saved import Loader, Saver

# Towards the guest: small, since what waits there at an upgrade is taken back in the blackout.
# The kernel doubles it, and counts about 0.8 KiB for each single byte that was sent alone.
_TO_INSTANCE = 16384
# From the guest: a virtio console drops what has no room, and the kernel counts each small write
# as 0.8 KiB. What it allows everybody (wmem_max) is room for half a second of a line of 25 bytes
# each millisecond; a supervisor that a busy host lets wait was seen to be away for longer.
_FROM_INSTANCE = 212992
# So root, who alone may have it, takes more, for streams: frames that wait are only late.
_FROM_INSTANCE_OF_ROOT = 1 << 19
# While a supervisor becomes another, and reads nothing.
_WHILE_NOBODY_READS = 4 << 20
_UNTIL_READ = 5.0  # seconds
_SO_SNDBUFFORCE = 32  # asm-generic/socket.h; Python has no name for it
# More than can wait in either direction. One recv() of this size takes all of it, or an
# instance that reads at the same moment does: they cannot interleave, as the kernel holds the
# socket's lock for the whole call.
_ALL = 1 << 19


@dataclass
class Pair:
    """`ours` is None for a pair whose far side is closed: QEMU sees that nobody is there.

    `inherited`: the instance has a duplicate of `ours` from its start. `broken`: QEMU has shut the
    connection down, as a client told it to (`yank`); nothing goes through it any more.
    """

    ours: socket.socket | None
    theirs: socket.socket
    inherited: bool = True
    broken: bool = False

    @classmethod
    def make(cls, to_instance: int | None = _TO_INSTANCE, *, messages: bool = False) -> Pair:
        """With room for so many bytes towards the instance; None is the system's default.

        `messages`: what is sent at once is also read at once, and by itself.
        """
        kind = socket.SOCK_SEQPACKET if messages else socket.SOCK_STREAM
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        ours.setblocking(False)
        _give_room(theirs)
        if to_instance is not None:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, to_instance)
        return cls(ours, theirs)

    @classmethod
    def dead(cls) -> Pair:
        pair = cls.make()
        pair.hang_up()
        return pair

    def save(self, saver: Saver) -> dict[str, Any]:
        saver.fd("theirs", self.theirs.fileno(), lent=True)
        if saver.exact:
            with contextlib.suppress(PermissionError):
                room = _WHILE_NOBODY_READS
                self.theirs.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, room)
        if self.ours is not None:
            saver.fd("ours", self.ours.fileno(), lent=self.inherited)
        return {"inherited": self.inherited}

    @classmethod
    def load(cls, data: dict[str, Any], loader: Loader) -> Pair:
        ours, theirs = loader.socket("ours"), loader.socket("theirs")
        if theirs is None:
            if ours is not None:
                ours.close()
            return cls.dead()
        if ours is not None:
            ours.setblocking(False)
        pair = cls(ours, theirs, data["inherited"])
        # Not before what waits has been read: it would leave no room at all.
        asyncio.get_running_loop().call_later(_UNTIL_READ, pair._usual_room)
        return pair

    def _usual_room(self) -> None:
        with contextlib.suppress(OSError):  # closed meanwhile
            _give_room(self.theirs)

    @property
    def inode(self) -> int:
        return os.fstat(self.theirs.fileno()).st_ino

    def send(self, data: bytes | bytearray) -> int:
        """How many bytes it took: 0 if it is full."""
        if self.ours is None:
            return 0
        try:
            return self.ours.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except ConnectionError:
            self.broken = True
            return 0

    def receive(self, size: int = _ALL) -> bytes:
        """What the instance has written, b"" if nothing waits."""
        if self.ours is None:
            return b""
        try:
            data = self.ours.recv(size, socket.MSG_DONTWAIT)
        except (BlockingIOError, ConnectionError):
            return b""
        self.broken = self.broken or not data
        return data

    def unread(self) -> bytes:
        """Take out what the instance has not read: of messages, the first."""
        try:
            return self.theirs.recv(_ALL, socket.MSG_DONTWAIT)
        except (BlockingIOError, ConnectionError):
            return b""

    def hang_up(self) -> None:
        """The instance sees that its peer is gone, whoever else has a duplicate."""
        if self.ours is not None:
            with contextlib.suppress(OSError):
                self.ours.shutdown(socket.SHUT_RDWR)
            self.ours.close()
            self.ours = None

    def close(self) -> None:
        if self.ours is not None:
            self.ours.close()
            self.ours = None
        self.theirs.close()


def _give_room(theirs: socket.socket) -> None:
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _FROM_INSTANCE)
    if theirs.type == socket.SOCK_STREAM:
        with contextlib.suppress(PermissionError):
            theirs.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _FROM_INSTANCE_OF_ROOT)
