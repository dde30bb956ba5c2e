"""A machine's QMP server without a machine: a fake instance behind it, clients before it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

from segue.errors import MonitorClosed, Refused
from segue.qmp.client import Client
from segue.qmp.commands import Command
from segue.qmp.server import QmpServer

GREETING = {
    "QMP": {
        "version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""},
        "capabilities": ["oob"],
    }
}
SCHEMA: list[dict[str, Any]] = [
    {"name": "query-status", "meta-type": "command", "arg-type": "0", "ret-type": "1"},
    {"name": "STOP", "meta-type": "event", "arg-type": "0"},
    {"name": "str", "meta-type": "builtin", "json-type": "string"},
    {"name": "0", "meta-type": "object", "members": []},
]


class Instance:
    """An upstream. Answers at once, or, for commands that begin with `slow`, when told to."""

    def __init__(self, name: str = "first") -> None:
        self.name = name
        self.greeting: dict[str, Any] = GREETING
        self.seen: list[dict[str, Any]] = []
        self.inodes: list[int] = []
        self.pending: list[asyncio.Future[dict[str, Any]]] = []
        self.arrived = asyncio.Event()

    def relay(self, message: dict[str, Any], fds: list[int]) -> asyncio.Future[dict[str, Any]]:
        self.seen.append(message)
        self.inodes += [os.fstat(fd).st_ino for fd in fds]
        self.arrived.set()
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        name = _name(message)
        if name.startswith("slow"):
            self.pending.append(future)
        elif name == "query-commands":
            future.set_result({"return": [{"name": "query-status"}]})
        elif name == "query-qmp-schema":
            future.set_result({"return": [dict(entry) for entry in SCHEMA]})
        elif name == "big":
            future.set_result({"return": "x" * message["arguments"]["size"]})
        else:
            future.set_result({"return": {"by": self.name, "command": name}})
        return future

    @property
    def commands(self) -> list[str]:
        return [_name(message) for message in self.seen]

    def answer(self) -> None:
        """Answer the oldest of what is slow."""
        self.pending.pop(0).set_result({"return": {"by": self.name}})

    def die(self) -> None:
        for future in self.pending:
            future.set_exception(MonitorClosed("QEMU's monitor was closed"))
        self.pending.clear()


def _name(message: dict[str, Any]) -> str:
    return str(message.get("execute") or message["exec-oob"])


class Peer:
    """The other end of one client's connection: raw bytes and one message after the other."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.data = b""

    async def send(self, *messages: dict[str, Any] | bytes) -> None:
        data = b"".join(m if isinstance(m, bytes) else json.dumps(m).encode() for m in messages)
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def receive(self) -> Any:
        """The next message; None at the end of the stream."""
        while b"\n" not in self.data:
            try:
                chunk = await asyncio.get_running_loop().sock_recv(self.sock, 1 << 20)
            except ConnectionResetError:
                chunk = b""
            if not chunk:
                return None
            self.data += chunk
        line, _, self.data = self.data.partition(b"\n")
        return json.loads(line)

    async def call(self, *messages: dict[str, Any] | bytes) -> Any:
        await self.send(*messages)
        return await self.receive()

    async def negotiate(self, *capabilities: str) -> Peer:
        assert await self.receive() == GREETING
        arguments = {"enable": list(capabilities)}
        reply = await self.call({"execute": "qmp_capabilities", "arguments": arguments})
        assert reply == {"return": {}}
        return self

    def close(self) -> None:
        self.sock.close()


class World:
    """The server, its instance, and whoever connects. An asynchronous context manager."""

    def __init__(self, **options: Any) -> None:
        self.instance = Instance()
        self.server = QmpServer(own_commands(), **options)
        self.server.upstream = self.instance
        self.peers: list[Peer] = []

    async def __aenter__(self) -> World:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.server.close()
        for peer in self.peers:
            peer.close()
        await asyncio.sleep(0)

    def connect(self, **options: Any) -> Peer:
        ours, theirs = socket.socketpair()
        self.server.adopt(ours, **options)
        return self.peer(theirs)

    def peer(self, sock: socket.socket) -> Peer:
        self.peers.append(Peer(sock))
        return self.peers[-1]

    async def client(self, *capabilities: str) -> Peer:
        return await self.connect().negotiate(*capabilities)


def own_commands() -> Mapping[str, Command]:
    async def hello(arguments: dict[str, Any], client: Client) -> Any:
        return {"hello": arguments["name"], "times": arguments.get("times", 1)}

    async def refuse(arguments: dict[str, Any], client: Client) -> Any:
        raise Refused("this cannot be", hint="do that", guest="running")

    async def fail(arguments: dict[str, Any], client: Client) -> Any:
        raise ZeroDivisionError("a bug")

    members = {"name": (str, True), "times": (int, False), "loud": (bool, False)}
    commands = [
        Command("segue-hello", hello, members, read_only=True),
        Command("segue-refuse", refuse),
        Command("segue-fail", fail),
    ]
    return {command.name: command for command in commands}


def run(test: Coroutine[Any, Any, None]) -> None:
    """With a limit, so that what never comes fails the test."""

    async def limited() -> None:
        async with asyncio.timeout(20):
            await test

    asyncio.run(limited())


def path_in(directory: Path) -> Path:
    return directory / "qmp.sock"
