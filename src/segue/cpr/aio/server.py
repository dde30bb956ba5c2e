"""A listening server and its live connections."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from dataclasses import dataclass

from segue.cpr.aio.connection import ConnectionState, Protocol
from segue.cpr.descriptor import Descriptor

# Connections that one turn of the loop may accept, so that others get theirs.
_AT_ONCE = 100
# The kernel would say at once again that there is no descriptor or memory left.
_RETRY = 1.0
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@dataclass(frozen=True)
class ServerState:
    """For a field of a section."""

    name: str
    listeners: tuple[Descriptor, ...]
    connections: tuple[ConnectionState, ...]


class Server:
    """Accepts on `listeners`, which belong to it; `factory` makes a Protocol for each connection.

    `name` begins the names of its descriptors: give two servers of one state two names.
    """

    def __init__(
        self, factory: Callable[[], Protocol], *listeners: socket.socket, name: str = "server"
    ) -> None:
        self._factory = factory
        self._listeners = listeners
        self._name = name
        # Those that are open, in the order in which they came.
        self._connections: dict[Protocol, None] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._retry: asyncio.TimerHandle | None = None
        for listener in listeners:
            listener.setblocking(False)

    @property
    def listeners(self) -> tuple[socket.socket, ...]:
        return self._listeners

    @property
    def connections(self) -> tuple[Protocol, ...]:
        return tuple(self._connections)

    def start(self) -> None:
        """Begin, or go on: also after `restore`, and after `suspend` if nothing came of it."""
        if self._loop is not None:
            return
        self._loop = asyncio.get_running_loop()
        self._listen()
        for connection in self.connections:
            connection.start()

    def close(self) -> None:
        """Accept no more. The connections stay."""
        self._stop()
        for listener in self._listeners:
            listener.close()
        self._listeners = ()

    def abort(self) -> None:
        """Close, and drop all connections."""
        self.close()
        for connection in self.connections:
            connection.abort()

    def suspend(self) -> ServerState:
        """Stop, and say what the server and its connections are. Only `start` may follow.

        If a connection's `save` fails, all go on, and its exception is raised.
        """
        running = self._loop is not None
        self._stop()
        listeners = tuple(
            Descriptor(f"{self._name}.listener.{number}", listener.fileno())
            for number, listener in enumerate(self._listeners)
        )
        try:
            connections = tuple(
                connection.suspend(f"{self._name}.{number}")
                for number, connection in enumerate(self.connections)
            )
        except BaseException:
            if running:
                self.start()
            raise
        return ServerState(self._name, listeners, connections)

    @classmethod
    def restore(cls, state: ServerState, factory: Callable[[], Protocol]) -> Server:
        """What `suspend` gave, in the process that has loaded it. Not yet started."""
        listeners = [listener.socket() for listener in state.listeners]
        server = cls(factory, *listeners, name=state.name)
        for saved in state.connections:
            connection = factory()
            server._add(connection)
            connection.restore(saved)
        return server

    def _add(self, connection: Protocol) -> None:
        self._connections[connection] = None
        connection._forget = self._connections.pop

    def _stop(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._loop is not None:
            for listener in self._listeners:
                self._loop.remove_reader(listener)
            self._loop = None

    def _listen(self) -> None:
        assert self._loop is not None
        self._retry = None
        for listener in self._listeners:
            self._loop.add_reader(listener, self._acceptable, listener)

    def _acceptable(self, listener: socket.socket) -> None:
        for _ in range(_AT_ONCE):
            if self._loop is None:
                return
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                self._wait(error)
                return
            connection = self._factory()
            self._add(connection)
            connection.open(sock)
            connection.start()
            connection._call(connection.connection_made)

    def _wait(self, error: OSError) -> None:
        assert self._loop is not None
        for listener in self._listeners:
            self._loop.remove_reader(listener)
        self._retry = self._loop.call_later(_RETRY, self._listen)
        self._loop.call_exception_handler(
            {"message": f"{self._name} accepts nothing for {_RETRY:g} s", "exception": error}
        )
