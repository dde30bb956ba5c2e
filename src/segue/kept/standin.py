"""A queue's place in an instance, and what stands there while the queue is not lent (tap.py)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass

# The longest that a guest can send: 64 KiB of payload, and headers.
_FRAME = 1 << 17


@dataclass
class Place:
    """One queue as one instance has it: the number, and the stand-in if it has had one."""

    number: int
    ours: socket.socket | None = None
    theirs: socket.socket | None = None
    _spared: Callable[[bytes], bool] = lambda frame: False

    def stand_in(self) -> int:
        """A new descriptor for the instance, from which nothing can be read."""
        self.close()
        kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, kind)
        return self.theirs.fileno()

    def wake(self) -> None:
        """Have an instance that polls the stand-in look at what stands at its number now.

        The stand-in is not to be used again: an instance that read this byte from it would take
        it for a packet.
        """
        if self.ours is not None:
            with contextlib.suppress(BlockingIOError):
                self.ours.send(b"\0")

    def relay(self, queue: int, spared: Callable[[bytes], bool] = lambda frame: False) -> None:
        """Pass on what the instance sends to the stand-in, until `end_relay`."""
        assert self.ours is not None
        self._spared = spared
        loop = asyncio.get_running_loop()
        loop.add_reader(self.ours.fileno(), self._pass_on, queue)

    def end_relay(self, queue: int) -> None:
        """Pass on what is left."""
        if self.ours is not None:
            asyncio.get_running_loop().remove_reader(self.ours.fileno())
            self._pass_on(queue)

    def _pass_on(self, queue: int) -> None:
        """Whole frames, as QEMU wrote them: header and all. One that is refused is lost."""
        assert self.ours is not None
        with contextlib.suppress(OSError):
            while _is_writable(queue):
                frame = self.ours.recv(_FRAME)
                if self._spared(frame):
                    continue
                with contextlib.suppress(OSError):
                    os.write(queue, frame)

    def close(self) -> None:
        for sock in (self.ours, self.theirs):
            if sock is not None:
                sock.close()
        self.ours = self.theirs = None


def _is_writable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))
