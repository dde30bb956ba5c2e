"""A connection that owns both of its buffers, and can be taken apart at any moment.

Bytes are in one of four places: the kernel's receive queue and send queue, which belong to the
socket and go with it; `unread`, what was received and not yet consumed; and what was written and
not yet sent. The latter two are the state.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from segue.cpr.descriptor import Descriptor
from segue.cpr.errors import Misuse

_CHUNK = 256 * 1024


@dataclass(frozen=True)
class ConnectionState:
    """For a field of a section; `data` is what Protocol.save() gave."""

    socket: Descriptor
    unread: bytes
    unsent: bytes
    paused: bool
    ended: bool
    finishing: bool
    closing: bool
    data: Any


class Protocol:
    """One connection. Subclass it; what may be overridden comes first, then what may be called."""

    def connection_made(self) -> None:
        """A new connection; not called for one that was restored."""

    def data_received(self) -> None:
        """There is more in `unread`. Consume what is complete (`del unread[:n]`), leave the rest.

        After a restart, and after resume_reading(), it is called again with what was left.
        """

    def eof_received(self) -> bool | None:
        """The peer has sent its last byte. Unless this returns True, the connection is closed."""

    def connection_lost(self, error: OSError | None) -> None:
        """The connection is closed; by an error, by the peer, by close() or abort()."""

    def save(self) -> Any:
        """What the program knows about this connection, as JSON values."""

    def restored(self, data: Any) -> None:
        """The connection was taken up again, with what `save` gave. It is not started yet."""

    unread: bytearray

    def __init__(self) -> None:
        self.unread = bytearray()
        self._unsent = bytearray()
        self._socket: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._paused = self._ended = self._finishing = self._closing = False
        self._drained: asyncio.Event | None = None
        self._forget: Callable[[Protocol], None] | None = None

    @property
    def sock(self) -> socket.socket:
        """Raises Misuse where it is closed."""
        if self._socket is None:
            raise Misuse("this connection is not open")
        return self._socket

    @property
    def unsent(self) -> int:
        """How many bytes wait for the peer to read; `drain` waits until there are none."""
        return len(self._unsent)

    @property
    def paused(self) -> bool:
        """Whether pause_reading() was called, perhaps before a restart."""
        return self._paused

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`, now or as soon as possible. Without effect on a closed connection."""
        if self._socket is None or self._closing:
            return
        if self._finishing:
            raise Misuse("written after write_eof()")
        loop = self._started()
        view = memoryview(data).cast("B")
        sent = 0
        if not self._unsent:
            try:
                sent = self._socket.send(view)
            except OSError:
                # Told by the writer's callback: a write ends no connection under its caller.
                sent = 0
        if sent < len(view):
            if not self._unsent:
                loop.add_writer(self._socket, self._writable)
            self._unsent += view[sent:]

    def write_eof(self) -> None:
        """Tell the peer, after all that was written, that nothing more will come."""
        self._started()
        self._finishing = True
        self._flushed()

    async def drain(self) -> None:
        """Wait until the peer has taken all that was written, or is gone."""
        while self._unsent and self._socket is not None:
            if self._drained is None:
                self._drained = asyncio.Event()
            await self._drained.wait()

    def pause_reading(self) -> None:
        self._paused = True
        self._listen()

    def resume_reading(self) -> None:
        self._paused = False
        self._listen()
        self._offer()

    def close(self) -> None:
        """Close once all that was written is sent; if it is already, before this returns."""
        if self._socket is None:
            return
        self._started()
        self._closing = True
        self._listen()
        self._flushed()

    def abort(self) -> None:
        """Close at once; what is unsent is dropped."""
        self._lose(None)

    def open(self, sock: socket.socket) -> None:
        """Take a connected socket, which is the connection's own from here on. Not yet started."""
        sock.setblocking(False)
        self._socket = sock

    def start(self) -> None:
        """Begin, or go on: after `open`, `restore`, or a `suspend` that nothing came of."""
        sock = self.sock
        if self._loop is not None:
            return
        self._loop = asyncio.get_running_loop()
        if self._unsent:
            self._loop.add_writer(sock, self._writable)
        self._listen()
        self._offer()

    def suspend(self, name: str) -> ConnectionState:
        """Stop, and say what the connection is; `name` is that of its descriptor.

        Only `start` and `abort` may follow.
        """
        sock = self.sock
        if self._loop is not None:
            self._loop.remove_reader(sock)
            self._loop.remove_writer(sock)
            self._loop = None
        return ConnectionState(
            Descriptor(name, sock.fileno()),
            bytes(self.unread),
            bytes(self._unsent),
            self._paused,
            self._ended,
            self._finishing,
            self._closing,
            self.save(),
        )

    def restore(self, state: ConnectionState) -> None:
        """Become what `suspend` gave, in the process that has loaded it. Not yet started."""
        self.open(state.socket.socket())
        self.unread[:] = state.unread
        self._unsent[:] = state.unsent
        self._paused, self._ended = state.paused, state.ended
        self._finishing, self._closing = state.finishing, state.closing
        self.restored(state.data)

    def _started(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise Misuse(
                "this connection is suspended", "restart or start() without an await in between"
            )
        return self._loop

    def _listen(self) -> None:
        if self._loop is None or self._socket is None:
            return
        if self._paused or self._ended or self._closing:
            self._loop.remove_reader(self._socket)
        else:
            self._loop.add_reader(self._socket, self._readable)

    def _readable(self) -> None:
        try:
            data = self.sock.recv(_CHUNK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(error)
            return
        if data:
            self.unread += data
            self._call(self.data_received)
            return
        self._ended = True
        self._listen()
        if not self._call(self.eof_received):
            self.close()

    def _offer(self) -> None:
        """What is left in `unread` may be of use now."""
        if self._loop is not None and self.unread and not self._paused and not self._closing:
            self._loop.call_soon(self._left_over)

    def _left_over(self) -> None:
        # It may have been suspended, lost or paused since this was asked for.
        if self._socket is None or self._loop is None or self._paused or self._closing:
            return
        if self.unread:
            self._call(self.data_received)

    def _writable(self) -> None:
        try:
            sent = self.sock.send(self._unsent)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(error)
            return
        del self._unsent[:sent]
        self._flushed()

    def _flushed(self) -> None:
        """What is to be done once nothing is unsent."""
        if self._unsent or self._socket is None:
            return
        self._started().remove_writer(self._socket)
        self._wake()
        if self._closing:
            self._lose(None)
        elif self._finishing:
            try:
                self._socket.shutdown(socket.SHUT_WR)
            except OSError as error:
                self._lose(error)

    def _call(self, method: Callable[[], Any]) -> Any:
        """A mistake of the program's costs this one connection."""
        try:
            return method()
        except Exception as error:
            self._started().call_exception_handler(
                {"message": f"{method.__qualname__} failed", "exception": error, "protocol": self}
            )
            self.abort()
        return None

    def _lose(self, error: OSError | None) -> None:
        sock, self._socket = self._socket, None
        if sock is None:
            return
        if self._loop is not None:
            self._loop.remove_reader(sock)
            self._loop.remove_writer(sock)
        sock.close()
        self._unsent.clear()
        self._wake()
        if self._forget is not None:
            self._forget(self)
        self.connection_lost(error)

    def _wake(self) -> None:
        if self._drained is not None:
            self._drained.set()
            self._drained = None
