"""A bed for brokers: instances without QEMU, and the life of a machine."""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import socket
import struct
import termios
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from segue.kept.base import Lending
from segue.kept.broker import Broker
from segue.kept.chardev import make
from segue.qemu.binary import Binary
from segue.qemu.chardevs import from_compat
from segue.qemu.options import Params

LIMIT = 5.0  # seconds until a test that hangs is told to be one


def lending(number: int) -> Lending:
    return Lending(number, cast(Binary, SimpleNamespace()))


class Instance:
    """What QEMU is to a broker: a process that has inherited the other end of a pair.

    What it reads is the guest's, as the state that a real one saves would hold it.
    """

    def __init__(self, broker: Broker, number: int) -> None:
        self.broker = broker
        self.number = number
        lent = lending(number)
        (_, self.argument) = broker.arguments(lent)
        self.inherited = {fd: os.dup(fd) for fd in lent.descriptors}
        fd = Params.parse(self.argument, "backend").get("fd")
        if fd is not None:
            self.sock = socket.socket(fileno=os.dup(int(fd)))
        else:  # `null`: nobody is there
            self.sock, other = socket.socketpair()
            other.close()
        self.sock.setblocking(False)

    def read(self, size: int = 65536) -> bytes:
        try:
            return self.sock.recv(size)
        except (BlockingIOError, ConnectionError):
            return b""

    async def expect(self, data: bytes) -> None:
        """Exactly this arrives next."""
        got = bytearray()

        def enough() -> bool:
            got.extend(self.read(len(data) - len(got)))
            return len(got) >= len(data)

        await until(enough)
        assert bytes(got) == data

    async def read_until(self, end: bytes) -> bytes:
        got = bytearray()

        def enough() -> bool:
            got.extend(self.read())
            return got.endswith(end)

        await until(enough)
        return bytes(got)

    def write(self, data: bytes) -> int:
        try:
            return self.sock.send(data)
        except BlockingIOError:
            return 0

    def die(self) -> None:
        if not self.inherited:
            return
        self.sock.close()
        for fd in self.inherited.values():
            os.close(fd)
        self.inherited.clear()
        self.broker.drop(self.number)


def broker_for(text: str, **flags: Any) -> Broker:
    chardev = from_compat(text, "serial0")
    assert chardev is not None
    kept = make(chardev, **flags)
    assert isinstance(kept, Broker)
    return kept


async def turns(count: int = 3) -> None:
    """Let the loop see what is ready."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], Any], limit: float = LIMIT) -> Any:
    """Let the loop run until it holds. Its value is returned."""
    end = time.monotonic() + limit
    while not (value := condition()):
        assert time.monotonic() < end, "it never happened"
        await asyncio.sleep(0)
    return value


class Client:
    """A plain socket client that never waits by itself."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.received = bytearray()

    @classmethod
    def unix(cls, path: Path) -> Client:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        return cls(sock)

    def write(self, data: bytes) -> int:
        try:
            return self.sock.send(data)
        except BlockingIOError:
            return 0

    def read(self, size: int = 65536) -> bytes | None:
        """None at the end."""
        try:
            data = self.sock.recv(size)
        except BlockingIOError:
            return b""
        except ConnectionError:
            return None
        self.received += data
        return data or None

    async def expect(self, data: bytes) -> None:
        """Exactly this arrives next."""

        def enough() -> bool:
            self.read(len(data) - len(self.received))
            return len(self.received) >= len(data)

        await until(enough)
        assert bytes(self.received) == data
        self.received.clear()

    async def ended(self) -> None:
        await until(lambda: self.read() is None)

    def close(self) -> None:
        self.sock.close()


@dataclass
class Bed:
    """A broker on a listening socket, with a client; all that was made is closed in the end."""

    broker: Broker
    path: Path
    instances: list[Instance] = field(default_factory=list)
    clients: list[Client] = field(default_factory=list)

    def instance(self, number: int) -> Instance:
        self.instances.append(Instance(self.broker, number))
        return self.instances[-1]

    async def client(self) -> Client:
        self.clients.append(Client.unix(self.path))
        await until(lambda: self.broker.connected)
        return self.clients[-1]


@asynccontextmanager
async def bed(directory: Path, options: str = "", **flags: Any) -> AsyncIterator[Bed]:
    broker = broker_for(f"unix:{directory}/s,server=on,wait=off{options}", **flags)
    await broker.start()
    made = Bed(broker, directory / "s")
    try:
        yield made
    finally:
        for client in made.clients:
            client.close()
        for instance in made.instances:
            instance.die()
        broker.close()


class Numbered:
    """A stream in which every four bytes tell their place, written in random pieces."""

    def __init__(self, chance: random.Random, size: int) -> None:
        self.data = b"".join(n.to_bytes(4, "big") for n in range(size // 4))
        self.at = 0
        self._chance = chance

    def push(self, write: Callable[[bytes], int], most: int = 3000) -> None:
        piece = self.data[self.at : self.at + self._chance.randrange(1, most)]
        if piece:
            self.at += write(piece)

    @property
    def done(self) -> bool:
        return self.at == len(self.data)


@contextmanager
def no_leak() -> Iterator[None]:
    """Every descriptor that was opened is closed again."""
    before = _descriptors()
    yield
    assert _descriptors() == before


def _descriptors() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the one that listdir used
            continue
    return found


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Run a test in a loop of its own, and see that nothing is left of it."""

    async def bounded() -> None:
        async with asyncio.timeout(LIMIT):
            await main()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left

    with no_leak():
        asyncio.run(bounded())


async def arrives(fd: int, data: bytes) -> None:
    def available() -> int:
        return int(struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0" * 4))[0])

    await until(lambda: available() >= len(data))
    assert os.read(fd, 1000) == data
