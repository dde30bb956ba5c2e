#!/usr/bin/env python3
"""A chat server that is upgraded under its clients, who notice nothing.

    python examples/chat.py 7000        then, from elsewhere: nc localhost 7000
    kill -HUP PID                       runs this file again, as it is now, in the same process

The first line that a client sends is its name. Every line after that goes to everybody, numbered.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from dataclasses import dataclass
from typing import Any

from segue.cpr import CprError, State, restart, resumed, section
from segue.cpr.aio import Protocol, Server, ServerState, ask

VERSION = 1
PORT = int(sys.argv[1]) if sys.argv[1:] else 7000
# A client who does not read is dropped in the end, or its lines would fill our memory.
MAX_UNSENT = 4 << 20


@section("chat", version=1)
@dataclass(frozen=True)
class ChatState:
    """What lives on. To add a field: give it a default, and raise `version`, not `oldest`."""

    server: ServerState
    lines: int


class Client(Protocol):
    def __init__(self, chat: Chat) -> None:
        super().__init__()
        self.chat = chat
        self.name: str | None = None

    def data_received(self) -> None:
        *lines, rest = self.unread.split(b"\n")
        self.unread[:] = rest
        for line in lines:
            text = line.decode(errors="replace").rstrip("\r")
            if self.name is None:
                self.name = text
            else:
                self.chat.say(self.name, text)

    def save(self) -> Any:
        return self.name

    def restored(self, data: Any) -> None:
        self.name = data


class Chat:
    def __init__(self, saved: ChatState | None, port: int) -> None:
        if saved is None:
            self.lines = 0
            self.server = Server(self.client, socket.create_server(("127.0.0.1", port)))
        else:
            self.lines = saved.lines
            self.server = Server.restore(saved.server, self.client)

    def client(self) -> Client:
        return Client(self)

    def say(self, name: str, text: str) -> None:
        self.lines += 1
        line = f"{self.lines} {name}: {text}\n".encode()
        for client in self.server.connections:
            client.write(line)
            if client.unsent > MAX_UNSENT:
                client.abort()

    def suspend(self) -> State:
        return State(ChatState(self.server.suspend(), self.lines))

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
        saved = arrival.load(ChatState).get(ChatState) if arrival else None
        chat = Chat(saved, PORT)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, upgrade.set)
    chat.server.start()
    port = chat.server.listeners[0].getsockname()[1]
    back = f", back again: {arrival.reason}" if arrival and arrival.reason else ""
    print(f"version {VERSION} on port {port}, process {os.getpid()}{back}", flush=True)
    while True:
        await upgrade.wait()
        upgrade.clear()
        await chat.upgrade()


if __name__ == "__main__":
    asyncio.run(main())
