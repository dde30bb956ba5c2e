"""Ethernet frames on their way from one socket to another.

On a stream socket, as `-netdev stream` and passt speak it (net/stream.c, passt's tap.c):

    length   4 bytes, big-endian, of the frame alone
    frame    as on the wire, without a checksum

Only whole frames are taken out of a socket, and what has come of another stays in it. So no
frame is torn when a supervisor is killed, or the sender replaced: what one process took, it had
whole, and what the next one finds begins with a length.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterable
from itertools import islice
from typing import Any

from segue.saved import Saver, raw

HEADER = 4
# NET_BUFSIZE, the longest that QEMU takes; passt sends less. More is no length.
LONGEST = 69632
# What one look at a socket shows, and more than the longest frame.
BUFFER = 1 << 17


class Garbled(Exception):
    """What came is no stream of frames."""


class Frames:
    """Whole frames that wait to be passed on, each with its length before it.

    Onto a stream they go by `next`, which may be taken in part; singly by `first`.
    """

    def __init__(self) -> None:
        self._frames: deque[bytes] = deque()
        # Bytes of the first frame that were passed on.
        self._part = 0
        self._size = 0

    @property
    def waiting(self) -> int:
        """Bytes that have not been passed on."""
        return self._size - self._part

    def add(self, data: bytes | memoryview) -> int:
        """Whole frames at the beginning of `data`; how many bytes they are. Raises Garbled."""
        have, at = len(data), 0
        while have - at >= HEADER:
            length = int.from_bytes(data[at : at + HEADER], "big")
            if not 0 < length <= LONGEST:
                raise Garbled(f"a frame of {length} bytes")
            end = at + HEADER + length
            if have < end:
                break
            self._frames.append(bytes(data[at:end]))
            at = end
        self._size += at
        return at

    def add_frame(self, frame: bytes | memoryview) -> int:
        """One that came as a message; how many bytes it is with its length."""
        whole = len(frame).to_bytes(HEADER, "big") + frame
        self._frames.append(whole)
        self._size += len(whole)
        return len(whole)

    def put_back(self, frames: Iterable[bytes]) -> None:
        """Frames that were passed on singly, and come before those that wait."""
        again = [len(frame).to_bytes(HEADER, "big") + frame for frame in frames]
        self._frames.extendleft(reversed(again))
        self._size += sum(map(len, again))

    def read(self, sock: socket.socket, buffer: bytearray) -> int:
        """Take whole frames out of a stream socket; how many bytes. `buffer` is for scratch.

        Raises Garbled, BlockingIOError where there is nothing, another OSError at the end.
        """
        count = sock.recv_into(buffer, 0, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        if not count:
            raise ConnectionResetError
        whole = self.add(memoryview(buffer)[:count])
        if whole:
            sock.recv_into(buffer, whole, socket.MSG_DONTWAIT)
        return whole

    def first(self) -> bytes:
        """The frame alone; then tell `passed_first`."""
        return self._frames[0][HEADER:]

    def passed_first(self) -> None:
        self._size -= len(self._frames.popleft())

    def next(self, size: int) -> bytes:
        """What a stream is to have next; then tell `passed`.

        The rest of a frame that was passed on in part, or else whole frames of `size` bytes
        together, or one that is longer.
        """
        if not self._frames:
            return b""
        if self._part:
            return self._frames[0][self._part :]
        count, take = 1, len(self._frames[0])
        for frame in islice(self._frames, 1, None):
            take += len(frame)
            if take > size:
                break
            count += 1
        return b"".join(islice(self._frames, count))

    def passed(self, count: int) -> None:
        self._part += count
        while self._frames and self._part >= len(self._frames[0]):
            self._part -= len(self._frames[0])
            self.passed_first()

    def begin_again(self) -> None:
        """There is another taker: of what the former had in part, it is given all."""
        self._part = 0

    def save(self, saver: Saver) -> dict[str, Any]:
        """What was passed on in part is known to nobody but this process."""
        data = b"".join(self._frames)
        return {"data": saver.bytes(data), "part": self._part if saver.exact else 0}

    def load(self, data: dict[str, Any]) -> None:
        self.add(raw(data["data"]))
        self._part = data["part"]

    def clear(self) -> None:
        self._frames.clear()
        self._size = self._part = 0
