"""One QMP client: its bytes in, its bytes out, and its commands one after the other.

Bounds: a client of whose commands `MAX_QUEUED` wait is read no further (QEMU stops at eight too);
one that lets more than `MAX_UNSENT` bytes of events and replies pile up is cut off. Either way it
harms itself alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

from segue.qmp.framing import Framer, Parsed

MAX_QUEUED = 8
MAX_UNSENT = 16 << 20
_CHUNK = 65536
_MAX_FDS = 16

Request = tuple[Parsed, list[int]]


class Client:
    """`on_request(client, parsed, fds)` is called for each message, one at a time.

    The next message is handed over when `done()` is called; an out-of-band one at once.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_request: Callable[[Client, Parsed, list[int]], None],
        on_close: Callable[[Client], None],
        pretty: bool = False,
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.pretty = pretty
        self.negotiated = False
        self.out_of_band = False
        self.closed = False
        self._framer = Framer()
        self._unsent = bytearray()
        self._queue: deque[Request] = deque()
        self._fds: list[int] = []
        self._busy = False
        self._on_request = on_request
        self._on_close = on_close
        self._loop = asyncio.get_running_loop()
        self._reading = False
        self._read(True)

    def send(self, message: dict[str, Any]) -> None:
        self.send_bytes(encode(message, self.pretty))

    def send_bytes(self, data: bytes) -> None:
        if self.closed:
            return
        waiting = bool(self._unsent)
        self._unsent += data
        if len(self._unsent) > MAX_UNSENT:
            self.close()
        elif not waiting:
            self._flush()

    def done(self) -> None:
        """The command has been answered: the next one may begin."""
        self._busy = False
        self._next()

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self.sock.fileno())
        self._loop.remove_writer(self.sock.fileno())
        self.sock.close()
        for fd in [*self._fds, *(fd for _, fds in self._queue for fd in fds)]:
            os.close(fd)
        self._fds.clear()
        self._queue.clear()
        self._on_close(self)

    def _read(self, on: bool) -> None:
        if on != self._reading and not self.closed:
            self._reading = on
            if on:
                self._loop.add_reader(self.sock.fileno(), self._readable)
            else:
                self._loop.remove_reader(self.sock.fileno())

    def _readable(self) -> None:
        try:
            if self.sock.family == socket.AF_UNIX:
                data, fds, _, _ = socket.recv_fds(self.sock, _CHUNK, _MAX_FDS)
                self._fds += fds
            else:
                data = self.sock.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._framer.feed(data)
        while not self.closed and (parsed := self._framer.next()) is not None:
            fds, self._fds = self._fds, []
            if self.out_of_band and isinstance(parsed.value, dict) and "exec-oob" in parsed.value:
                self._on_request(self, parsed, fds)
            else:
                self._queue.append((parsed, fds))
            if parsed.fatal:
                break
        self._next()

    def _next(self) -> None:
        while self._queue and not self._busy and not self.closed:
            parsed, fds = self._queue.popleft()
            self._busy = True
            self._on_request(self, parsed, fds)
        self._read(len(self._queue) < MAX_QUEUED)

    def _flush(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self.sock.send(self._unsent)]
        except BlockingIOError:
            self._loop.add_writer(self.sock.fileno(), self._flush)
        except OSError:
            self.close()
        else:
            with contextlib.suppress(ValueError):
                self._loop.remove_writer(self.sock.fileno())


def encode(message: dict[str, Any], pretty: bool = False) -> bytes:
    if pretty:
        return json.dumps(message, indent=4).encode() + b"\r\n"
    return json.dumps(message).encode() + b"\r\n"
