"""The far sides of a wire: connections, and sockets for datagrams, opened as QEMU would.

net/socket.c, net/stream.c and net/dgram.c; addresses are spelled in three ways, so `plug_of`
brings them to the one of `-chardev socket`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any

from segue.errors import SegueError
from segue.kept.channel import Channel, SocketChannel, socket_cookie
from segue.kept.endpoints import resolve
from segue.kept.frames import HEADER, LONGEST, Frames
from segue.kept.relay import Far, StreamFar
from segue.kept.sockets import Client, Server
from segue.qemu.options import Params
from segue.saved import Loader, Saver

# asm-generic/socket.h; Python has no name for it.
_SO_RCVBUFFORCE = 33
# For what comes while this process has no time: a datagram that finds no room is lost.
_ROOM = 1 << 22
# Datagrams that are read at one turn.
_TURN = 32


class Plug(ABC):
    """What a wire leads to. `came` is called with each far side that there is."""

    came: Callable[[Far], None]
    say: Callable[[str], None] = staticmethod(lambda text: None)

    @abstractmethod
    async def start(self) -> None:
        """Open it. Raises SegueError."""

    @abstractmethod
    def save(self, saver: Saver) -> dict[str, Any]: ...

    @abstractmethod
    async def load(self, data: dict[str, Any], loader: Loader) -> Far | None:
        """The far side again, where it is not lost."""

    def left(self) -> None:  # noqa: B027
        """The far side has gone, and is closed: another may come."""

    def close(self) -> None:  # noqa: B027
        """Remove what was made."""

    @abstractmethod
    def identity(self) -> dict[str, Any]: ...


class Connection(Plug):
    """A server for one peer at a time, or a client."""

    def __init__(self, name: str, params: Params) -> None:
        kind = Server if params.boolean("server", False) else Client
        self._endpoint = kind(name, params, lambda text: self.say(text))
        self._endpoint.came = self._came
        self._channel: SocketChannel | None = None

    async def start(self) -> None:
        await self._endpoint.start()

    def _came(self, channel: Channel) -> None:
        assert isinstance(channel, SocketChannel)
        self._channel = channel
        self.came(StreamFar(channel.sock))

    def save(self, saver: Saver) -> dict[str, Any]:
        end = saver.within("end")
        return {
            "endpoint": self._endpoint.save(end),
            "channel": None if self._channel is None else self._channel.save(end),
        }

    async def load(self, data: dict[str, Any], loader: Loader) -> Far | None:
        end = loader.within("end")
        channel = await self._endpoint.load(data["endpoint"], data["channel"], end)
        if channel is None:
            return None
        assert isinstance(channel, SocketChannel)
        self._channel = channel
        return StreamFar(channel.sock)

    def left(self) -> None:
        self._channel = None
        self._endpoint.left()

    def close(self) -> None:
        self._endpoint.close()

    def identity(self) -> dict[str, Any]:
        peer = None if self._channel is None else self._channel.identity()
        return {**self._endpoint.identity(), "peer": peer}


class DatagramFar:
    """Each datagram is a frame. One that the network refuses is lost, as QEMU loses it."""

    def __init__(self, sock: socket.socket, to: Any) -> None:
        self.sock = sock
        self._to = to
        sock.setblocking(False)
        for option in (_SO_RCVBUFFORCE, socket.SO_RCVBUF):  # the first is root's
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, option, _ROOM)
                break

    def fileno(self) -> int:
        return self.sock.fileno()

    def read(self, frames: Frames, buffer: bytearray) -> int:
        taken = 0
        for _ in range(_TURN):
            try:
                count = self.sock.recv_into(buffer, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except ConnectionError:  # what became of an earlier one
                continue
            if count:
                # QEMU cuts off what is longer.
                taken += frames.add_frame(memoryview(buffer)[: min(count, LONGEST)])
        if not taken:
            raise BlockingIOError
        return taken

    def send(self, data: bytes) -> int:
        length = HEADER + int.from_bytes(data[:HEADER], "big")
        frame = data[HEADER:length]
        try:
            if self._to is None:
                self.sock.send(frame, socket.MSG_DONTWAIT)
            else:
                self.sock.sendto(frame, socket.MSG_DONTWAIT, self._to)
        except BlockingIOError:
            raise
        except OSError:
            pass
        return length

    def close(self) -> None:
        self.sock.close()


class Datagrams(Plug):
    """A socket for datagrams; `to` is where they go, None if it is connected."""

    def __init__(self, opened: Callable[[], Awaitable[tuple[socket.socket, Any]]]) -> None:
        self._open = opened
        self._sock: socket.socket | None = None
        self._to: Any = None

    async def start(self) -> None:
        try:
            self._sock, self._to = await self._open()
        except OSError as error:
            raise SegueError(f"its socket cannot be made: {error.strerror or error}") from None
        self.came(DatagramFar(self._sock, self._to))

    def save(self, saver: Saver) -> dict[str, Any]:
        if self._sock is not None:
            saver.fd("socket", self._sock.fileno())
        return {"to": self._to}

    async def load(self, data: dict[str, Any], loader: Loader) -> Far | None:
        self._sock = loader.socket("socket")
        if self._sock is None:
            await self.start()
            return None
        self._to = tuple(data["to"]) if isinstance(data["to"], list) else data["to"]
        return DatagramFar(self._sock, self._to)

    def identity(self) -> dict[str, Any]:
        return {} if self._sock is None else {"cookie": socket_cookie(self._sock)}


# -- addresses ------------------------------------------------------------------------------


def plug_of(name: str, params: Params, streams: bool) -> Plug:
    """What the options of a `stream`, `dgram` or `socket` network mean. Raises SegueError.

    `streams` says of the socket that is given to a `socket` network that it is a stream.
    """
    kind = params.get("type")
    if kind == "stream":
        return Connection(name, _stream(params))
    if kind == "dgram":
        return _dgram(params)
    if (fd := params.get("fd")) is not None:
        if streams:
            return Connection(name, Params.of([("fd", fd)]))
        return Datagrams(lambda: _given(fd))
    if (where := params.get("listen")) is not None:
        host, port = _split(where)
        words = [("host", host), ("port", port), ("server", "on"), ("wait", "off")]
        return Connection(name, Params.of(words))
    if (where := params.get("connect")) is not None:
        host, port = _split(where)
        return Connection(name, Params.of([("host", host), ("port", port)]))
    if (where := params.get("mcast")) is not None:
        group, interface = _split(where), params.get("localaddr")
        return Datagrams(lambda: _multicast(group, interface))
    if (where := params.get("udp")) is not None:
        remote, local = _split(where), _split(params.get("localaddr") or ":0")
        return Datagrams(lambda: _udp(local, remote))
    raise SegueError(
        f"-netdev {params}: nothing says where it leads",
        hint="exactly one of listen=, connect=, mcast=, udp= or fd= is required",
    )


def _stream(params: Params) -> Params:
    address = params.sub("addr")
    words = [(k, v) for k, v in address.items() if k not in ("type", "str")]
    if address.get("type") == "fd":
        words.append(("fd", address.get("str") or ""))
    words += [(k, v) for k, v in params.items() if k in ("server", "reconnect", "reconnect-ms")]
    return Params.of([*words, ("wait", "off")])


def _dgram(params: Params) -> Plug:
    local, remote = params.sub("local"), params.sub("remote")
    kinds = local.get("type"), remote.get("type")
    if kinds == ("fd", None):
        fd = local.get("str") or ""
        return Datagrams(lambda: _given(fd))
    if kinds == ("unix", "unix"):
        paths = local.get("path") or "", remote.get("path") or ""
        return Datagrams(lambda: _unix(*paths))
    there = remote.get("host") or "", remote.get("port") or ""
    if kinds[1] == "inet" and _is_group(there[0]):
        return Datagrams(lambda: _multicast(there, local.get("host")))
    if kinds == ("inet", "inet"):
        here = local.get("host") or "", local.get("port") or "0"
        return Datagrams(lambda: _udp(here, there))
    raise SegueError(
        f"-netdev {params}: Segue does not know these addresses together",
        hint="give local and remote of the same type, inet or unix, or local.type=fd alone",
    )


def _split(where: str) -> tuple[str, str]:
    host, _, port = where.rpartition(":")
    return host, port


def _is_group(host: str) -> bool:
    with contextlib.suppress(OSError):
        return 224 <= socket.inet_aton(host)[0] < 240
    return False


def is_stream(fd: str) -> bool:
    """Of a socket that `segue run` inherits. Raises SegueError."""
    try:
        sock = socket.socket(fileno=os.dup(int(fd)))
    except (OSError, ValueError):
        raise SegueError(
            f"fd={fd} is not a socket", hint="pass the number of one that `segue run` inherits"
        ) from None
    with sock:
        return sock.type == socket.SOCK_STREAM


async def _given(fd: str) -> tuple[socket.socket, None]:
    is_stream(fd)
    sock = socket.socket(fileno=int(fd))
    sock.set_inheritable(False)
    return sock, None


async def _udp(local: tuple[str, str], remote: tuple[str, str]) -> tuple[socket.socket, Any]:
    kind = socket.SOCK_DGRAM
    there = (await resolve(remote[0] or None, remote[1], socket.AF_INET, kind))[0]
    here = (await resolve(local[0] or None, local[1], there[0], kind, socket.AI_PASSIVE))[0]
    return _bound(socket.AF_INET, here[4]), there[4]


async def _unix(local: str, remote: str) -> tuple[socket.socket, Any]:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(local)
    return _bound(socket.AF_UNIX, local), remote


async def _multicast(group: tuple[str, str], interface: str | None) -> tuple[socket.socket, Any]:
    address = (group[0], int(group[1]))
    sock = _bound(socket.AF_INET, address)
    try:
        member = socket.inet_aton(group[0]) + socket.inet_aton(interface or "0.0.0.0")  # noqa: S104
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
        if interface:
            one = struct.pack("=4s", socket.inet_aton(interface))
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, one)
    except OSError:
        sock.close()
        raise
    return sock, address


def _bound(family: socket.AddressFamily, address: Any) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock
