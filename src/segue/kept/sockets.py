"""`-chardev socket`: a server for one client at a time, or a client that may reconnect."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from abc import abstractmethod
from typing import Any

from segue.errors import SegueError, advice
from segue.kept.channel import Channel, SocketChannel, socket_cookie
from segue.kept.endpoints import Endpoint, Say, address_family, resolve
from segue.kept.telnet import TelnetChannel
from segue.qemu.options import Params
from segue.saved import Loader, Saver

_BACKLOG = 1  # as QEMU: others wait there while one is served
_SUN_PATH = 108
# Who cannot be accepted for one of these waits in the backlog, and the loop would turn around it.
OUT_OF_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
ACCEPT_PAUSE = 1.0  # seconds


class _SocketEndpoint(Endpoint):
    def __init__(self, label: str, params: Params, say: Say) -> None:
        self._label = label
        self._params = params
        self._say = say

    def _load_channel(self, channel: dict[str, Any] | None, loader: Loader) -> Channel | None:
        sock = loader.socket("socket")
        if sock is None or channel is None:
            return None
        again: SocketChannel
        if "greeting" in channel:
            again = TelnetChannel(sock, self.broke, channel)
        else:
            again = SocketChannel(sock)
        again.returning = channel["returning"]
        return again

    def _known(self, sock: socket.socket) -> Channel:
        """A client's connection to an earlier machine of this name."""
        if self._params.boolean("telnet", False) and self._params.boolean("server", False):
            return TelnetChannel(sock, self.broke, {"greeting": "", "seen": 0})
        return SocketChannel(sock)

    def _channel(self, sock: socket.socket) -> Channel:
        nodelay = not self._params.boolean("delay", True) or self._params.boolean("nodelay", False)
        if nodelay and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # QEMU negotiates only with those who called.
        if self._params.boolean("telnet", False) and self._params.boolean("server", False):
            return TelnetChannel(sock, self.broke)
        return SocketChannel(sock)

    def filename(self, channel: Channel | None) -> str:
        server = self._params.boolean("server", False)
        flag = ",server=on" if server else ""
        if isinstance(channel, SocketChannel):
            if channel.sock.family == socket.AF_UNIX:
                return f"{self._where()}{flag}"
            with contextlib.suppress(OSError):  # it has just gone
                ours, theirs = channel.sock.getsockname(), channel.sock.getpeername()
                return f"{self._protocol}:{_joined(ours)}{flag} <-> {_joined(theirs)}"
        return f"disconnected:{self._where()}{flag}"

    @property
    def _protocol(self) -> str:
        return "telnet" if self._params.boolean("telnet", False) else "tcp"

    @abstractmethod
    def _where(self) -> str:
        """The address as QEMU writes it."""


def _joined(address: tuple[Any, ...]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Server(_SocketEndpoint):
    """Listens, and serves one client at a time; with `wait`, `start` ends when one is there."""

    def __init__(self, label: str, params: Params, say: Say) -> None:
        super().__init__(label, params, say)
        self._listeners: list[socket.socket] = []
        self._first: asyncio.Future[None] | None = None
        self._made: tuple[str, int] | None = None  # path and inode of a socket in the file system

    async def start(self) -> None:
        for listener in await self.listen():
            listener.setblocking(False)
        loop = asyncio.get_running_loop()
        self._first = loop.create_future()
        if (sock := self.found.socket("socket")) is not None:
            self._first.set_result(None)
            self.came(self._known(sock))
        else:
            self._accept(True)
        if self._params.boolean("wait", True):
            if not self._first.done():
                self.say_waiting()
            await self._first

    def save(self, saver: Saver) -> dict[str, Any]:
        for number, listener in enumerate(self._listeners):
            saver.fd(f"listener{number}", listener.fileno(), outlives=True)
        return {"listeners": len(self._listeners), "made": list(self._made) if self._made else None}

    async def load(
        self, data: dict[str, Any], channel: dict[str, Any] | None, loader: Loader
    ) -> Channel | None:
        await self.load_listeners(data, loader)
        self._first = None
        again = self._load_channel(channel, loader)
        self._accept(again is None)
        return again

    async def load_listeners(self, data: dict[str, Any], loader: Loader) -> list[socket.socket]:
        """The listening sockets that another process had; new ones where they are lost."""
        found = [loader.socket(f"listener{number}") for number in range(data["listeners"])]
        self._listeners = [sock for sock in found if sock is not None]
        self._made = None if data["made"] is None else (data["made"][0], data["made"][1])
        if not self._listeners:
            await self.listen()
        for listener in self._listeners:
            listener.setblocking(False)
        return self._listeners

    async def listen(self) -> list[socket.socket]:
        """The listening sockets, for who serves and closes them by itself: see `remove_path`."""
        fd = self._params.get("fd")
        if self._find():
            pass
        elif fd is not None:
            self._listeners = [_given(fd)]
        elif self._params.get("path") is not None:
            self._listeners = [self._listen_unix()]
        else:
            self._listeners = await self._listen_inet()
        return self._listeners

    def _find(self) -> bool:
        """The sockets that are listening already, unless a path of theirs is gone."""
        while (sock := self.found.socket(f"listener{len(self._listeners)}")) is not None:
            self._listeners.append(sock)
        path = self._params.get("path")
        if path is not None and self._listeners and not self._params.boolean("abstract", False):
            try:
                self._made = (path, os.stat(path).st_ino)
            except OSError:
                self._listeners.pop().close()
        return bool(self._listeners)

    def say_waiting(self) -> None:
        self._say(f"QEMU waiting for connection on: disconnected:{self._where()},server=on")

    def left(self) -> None:
        self._accept(True)

    def close(self) -> None:
        self._accept(False)
        for listener in self._listeners:
            listener.close()
        self._listeners = []
        self.remove_path()

    def remove_path(self) -> None:
        """That of a socket in the file system, if it is still ours, and not for another."""
        if self._made and not self.spared:
            path, inode = self._made
            self._made = None
            with contextlib.suppress(OSError):
                if os.stat(path).st_ino == inode:
                    os.unlink(path)

    def identity(self) -> dict[str, Any]:
        return {
            "address": self._where(),
            "cookies": [socket_cookie(listener) for listener in self._listeners],
        }

    def _accept(self, wanted: bool) -> None:
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            if wanted:
                loop.add_reader(listener, self._ready, listener)
            else:
                loop.remove_reader(listener)

    def _ready(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as error:  # it has gone again
            if error.errno in OUT_OF_ROOM:
                self._accept(False)
                asyncio.get_running_loop().call_later(ACCEPT_PAUSE, self._accept, True)
            return
        self._accept(False)
        if self._first and not self._first.done():
            self._first.set_result(None)
        self.came(self._channel(sock))

    def _where(self) -> str:
        path = self._params.get("path")
        if path is not None:
            flags = ""
            if self._params.boolean("abstract", False):
                flags = ",abstract=on" + (",tight=on" * self._params.boolean("tight", True))
            return f"unix:{self._made[0] if self._made else path}{flags}"
        if not self._listeners:
            return f"{self._protocol}:{self._params.get('host')}:{self._params.get('port')}"
        name = self._listeners[0].getsockname()
        if self._listeners[0].family == socket.AF_UNIX:
            return f"unix:{_printable(name)}"
        return f"{self._protocol}:{name[0]}:{name[1]}"

    def _listen_unix(self) -> socket.socket:
        address, path = _unix_address(self._params)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            if path is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
            sock.bind(address)
            sock.listen(_BACKLOG)
        except OSError as error:
            sock.close()
            raise SegueError(
                f"Failed to bind socket to {_printable(address)}: {error.strerror}", advice(error)
            ) from None
        if path is not None:
            self._made = (path, os.stat(path).st_ino)
        return sock

    async def _listen_inet(self) -> list[socket.socket]:
        """A listener on each address of the name, as QEMU; one that works is enough."""
        params = self._params
        host, port = params.get("host") or None, params.get("port")
        if port is None:
            raise SegueError("chardev: socket: no port given")
        family = address_family(params)
        flags = [params.boolean(key, False) if key in params else None for key in ("ipv4", "ipv6")]
        dual = flags in ([None, None], [True, True])
        listeners: list[socket.socket] = []
        failure: SegueError | None = None
        for found in await resolve(host, port, family, socket.SOCK_STREAM, socket.AI_PASSIVE):
            try:
                listeners.append(_bind(found[0], found[4], params.number("to", 0), dual))
            except SegueError as error:
                failure = error
        if not listeners:
            raise failure or SegueError("Failed to create a socket")
        return listeners


class Client(_SocketEndpoint):
    """Connects at start; with `reconnect`, until it succeeds and again whenever it is lost."""

    def __init__(self, label: str, params: Params, say: Say) -> None:
        super().__init__(label, params, say)
        self._pause = params.number("reconnect", 0) + params.number("reconnect-ms", 0) / 1000
        self._trying: asyncio.Task[None] | None = None

    async def start(self) -> None:
        if (sock := self.found.socket("socket")) is not None:
            self.came(self._known(sock))
        elif self._pause:
            self._trying = asyncio.create_task(self._try(0))
        else:
            self.came(self._channel(await self._connect()))

    async def load(
        self, data: dict[str, Any], channel: dict[str, Any] | None, loader: Loader
    ) -> Channel | None:
        again = self._load_channel(channel, loader)
        if again is None:
            self.left()
        return again

    def left(self) -> None:
        if self._pause:
            self._trying = asyncio.create_task(self._try(self._pause))

    def close(self) -> None:
        if self._trying:
            self._trying.cancel()
            self._trying = None

    def identity(self) -> dict[str, Any]:
        return {"address": self._where()}

    def _where(self) -> str:
        get = self._params.get
        if get("fd"):
            return f"fd:{get('fd')}"
        path = get("path")
        return f"unix:{path}" if path else f"{self._protocol}:{get('host')}:{get('port')}"

    async def _try(self, pause: float) -> None:
        told = False
        while True:
            await asyncio.sleep(pause)
            try:
                sock = await self._connect()
                break
            except SegueError as error:
                if not told:
                    self._say(f"Unable to connect character device {self._label}: {error.what}")
                told = True
                pause = self._pause
        self._trying = None
        self.came(self._channel(sock))

    async def _connect(self) -> socket.socket:
        fd = self._params.get("fd")
        if fd is not None:
            return _given(fd)
        addresses: list[tuple[socket.AddressFamily, Any]]
        if self._params.get("path") is not None:
            addresses = [(socket.AF_UNIX, _unix_address(self._params)[0])]
        else:
            found = await resolve(
                self._params.get("host") or None,
                self._params.get("port") or "",
                address_family(self._params),
                socket.SOCK_STREAM,
            )
            addresses = [(one[0], one[4]) for one in found]
        reason: str | None = None
        for family, address in addresses:
            try:
                sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            except OSError as error:
                reason = error.strerror
                continue
            sock.setblocking(False)
            try:
                await asyncio.get_running_loop().sock_connect(sock, address)
            except OSError as error:
                sock.close()
                # asyncio's own text has the address in it
                reason = os.strerror(error.errno) if error.errno else str(error)
            except BaseException:
                sock.close()
                raise
            else:
                return sock
        name = self._params.get("path") or self._where().removeprefix(f"{self._protocol}:")
        raise SegueError(f"Failed to connect to '{name}': {reason}")


def _bind(
    family: socket.AddressFamily, address: tuple[Any, ...], to: int, dual: bool
) -> socket.socket:
    """Bind the first free port from the address's own to `to`. Raises SegueError."""
    host, first, *rest = address
    for port in range(first, max(first, to) + 1):
        try:
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        except OSError as error:
            raise SegueError(f"Failed to create a socket: {error.strerror}") from None
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual)
            sock.bind((host, port, *rest))
            sock.listen(_BACKLOG)
        except OSError as error:
            sock.close()
            if error.errno != errno.EADDRINUSE:
                what = f"Failed to bind socket: {error.strerror}"
                raise SegueError(what, advice(error)) from None
        else:
            return sock
    raise SegueError(
        "Failed to find an available port: Address already in use",
        f"port {first} of {host} is taken",
    )


def _unix_address(params: Params) -> tuple[str | bytes, str | None]:
    """The address to bind or connect to, and its path unless it is abstract."""
    path = params.get("path") or ""
    raw = os.fsencode(path)
    abstract = params.boolean("abstract", False)
    if len(raw) > _SUN_PATH - (1 if abstract else 0):
        raise SegueError(
            f"UNIX socket path '{path}' is too long",
            f"Path must be less than {_SUN_PATH} bytes",
        )
    if not abstract:
        return path, path
    name = b"\0" + raw
    return (name if params.boolean("tight", True) else name.ljust(_SUN_PATH, b"\0")), None


def _given(text: str) -> socket.socket:
    """A socket that the supervisor inherited."""
    try:
        if not stat.S_ISSOCK(os.fstat(int(text)).st_mode):
            raise SegueError(f"File descriptor '{text}' is not a socket")
    except (ValueError, OSError):
        raise SegueError(
            f"Invalid file descriptor '{text}'", "it must be open in the caller of segue run"
        ) from None
    os.set_inheritable(int(text), False)
    return socket.socket(fileno=int(text))


def _printable(address: str | bytes) -> str:
    return os.fsdecode(address).lstrip("\0")
