"""The examples, upgraded in place under a hundred live connections: nothing is lost or doubled."""

from __future__ import annotations

import os
import re
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
CONNECTIONS = 100
UPGRADES = 4
# Neither lines nor frames end where a piece does.
PIECE = 37


class Service:
    """An example that runs from a copy of its file, which can be changed under it."""

    def __init__(self, name: str, directory: Path) -> None:
        self.path = directory / name
        shutil.copy(EXAMPLES / name, self.path)
        self.source = self.path.read_text()
        self.process = subprocess.Popen(
            [sys.executable, str(self.path), "0"], stdout=subprocess.PIPE, text=True
        )
        started = self.said()
        found = re.fullmatch(r"version 1 on port (\d+), process (\d+)", started)
        assert found, started
        self.port = int(found[1])
        assert int(found[2]) == self.process.pid

    def said(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip()

    def install(self, version: int, extra: str = "") -> None:
        text = self.source.replace("VERSION = 1\n", f"VERSION = {version}\n") + extra
        self.path.write_text(text)

    def upgrade(self) -> None:
        self.process.send_signal(signal.SIGHUP)

    def runs(self, version: int) -> str:
        return f"version {version} on port {self.port}, process {self.process.pid}"

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@contextmanager
def running(name: str, directory: Path) -> Iterator[Service]:
    service = Service(name, directory)
    try:
        yield service
    finally:
        service.process.kill()
        service.process.wait()
        assert service.process.stdout is not None
        service.process.stdout.close()


class Client:
    """Sends `outgoing` in small pieces, and keeps all that comes."""

    def __init__(self, port: int, outgoing: bytes, expected: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.setblocking(False)
        self.outgoing = outgoing
        self.sent = 0
        self.expected = expected
        self.received = bytearray()

    def step(self, events: int, limit: int) -> None:
        if events & selectors.EVENT_READ:
            data = self.sock.recv(65536)
            assert data, f"cut off after {len(self.received)} of {self.expected} bytes"
            self.received += data
        if events & selectors.EVENT_WRITE:
            piece = self.outgoing[self.sent : min(limit, self.sent + PIECE)]
            self.sent += self.sock.send(piece)


def exchange(clients: list[Client], service: Service, done: Callable[[Client], bool]) -> None:
    """Let all clients send and receive all that they have to, through UPGRADES upgrades.

    Each upgrade falls into its own part of the stream: it begins when the part before has been
    sent, and only its own part is sent until it is over.
    """
    assert service.process.stdout is not None
    both = selectors.EVENT_READ | selectors.EVENT_WRITE
    with selectors.DefaultSelector() as selector:
        selector.register(service.process.stdout, selectors.EVENT_READ)
        for client in clients:
            selector.register(client.sock, both, client)
        version, under_way = 1, False
        waiting = set(clients)
        while waiting or under_way or version <= UPGRADES:
            ready = selector.select(60)
            assert ready, f"nothing comes any more; {len(waiting)} clients wait"
            for key, events in ready:
                if key.data is None:
                    assert service.said() == service.runs(version)
                    under_way = False
                    for client in clients:
                        selector.modify(client.sock, both, client)
                    continue
                client = key.data
                limit = len(client.outgoing) * (version + (not under_way)) // (UPGRADES + 1)
                client.step(events, min(limit, len(client.outgoing)))
                if client.sent >= limit:
                    selector.modify(client.sock, selectors.EVENT_READ, client)
                if done(client):
                    waiting.discard(client)
            sent = sum(client.sent for client in clients)
            total = sum(len(client.outgoing) for client in clients)
            part = total * version // (UPGRADES + 1) - len(clients)
            if not under_way and version <= UPGRADES and sent >= part:
                version += 1
                service.install(version)
                service.upgrade()
                under_way = True
                for client in clients:
                    selector.modify(client.sock, both, client)


def test_chat(tmp_path: Path) -> None:
    lines = 30
    total = CONNECTIONS * lines
    with running("chat.py", tmp_path) as service, ExitStack() as stack:
        clients = []
        for number in range(CONNECTIONS):
            text = "".join(f"line {line}\r\n" for line in range(lines))
            client = Client(service.port, f"client{number}\n{text}".encode(), total)
            stack.callback(client.sock.close)
            clients.append(client)
        # Wait until all are in the room: who comes later does not hear what was said before.
        while service.descriptors() < CONNECTIONS + 6:
            pass

        def done(client: Client) -> bool:
            return client.received.count(b"\n") >= total

        exchange(clients, service, done)
        heard = clients[0].received
        assert all(client.received == heard for client in clients)
        rows = heard.decode().splitlines()
        assert [int(row.split()[0]) for row in rows] == list(range(1, total + 1))
        for number in range(CONNECTIONS):
            said = [row.split(": ")[1] for row in rows if f" client{number}: " in row]
            assert said == [f"line {line}" for line in range(lines)]


def frame(payload: bytes, opcode: int = 2) -> bytes:
    key = bytes([7, 1, 255, 4])
    length = len(payload)
    head = (
        struct.pack("!BB", 0x80 | opcode, 0x80 | length)
        if length < 126
        else struct.pack("!BBH", 0x80 | opcode, 0x80 | 126, length)
    )
    masked = bytes(byte ^ key[at % 4] for at, byte in enumerate(payload))
    return head + key + masked


def unmasked(payload: bytes, opcode: int = 2) -> bytes:
    length = len(payload)
    if length < 126:
        return struct.pack("!BB", 0x80 | opcode, length) + payload
    return struct.pack("!BBH", 0x80 | opcode, 126, length) + payload


def test_websocket_echo(tmp_path: Path) -> None:
    request = (
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    # The example of RFC 6455.
    reply = (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
    )
    with running("websocket_echo.py", tmp_path) as service, ExitStack() as stack:
        clients, expected = [], {}
        for number in range(CONNECTIONS):
            payloads = [f"{number} {n} ".encode() * (1 + n % 40) for n in range(60)]
            outgoing = request + b"".join(map(frame, payloads)) + frame(b"still there?", 9)
            echoed = reply + b"".join(map(unmasked, payloads)) + unmasked(b"still there?", 10)
            client = Client(service.port, outgoing, len(echoed))
            stack.callback(client.sock.close)
            clients.append(client)
            expected[client] = echoed

        def done(client: Client) -> bool:
            return len(client.received) >= client.expected

        exchange(clients, service, done)
        for client in clients:
            assert client.received == expected[client]


@pytest.mark.parametrize("name", ["chat.py", "websocket_echo.py"])
def test_a_newer_file_that_is_broken_changes_nothing(name: str, tmp_path: Path) -> None:
    with running(name, tmp_path) as service:
        with socket.create_connection(("127.0.0.1", service.port)) as client:
            client.sendall(b"GET / HTTP/1.1\r\n")
            for broken, reason in (
                ("\nsyntax error\n", "SyntaxError"),
                ("\nimport no_such_module\n", "No module named 'no_such_module'"),
            ):
                # Python reads all of the file before it runs any of it; the import comes last,
                # after main(): it is moved to the top.
                service.path.write_text(
                    service.source.replace("import asyncio\n", f"import asyncio\n{broken}")
                )
                service.upgrade()
                said = service.said()
                assert said.startswith("not upgraded: ")
                assert reason in said
            service.install(2)
            service.upgrade()
            assert service.said() == service.runs(2)
            # Half a request had been sent, and is still there: the rest completes it.
            client.sendall(b"\r\n")
            assert client.recv(100) if name != "chat.py" else True
