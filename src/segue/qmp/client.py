"""One client's connection: bytes in, requests in QEMU's order, bytes out, all of it bounded.

As in QEMU, a client's in-band commands are carried out one after the other. Without out-of-band
execution nothing more of its input is looked at meanwhile; with it, up to eight requests are
taken in, so that an out-of-band one behind them is seen and carried out at once.

What a client can cost at most:

    input       4 MiB of one unfinished message (framing.py), then an error, and it is dropped;
                READ_AHEAD bytes more while its commands are not looked at
    output      who leaves OUTPUT_PAUSE bytes unread is not served until it reads; who leaves
                OUTPUT_LIMIT bytes unread when an event comes is dropped
    attention   BURST requests, then everybody else's turn

This reads the socket itself (`add_reader`, `recvmsg`): asyncio's transports do not give the
descriptors that come with a message, and buffer what nobody could hand over to another process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from segue.qmp.commands import TAKE_FD, error
from segue.qmp.framing import Framer, Parsed
from segue.qmp.gate import Passage

if TYPE_CHECKING:
    from segue.qmp.server import QmpServer

CHUNK = 64 << 10
READ_AHEAD = 64 << 10
OUTPUT_PAUSE = 64 << 10
OUTPUT_LIMIT = 4 << 20
BURST = 16
# As many as QEMU takes in.
_OOB_QUEUE = 8
_MAX_FDS = 16


@dataclass(frozen=True)
class ClientState:
    """A connection at rest as plain data: with its socket, all that another process needs.

    `pending` are requests that have been taken in but not been started, `recovering` belongs to
    `unparsed` (framing.py). Descriptors that came with either are not included.
    """

    greeted: bool
    negotiated: bool
    oob: bool
    pretty: bool
    recovering: bool
    pending: bytes
    unparsed: bytes
    unsent: bytes


@dataclass(eq=False)
class Request:
    """One message of a client, or the error to be told in its place."""

    parsed: Parsed
    fds: list[int]
    size: int = 0
    """Of the message, in bytes."""

    def close_fds(self) -> None:
        _close_all(self.fds)


class Client:
    """Made and owned by the server. `peer` is (pid, uid) of a unix client."""

    def __init__(
        self, server: QmpServer, sock: socket.socket, number: int, pretty: bool, place: int
    ) -> None:
        sock.setblocking(False)
        self.number = number
        # In `QmpServer.busy`.
        self.place = place
        self.pretty = pretty
        self.greeted = False
        self.negotiated = False
        self.oob = False
        self.closed = False
        self.peer = _peer(sock)
        # What it has asked of the instance: waiting at the gate, or under way.
        self.passages: dict[Passage, Request] = {}
        self.sock = sock
        self._fd = sock.fileno()
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._framer = Framer()
        self._queue: deque[Request] = deque()
        self._current: Request | None = None
        # Descriptors, and from where to where of the stream they came.
        self._fds: list[tuple[int, int, list[int]]] = []
        self._received = 0
        self._parsed = 0
        self._out = bytearray()
        self._reading = False
        self._ended = False
        self._advancing = False

    def __str__(self) -> str:
        if self.peer is None:
            return f"QMP client {self.number}"
        return f"QMP client {self.number} (pid {self.peer[0]}, uid {self.peer[1]})"

    def start(self, state: ClientState | None = None) -> None:
        """Begin to serve; `state` takes up a connection that another process served."""
        if state is not None:
            self.greeted = state.greeted
            self.negotiated = state.negotiated
            self.oob = state.oob
            pending = Framer(state.pending)
            while parsed := pending.next():
                self._queue.append(Request(parsed, [], len(state.pending)))
            self._framer = Framer(state.unparsed, state.recovering)
            self._received = len(state.unparsed)
            self.send(state.unsent)
        self.greet()

    def greet(self) -> None:
        """Send the greeting, once there is one; nothing that the client says is read before."""
        greeting = self._server.greeting(self.pretty)
        if greeting is None or self.closed:
            return
        if not self.greeted:
            self.greeted = True
            self.send(greeting)
        self.advance()

    @property
    def holds_descriptors(self) -> bool:
        """Whether some have come whose message has not been carried out."""
        return bool(self._fds) or any(request.fds for request in self._queue)

    @property
    def current(self) -> Request | None:
        """What is being carried out for it."""
        return self._current

    def state(self, without: Request | None = None) -> ClientState:
        """Legal only while none of its commands is under way (`Gate.drain`, finished handlers).

        `without` is a request that somebody else will answer.
        """
        pending = b""
        unsent = bytes(self._out)
        waiting = [self._current] if self._current and self._current is not without else []
        waiting += [each for each in self.passages.values() if each is not self._current]
        for request in (*waiting, *self._queue):
            if request.parsed.error is None:
                pending += json.dumps(request.parsed.value).encode() + b"\n"
            else:
                unsent += serialise(error(request.parsed.error), self.pretty)
        return ClientState(
            greeted=self.greeted,
            negotiated=self.negotiated,
            oob=self.oob,
            pretty=self.pretty,
            recovering=self._framer.recovering,
            pending=pending,
            unparsed=self._framer.unparsed(),
            unsent=unsent,
        )

    # Input

    def _read(self, on: bool) -> None:
        if on is not self._reading and not self.closed:
            self._reading = on
            if on:
                self._loop.add_reader(self._fd, self._readable)
            else:
                self._loop.remove_reader(self._fd)

    def _readable(self) -> None:
        fds: list[int] = []
        self._server.busy[self.place] = 1
        try:
            if self.sock.family == socket.AF_UNIX:
                flags = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
                data, fds, _, _ = socket.recv_fds(self.sock, CHUNK, _MAX_FDS, flags)
            else:
                data = self.sock.recv(CHUNK, socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close("its connection broke")
            return
        if fds:
            self._fds.append((self._received, self._received + len(data), fds))
        self._received += len(data)
        if data:
            self._framer.feed(data)
        else:
            # It may have shut down only its sending side, and still want its answers.
            self._ended = True
        self.advance()

    def _take_fds(self, begin: int, end: int) -> list[int]:
        """The descriptor for the message at begin..end of the stream: one, as QEMU has it.

        The kernel gives descriptors with the last bytes of a read, those that they were sent
        with. So what came before the end of this message is meant, or else (a newline behind it,
        or more) what came with its end. Some clients send a descriptor with a blank before the
        message. As in QEMU, later ones take the place of earlier ones that nobody asked for.
        """
        near = [entry for entry in self._fds if entry[0] < end]
        before = [entry for entry in near if entry[1] <= end]
        used = before if any(last > begin for _, last, _ in before) else near
        del self._fds[: len(used)]
        taken: list[int] = []
        for _, last, fds in used:
            _close_all(taken)
            taken = fds
            if last <= begin:
                _close_all(fds)
        surplus = taken[1:]
        _close_all(surplus)
        return taken[:1]

    # Requests

    def advance(self) -> None:
        """Do what can be done: take requests in, start the next, stop or go on reading."""
        if self._advancing or self.closed or not self.greeted:
            return
        self._advancing = True
        left = BURST
        try:
            while left and self._step():
                left -= 1
        finally:
            self._advancing = False
        if not left:
            self._read(False)
            self._loop.call_soon(self.advance)
            return
        idle = self._current is None and not self._queue and not self.passages
        if idle and not self._out and not len(self._framer):
            self._server.busy[self.place] = 0
        deferred = self._server.defers(len(self._framer))
        if self._ended:
            self._read(False)
            if idle and not self._out and not deferred:
                self.close("it hung up")
        elif deferred or not idle or self._out:
            # What is beyond the bound, and descriptors of later messages, wait in the kernel.
            self._read(len(self._framer) < READ_AHEAD and not self._fds)
        else:
            self._read(True)

    def _step(self) -> bool:
        """Begin with one request, or take one in; False if neither can be done now."""
        if self.closed or len(self._out) > OUTPUT_PAUSE:
            return False
        if self._current is None and self._queue:
            self._begin(self._queue.popleft())
            return True
        room = _OOB_QUEUE if self.oob else int(self._current is None)
        if len(self._queue) >= room or self._server.defers(len(self._framer)):
            return False
        parsed = self._framer.next()
        if parsed is None:
            return False
        # Blanks before a message belong to it: descriptors may have come with them.
        begin, self._parsed = self._parsed, self._framer.consumed
        if parsed.fatal:
            self.send(serialise(error(parsed.error or ""), self.pretty))
            self.close(parsed.error or "")
            return False
        message = parsed.value if isinstance(parsed.value, dict) else {}
        fds: list[int] = []
        if self._fds and message.get("execute") in TAKE_FD:
            fds = self._take_fds(begin, self._parsed)
        request = Request(parsed, fds, self._parsed - begin)
        if self.oob and "exec-oob" in message and "execute" not in message:
            self._server.dispatch(self, request)
        else:
            self._queue.append(request)
        return True

    def _begin(self, request: Request) -> None:
        self._current = request
        if request.parsed.error is None:
            self._server.dispatch(self, request)
        else:
            self.answer(request, error(request.parsed.error))

    def answer(self, request: Request, reply: dict[str, Any]) -> None:
        """Give a request its reply; the next one may begin."""
        request.close_fds()
        message = request.parsed.value
        if isinstance(message, dict) and "id" in message:
            reply["id"] = message["id"]
        self.send(serialise(reply, self.pretty))
        if self._current is request:
            self._current = None
        self.advance()

    # Output

    def send_event(self, data: bytes) -> None:
        """As `send`, but who does not read is dropped rather than kept up with."""
        if len(self._out) + len(data) > OUTPUT_LIMIT:
            self.close(f"it left {len(self._out)} bytes unread")
        else:
            self.send(data)

    def send(self, data: bytes) -> None:
        if self.closed or not data:
            return
        if self._out:
            self._out += data
            return
        try:
            sent = self.sock.send(data, socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self.close("its connection broke")
            return
        if sent < len(data):
            self._out += data[sent:]
            self._loop.add_writer(self._fd, self._flush)

    def _flush(self) -> None:
        try:
            while self._out:
                sent = self.sock.send(self._out, socket.MSG_DONTWAIT)
                del self._out[:sent]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self.close("its connection broke")
            return
        else:
            self._loop.remove_writer(self._fd)
        self.advance()

    def close(self, why: str, hang_up: bool = True) -> None:
        """What it has not been told yet is lost; what it asked for and was not started, too.

        It sees the end of the connection even where somebody holds a duplicate, an instance
        (keeper.py), but without `hang_up`.
        """
        if self.closed:
            return
        self._read(False)
        self.closed = True
        self._loop.remove_writer(self._fd)
        if hang_up:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
        for _, _, fds in self._fds:
            _close_all(fds)
        for request in self._queue:
            request.close_fds()
        self._fds.clear()
        self._queue.clear()
        self._out.clear()
        self._framer = Framer()
        self._server.gone(self, why)


def serialise(message: dict[str, Any], pretty: bool) -> bytes:
    """One message as QEMU ends it."""
    return json.dumps(message, indent=4 if pretty else None).encode() + b"\r\n"


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def _peer(sock: socket.socket) -> tuple[int, int] | None:
    if sock.family == socket.AF_UNIX:
        with contextlib.suppress(OSError):
            data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            pid, uid, _ = struct.unpack("3i", data)
            return pid, uid
    return None
