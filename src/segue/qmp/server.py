"""The QMP server of a machine: what clients talk to instead of QEMU's own.

It answers Segue's commands itself and relays the rest to the instance of the moment, through the
gate. Any number of clients; each one's commands are answered in their order, one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from segue.errors import MonitorClosed, SegueError
from segue.qmp.client import Client, encode
from segue.qmp.commands import (
    EVENTS,
    BadArguments,
    Command,
    check_arguments,
    error,
    error_of,
    schema,
)
from segue.qmp.framing import Parsed
from segue.qmp.gate import Gate, Passage, is_read_only

__all__ = ["Client", "Command", "QmpServer"]

_MEMBERS = ("execute", "exec-oob", "arguments", "id")


class Upstream(Protocol):
    """The instance that relayed commands go to."""

    greeting: dict[str, Any]

    def relay(
        self, message: dict[str, Any], fds: list[int] = ...
    ) -> asyncio.Future[dict[str, Any]]: ...


class QmpServer:
    """`upstream` may be replaced at any time; commands that wait at the gate go to the new one."""

    def __init__(self, commands: Mapping[str, Command], gate: Gate) -> None:
        self.upstream: Upstream | None = None
        self._commands = commands
        self._gate = gate
        self._clients: set[Client] = set()
        self._listeners: list[socket.socket] = []
        self._paths: list[Path] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: dict[Passage, list[int]] = {}

    def listen_unix(self, path: Path) -> None:
        """Serve on a new Unix socket that is for its owner alone."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        os.chmod(path, 0o600)
        listener.listen(128)
        self._paths.append(path)
        self.adopt_listener(listener)

    def adopt_listener(self, listener: socket.socket, pretty: bool = False) -> None:
        listener.setblocking(False)
        self._listeners.append(listener)
        loop = asyncio.get_running_loop()
        loop.add_reader(listener.fileno(), self._accept, listener, pretty)

    def adopt(self, sock: socket.socket, pretty: bool = False) -> Client:
        """Serve a connection; it is greeted now."""
        client = Client(sock, self._request, self._clients.discard, pretty)
        self._clients.add(client)
        client.send(self._greeting())
        return client

    def event(self, name: str, data: dict[str, Any]) -> None:
        """Tell every client of an event of Segue's own, now."""
        now = time.time()
        stamp = {"seconds": int(now), "microseconds": int(now % 1 * 1e6)}
        self.emit({"timestamp": stamp, "event": name, "data": data})

    def emit(self, event: dict[str, Any]) -> None:
        """Tell every client that has negotiated; encoded once for all of them."""
        data = encode(event)
        for client in tuple(self._clients):
            if client.negotiated:
                client.send_bytes(encode(event, True) if client.pretty else data)

    def close(self) -> None:
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            loop.remove_reader(listener.fileno())
            listener.close()
        for path in self._paths:
            path.unlink(missing_ok=True)
        for client in tuple(self._clients):
            client.close()
        for fds in self._waiting.values():
            _close_all(fds)
        for task in self._tasks:
            task.cancel()

    def _accept(self, listener: socket.socket, pretty: bool) -> None:
        with contextlib.suppress(OSError):
            self.adopt(listener.accept()[0], pretty)

    def _greeting(self) -> dict[str, Any]:
        return dict(self.upstream.greeting) if self.upstream else {}

    def _request(self, client: Client, parsed: Parsed, fds: list[int]) -> None:
        message = parsed.value
        if parsed.error is not None:
            _close_all(fds)
            client.send(error(parsed.error))
            if parsed.fatal:
                client.close()
            else:
                client.done()
            return
        if (wrong := _malformed(message)) is not None:
            _close_all(fds)
            self._answer(client, message, error(wrong))
            return
        name = message.get("execute", message.get("exec-oob"))
        arguments = message.get("arguments", {})
        if not client.negotiated or name == "qmp_capabilities":
            _close_all(fds)
            self._answer(client, message, self._negotiate(client, name, arguments))
        elif name in self._commands:
            _close_all(fds)
            self._start(self._own(client, message, self._commands[name], arguments))
        else:
            self._relay(client, message, name, arguments, fds)

    def _answer(self, client: Client, message: Any, reply: dict[str, Any]) -> None:
        if isinstance(message, dict) and "id" in message:
            reply = {**reply, "id": message["id"]}
        client.send(reply)
        if not (isinstance(message, dict) and "exec-oob" in message):
            client.done()

    def _negotiate(self, client: Client, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if client.negotiated:
            return error(
                "Capabilities negotiation is already complete, command ignored", "CommandNotFound"
            )
        if name != "qmp_capabilities":
            return error(
                "Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"
            )
        wanted = arguments.get("enable", [])
        offered = self._greeting().get("QMP", {}).get("capabilities", [])
        if missing := [c for c in wanted if c not in offered]:
            return error(f"Capability '{missing[0]}' is not available")
        client.out_of_band = "oob" in wanted
        client.negotiated = True
        return {"return": {}}

    async def _own(
        self, client: Client, message: dict[str, Any], command: Command, arguments: dict[str, Any]
    ) -> None:
        try:
            check_arguments(command.arguments, arguments)
            reply = {"return": await command.handler(arguments, client)}
        except BadArguments as wrong:
            reply = error(str(wrong))
        except SegueError as failure:
            reply = error_of(failure)
        except OSError as failure:
            reply = error(f"{failure.strerror or failure}")
        self._answer(client, message, reply)

    def _relay(
        self, client: Client, message: dict[str, Any], name: str, arguments: Any, fds: list[int]
    ) -> None:
        passage = Passage(name, is_read_only(name, arguments), lambda: None, "exec-oob" in message)
        self._waiting[passage] = fds
        passage.start = partial(self._send, client, message, name, passage)
        self._gate.enter(passage)

    def _send(self, client: Client, message: dict[str, Any], name: str, passage: Passage) -> None:
        fds = self._waiting.pop(passage)
        assert self.upstream is not None
        bare = {key: value for key, value in message.items() if key != "id"}
        answer = self.upstream.relay(bare, fds)
        answer.add_done_callback(partial(self._answered, client, message, name, passage, fds))

    def _answered(
        self,
        client: Client,
        message: dict[str, Any],
        name: str,
        passage: Passage,
        fds: list[int],
        answer: asyncio.Future[dict[str, Any]],
    ) -> None:
        _close_all(fds)
        self._gate.leave(passage)
        if answer.cancelled() or isinstance(answer.exception(), MonitorClosed):
            reply = error("QEMU ended: it is not known whether the command was carried out")
        else:
            reply = self._with_ours(name, answer.result())
        self._answer(client, message, reply)

    def _with_ours(self, name: str, reply: dict[str, Any]) -> dict[str, Any]:
        """QEMU's lists of what there is, with Segue's own."""
        if "return" not in reply:
            return reply
        if name == "query-commands":
            reply["return"] += [{"name": command} for command in self._commands]
        elif name == "query-qmp-schema":
            known = {entry["name"] for entry in reply["return"]}
            reply["return"] += schema(self._commands.values(), EVENTS, known)
        return reply

    def _start(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _malformed(message: Any) -> str | None:
    """QEMU's words for what is no command (qapi/qmp-dispatch.c, QEMU 7.2)."""
    if not isinstance(message, dict):
        return "QMP input must be a JSON object"
    for key in message:
        if key not in _MEMBERS:
            return f"QMP input member '{key}' is unexpected"
    for key in ("execute", "exec-oob"):
        if key in message and not isinstance(message[key], str):
            return f"QMP input member '{key}' must be a string"
    if "execute" in message and "exec-oob" in message:
        return "QMP input member 'exec-oob' clashes with 'execute'"
    if "execute" not in message and "exec-oob" not in message:
        return "QMP input lacks member 'execute'"
    if not isinstance(message.get("arguments", {}), dict):
        return "QMP input member 'arguments' must be an object"
    return None


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
    fds.clear()
