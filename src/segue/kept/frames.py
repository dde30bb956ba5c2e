"""A stream of Ethernet frames on its way from one socket to another.

    length   4 bytes, big-endian, of the frame alone
    frame    as on the wire, without a checksum

QEMU's `-netdev stream` and passt speak it over a stream socket (net/stream.c, passt's tap.c).

Only whole frames are taken out of a socket, and what has come of another stays in it. So no
frame is torn when a supervisor is killed, or the sender replaced: what one process took, it had
whole, and what the next one finds begins with a length.
"""

from __future__ import annotations

import socket
from collections import deque
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
    """Whole frames that wait to be passed on.

    A frame is kept until `forget` is told that its taker has all of it. Whoever takes over from
    that taker (`begin_again`) is given whole frames: of one that the former had in part, all.
    """

    def __init__(self) -> None:
        self._data = bytearray()
        # Lengths: of the frames that were passed on, and of the others; of the first of these
        # `_part` bytes were passed on.
        self._behind: deque[int] = deque()
        self._ahead: deque[int] = deque()
        self._part = 0
        self._sent = 0

    def __len__(self) -> int:
        return len(self._data)

    @property
    def waiting(self) -> int:
        """Bytes that have not been passed on."""
        return len(self._data) - self._sent

    def add(self, data: bytes | bytearray | memoryview) -> int:
        """Whole frames at the beginning of `data`; how many bytes they are. Raises Garbled."""
        have, end = len(data), 0
        while have - end >= HEADER:
            length = int.from_bytes(data[end : end + HEADER], "big")
            if not 0 < length <= LONGEST:
                raise Garbled(f"a frame of {length} bytes")
            if have - end < HEADER + length:
                break
            end += HEADER + length
            self._ahead.append(HEADER + length)
        self._data += data[:end]
        return end

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

    def next(self, size: int) -> bytes:
        """What is to be passed on next; then tell `passed`.

        The rest of a frame that was passed on in part, or else whole frames of `size` bytes
        together, or one that is longer.
        """
        if not self._ahead:
            return b""
        take = self._ahead[0] - self._part
        if not self._part:
            for length in islice(self._ahead, 1, None):
                if take + length > size:
                    break
                take += length
        return bytes(self._data[self._sent : self._sent + take])

    def passed(self, count: int) -> None:
        self._sent += count
        self._part += count
        while self._ahead and self._part >= self._ahead[0]:
            self._part -= self._ahead[0]
            self._behind.append(self._ahead.popleft())

    def taken_back(self, count: int) -> None:
        """Bytes that were passed on, and which the taker has not read."""
        self._sent -= count
        self._part -= count
        while self._part < 0:
            self._ahead.appendleft(self._behind.pop())
            self._part += self._ahead[0]

    def forget(self, unread: int = 0) -> None:
        """Drop what the taker has: all but the last `unread` bytes that were passed on."""
        read, gone = self._sent - unread, 0
        while self._behind and gone + self._behind[0] <= read:
            gone += self._behind.popleft()
        if gone:
            del self._data[:gone]
            self._sent -= gone

    def owed(self) -> bytes:
        """The rest of a frame that the taker has in part."""
        rest = self._ahead[0] - self._part if self._part else 0
        return bytes(self._data[self._sent : self._sent + rest])

    def begin_again(self) -> None:
        """There is another taker."""
        self.taken_back(self._sent)

    def save(self, saver: Saver) -> dict[str, Any]:
        """What was passed on in part is known to nobody but this process."""
        return {"data": saver.bytes(self._data), "sent": self._sent if saver.exact else 0}

    def load(self, data: dict[str, Any]) -> None:
        self.add(raw(data["data"]))
        self.passed(data["sent"])

    def clear(self) -> None:
        self._data.clear()
        self._behind.clear()
        self._ahead.clear()
        self._sent = self._part = 0
