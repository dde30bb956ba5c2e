#!/usr/bin/env python3
"""A WebSocket echo that is upgraded under its connections, in the middle of a frame if need be.

    python examples/websocket_echo.py 7001
    kill -HUP PID                       runs this file again, as it is now, in the same process

Every text or binary frame comes back; pings are answered. Just enough of RFC 6455 to show what a
protocol with a state of its own has to keep: one flag, as all the rest is in `unread`.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import signal
import socket
import struct
import sys
from dataclasses import dataclass
from typing import Any

from segue.cpr import CprError, State, restart, resumed, section
from segue.cpr.aio import Protocol, Server, ServerState, ask

VERSION = 1
PORT = int(sys.argv[1]) if sys.argv[1:] else 7001
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
LONGEST = 1 << 20
TEXT, CLOSE, PING, PONG = 1, 8, 9, 10
TOO_BIG = struct.pack("!H", 1009)


@section("websocket-echo", version=1)
@dataclass(frozen=True)
class EchoState:
    server: ServerState
    frames: int


class Connection(Protocol):
    def __init__(self, echo: Echo) -> None:
        super().__init__()
        self.echo = echo
        self.upgraded = False

    def save(self) -> Any:
        return self.upgraded

    def restored(self, data: Any) -> None:
        self.upgraded = data

    def data_received(self) -> None:
        if not self.upgraded and not self.handshake():
            return
        while (frame := self.frame()) is not None:
            first, payload = frame
            opcode = first & 15
            if opcode == CLOSE:
                self.send(first, payload)
                self.close()
                return
            if opcode == PING:
                self.send(first & 0xF0 | PONG, payload)
            elif opcode != PONG:
                self.echo.frames += 1
                self.send(first, payload)
        # A client who sends and does not read: wait for it, as it has to wait for us.
        if self.unsent > LONGEST:
            self.pause_reading()
            self.echo.wait_for(self)

    def handshake(self) -> bool:
        head, end, rest = bytes(self.unread).partition(b"\r\n\r\n")
        if not end:
            return False
        self.unread[:] = rest
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(b":") for line in head.split(b"\r\n")[1:])
        }
        key = headers.get(b"sec-websocket-key")
        if key is None:
            self.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            self.close()
            return False
        accept = base64.b64encode(hashlib.sha1(key + GUID, usedforsecurity=False).digest())
        self.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
        )
        self.upgraded = True
        return True

    def frame(self) -> tuple[int, bytes] | None:
        """The next frame that is complete: its first byte, and what it carries."""
        data = self.unread
        if len(data) < 2:
            return None
        length, start = data[1] & 127, 2
        if length >= 126:
            width = 2 if length == 126 else 8
            start += width
            if len(data) < start:
                return None
            length = int.from_bytes(data[2:start], "big")
        if length > LONGEST:
            self.send(0x80 | CLOSE, TOO_BIG)
            self.close()
            return None
        mask = start
        start += 4 if data[1] & 128 else 0
        if len(data) < start + length:
            return None
        payload = bytes(data[start : start + length])
        if start > mask:
            key = (bytes(data[mask:start]) * (length // 4 + 1))[:length]
            clear = int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")
            payload = clear.to_bytes(length, "big")
        first = data[0]
        del data[: start + length]
        return first, payload

    def send(self, first: int, payload: bytes) -> None:
        length = len(payload)
        if length < 126:
            head = struct.pack("!BB", first, length)
        elif length < 1 << 16:
            head = struct.pack("!BBH", first, 126, length)
        else:
            head = struct.pack("!BBQ", first, 127, length)
        self.write(head + payload)


class Echo:
    def __init__(self, saved: EchoState | None, port: int) -> None:
        self.tasks: set[asyncio.Task[None]] = set()
        if saved is None:
            self.frames = 0
            listener = socket.create_server(("127.0.0.1", port))
            self.server = Server(self.connection, listener)
        else:
            self.frames = saved.frames
            self.server = Server.restore(saved.server, self.connection)

    def start(self) -> None:
        self.server.start()
        for connection in self.server.connections:
            if connection.paused:
                self.wait_for(connection)

    def connection(self) -> Connection:
        return Connection(self)

    def wait_for(self, connection: Protocol) -> None:
        task = asyncio.create_task(self.resume(connection))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def resume(self, connection: Protocol) -> None:
        await connection.drain()
        connection.resume_reading()

    def suspend(self) -> State:
        return State(EchoState(self.server.suspend(), self.frames))

    async def upgrade(self) -> None:
        command = [sys.executable, *sys.argv]
        try:
            asked = self.suspend()
            self.server.start()
            await ask(asked, command)
            restart(self.suspend(), command, asked=True)
        except CprError as error:
            self.server.start()
            print(f"not upgraded: {error}", flush=True)


async def main() -> None:
    upgrade = asyncio.Event()
    with resumed() as arrival:
        saved = arrival.load(EchoState).get(EchoState) if arrival else None
        echo = Echo(saved, PORT)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, upgrade.set)
    echo.start()
    port = echo.server.listeners[0].getsockname()[1]
    back = f", back again: {arrival.reason}" if arrival and arrival.reason else ""
    print(f"version {VERSION} on port {port}, process {os.getpid()}{back}", flush=True)
    while True:
        await upgrade.wait()
        upgrade.clear()
        await echo.upgrade()


if __name__ == "__main__":
    asyncio.run(main())
