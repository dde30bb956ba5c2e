"""Host ends of character devices: what the user's `-chardev` names, opened by the supervisor.

Each behaves as QEMU's own backend of that spelling does (chardev/char-*.c of 7.2 and 10.0),
except that its far side is the broker and not a device.
"""

from __future__ import annotations

import asyncio
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from segue.errors import SegueError, advice
from segue.kept.channel import Channel, DatagramChannel, Descriptor, DescriptorChannel
from segue.qemu.options import Params
from segue.saved import Loader, Saver

Say = Callable[[str], None]


class Endpoint(ABC):
    """Where clients come from. `came` is set by the broker before `start`."""

    came: Callable[[Channel], None]
    # A client whose connection has to say more than bytes (telnet's BREAK).
    broke: Callable[[], None] = staticmethod(lambda: None)
    # As `Kept.inherit` and `Kept.spare`.
    found: Loader = Loader(False, {})
    spared = False

    @abstractmethod
    async def start(self) -> None:
        """Open it; call `came` for each client. Raises SegueError."""

    def save(self, saver: Saver) -> dict[str, Any]:
        """As `Kept.save`; the channel is the broker's to save."""
        return {}

    async def load(
        self, data: dict[str, Any], channel: dict[str, Any] | None, loader: Loader
    ) -> Channel | None:
        """In place of `start`; the client's channel again, if there was one and it is not lost.

        It is not told by `came`. Without one, another client may come.
        """
        return None

    def left(self) -> None:  # noqa: B027
        """The client is gone and its channel closed: another may come."""

    def close(self) -> None:  # noqa: B027
        """Remove what was made. The channel has been closed before."""

    @abstractmethod
    def identity(self) -> dict[str, Any]: ...

    @abstractmethod
    def filename(self, channel: Channel | None) -> str:
        """What QEMU's `query-chardev` says of it, with this client or without one."""


class Pipe(Endpoint):
    """PATH.in and PATH.out, or PATH both ways. Opened for both, so that there is no end."""

    def __init__(self, path: str) -> None:
        self._path = path

    async def start(self) -> None:
        fds: list[int] = []
        try:
            try:
                # A FIFO that is opened for both directions does not wait for the other side.
                for name in (f"{self._path}.in", f"{self._path}.out"):
                    fds.append(os.open(name, os.O_RDWR | os.O_CLOEXEC))  # noqa: PERF401
            except OSError:
                fds.append(os.open(self._path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            for fd in fds:
                os.close(fd)
            raise SegueError(
                f"Could not open '{self._path}': {error.strerror}", "make it with mkfifo"
            ) from None
        if len(fds) == 3:  # the first of the two was there, the second was not
            os.close(fds.pop(0))
        reads = Descriptor(fds[0], os.O_RDWR)
        writes = Descriptor(fds[-1], os.O_RDWR)
        for fd in set(fds):
            os.close(fd)
        self.came(DescriptorChannel(reads, writes))

    async def load(
        self, data: dict[str, Any], channel: dict[str, Any] | None, loader: Loader
    ) -> Channel | None:
        again = None if channel is None else DescriptorChannel.load(channel, loader)
        if again is None:
            await self.start()
        return again

    def identity(self) -> dict[str, Any]:
        return {"path": self._path}

    def filename(self, channel: Channel | None) -> str:
        return "pipe"


class Udp(Endpoint):
    """A socket bound to localaddr:localport and connected to host:port."""

    def __init__(self, params: Params) -> None:
        self._params = params
        self._name = f"{params.get('host') or 'localhost'}:{params.get('port')}"

    async def start(self) -> None:
        get = self._params.get
        port = get("port")
        if not port:
            raise SegueError("chardev: udp: remote port not specified")
        family = address_family(self._params)
        peer = (await resolve(get("host") or "localhost", port, family, socket.SOCK_DGRAM))[0]
        local = (
            await resolve(
                get("localaddr") or None,
                get("localport") or "0",
                peer[0],
                socket.SOCK_DGRAM,
                socket.AI_PASSIVE,
            )
        )[0]
        sock = socket.socket(peer[0], socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(local[4])
            except OSError as error:
                what = f"Failed to bind socket: {error.strerror}"
                raise SegueError(what, advice(error)) from None
            try:
                sock.connect(peer[4])
            except OSError as error:
                raise SegueError(f"Failed to connect to '{self._name}': {error.strerror}") from None
        except SegueError:
            sock.close()
            raise
        self.came(DatagramChannel(sock))

    async def load(
        self, data: dict[str, Any], channel: dict[str, Any] | None, loader: Loader
    ) -> Channel | None:
        sock = loader.socket("socket")
        if sock is None:
            await self.start()
            return None
        return DatagramChannel(sock)

    def identity(self) -> dict[str, Any]:
        return {"udp": self._name}

    def filename(self, channel: Channel | None) -> str:
        return "udp"


def address_family(params: Params) -> socket.AddressFamily:
    """What `ipv4=` and `ipv6=` ask for, as inet_ai_family_from_address() reads them."""
    flags = [params.boolean(key, False) if key in params else None for key in ("ipv4", "ipv6")]
    match flags:
        case [False, False]:
            raise SegueError("Cannot disable IPv4 and IPv6 at same time")
        case [True, True]:
            return socket.AF_UNSPEC if params.get("host") else socket.AF_INET6
        case [_, True] | [False, _]:
            return socket.AF_INET6
        case [True, _] | [_, False]:
            return socket.AF_INET
    return socket.AF_UNSPEC


Address = tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]


async def resolve(
    host: str | None,
    port: str,
    family: socket.AddressFamily,
    kind: socket.SocketKind,
    flags: int = 0,
) -> Sequence[Address]:
    """The addresses of a name; raises SegueError if there are none."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host, port, family=family, type=kind, flags=flags
        )
    except OSError as error:
        raise SegueError(
            f"address resolution failed for {host or ''}:{port}: {error.strerror}"
        ) from None
    return found
