"""The QMP server: any number of clients, one instance behind it at a time.

To a client this is QEMU's own monitor: greeting, negotiation, order of answers, errors and their
texts (tests/qemu/test_qmp_errors.py compares). What QEMU knows is relayed to it through the gate;
`segue-*` commands are answered here. The instance behind may be replaced at any time
(`server.upstream = other`): clients stay connected, and what waits at the gate goes to the new one.

    client ── Framer ── Client ── QmpServer.dispatch ──┬── Gate ── Upstream.relay ── QEMU
                                                       └── a Command's handler

A relayed command costs no task, and its answer one parse and one print; an event is printed once
for all clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import mmap
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, MutableSequence
from pathlib import Path
from typing import Any, Protocol

from segue.errors import MonitorClosed, SegueError
from segue.qmp.client import Client, ClientState, Request, serialise
from segue.qmp.commands import (
    EVENTS,
    TAKE_FD,
    BadArguments,
    Command,
    Handler,
    Members,
    check_arguments,
    error,
    error_of,
    schema,
)
from segue.qmp.gate import Gate, GateState, Passage, is_read_only
from segue.qmp.listener import Listener, bind_unix
from segue.saved import Loader, Saver, raw

__all__ = ["Client", "ClientState", "Command", "Listener", "QmpServer", "Upstream"]

Reply = dict[str, Any]
# Told of each relayed command that was carried out: name, arguments, descriptors, what it returned.
Observer = Callable[[str, dict[str, Any], list[int], Any], None]
Event = dict[str, Any]

MAX_CLIENTS = 256
# From this number on, fd sets of an instance hold what the supervisor would lose if it was killed.
FDSETS = 1 << 40
# QEMU reads commands byte by byte: this many take it 0.8 s, in which everybody else's wait.
MAX_RELAYED = 256 << 10
# What is longer is not parsed while the guest may be paused: it would take a millisecond or more.
_SHORT = 64 << 10


class Upstream(Protocol):
    """What commands are relayed to: `segue.qemu.monitor.Monitor`, or a test's fake."""

    greeting: dict[str, Any]

    def relay(self, message: dict[str, Any], fds: list[int]) -> asyncio.Future[Reply]:
        """Send `execute` or `exec-oob` with `arguments`; no id. The reply has no id either.

        The descriptors stay the caller's, and open until the future is done. The future raises
        MonitorClosed if the instance ended before it answered.
        """
        ...


class QmpServer:
    """Serves the commands given, and relays all others to `upstream` through `gate`."""

    def __init__(
        self,
        commands: Mapping[str, Command],
        gate: Gate | None = None,
        log: logging.Logger | None = None,
        events: Mapping[str, Members] = EVENTS,
    ) -> None:
        self.gate = gate or Gate()
        self.log = log or logging.getLogger("segue.qmp")
        # Commands of QEMU's that the supervisor answers itself (`quit`), by name.
        self.intercept: dict[str, Handler] = {}
        # Commands of QEMU's that the supervisor carries out on the instance, in their turn at the
        # gate: what is to answer them, or None for those that are relayed after all.
        self.carried_out: dict[str, Callable[[dict[str, Any]], Awaitable[Reply] | None]] = {}
        # Whether an instance's event is kept from the clients.
        self.suppress: Callable[[Event], bool] = lambda event: False
        self.observers: list[Observer] = []
        self.listeners: list[Listener] = []
        self.clients: set[Client] = set()
        self._commands = commands
        self._events = events
        self._upstream: Upstream | None = None
        self._greetings: dict[bool, bytes] = {}
        # Of each client's place, whether anything of its that has come would die with this
        # process. A supervisor gives a shared file (keeper.py).
        self.busy: MutableSequence[int] | mmap.mmap = bytearray(MAX_CLIENTS)
        # Whoever came, or went.
        self.changed: Callable[[], None] = lambda: None
        self._count = 0
        self._asker: tuple[Client, dict[str, Any]] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._paths: list[Path] = []
        # What is changed in QEMU's answers, by command.
        self.edits: dict[str, Callable[[Reply], Reply]] = {
            "query-commands": self._edit_commands,
            "query-qmp-schema": self._edit_schema,
            "query-events": self._events_of_schema,
            "query-fdsets": self._without_ours,
        }
        self.gate.on_change.append(self._resume)

    # Connections

    def listen_unix(
        self,
        path: Path,
        mode: int = 0o600,
        pretty: bool = False,
        found: socket.socket | None = None,
    ) -> Listener:
        """Listen at `path`, which `close()` removes. Raises UsageError (too long, in use).

        `found` is a socket of another process that listens there already.
        """
        sock = found or bind_unix(path, mode)
        self._paths.append(path)
        return self.adopt_listener(sock, pretty)

    def adopt_listener(self, sock: socket.socket, pretty: bool = False) -> Listener:
        """Serve whoever connects to this listening socket, which is the server's from here on."""
        listener = Listener(self, sock, pretty)
        self.listeners.append(listener)
        return listener

    def adopt(
        self, sock: socket.socket, pretty: bool = False, state: ClientState | None = None
    ) -> Client | None:
        """Serve a connection, which is the server's from here on; None if there are too many.

        `state` is what `Client.state()` gave in the process that served it before.
        """
        if len(self.clients) >= MAX_CLIENTS:
            self.log.warning("a QMP client was turned away: there are %d", len(self.clients))
            sock.close()
            return None
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._count += 1
        place = min(set(range(MAX_CLIENTS)) - {client.place for client in self.clients})
        self.busy[place] = 0
        client = Client(self, sock, self._count, state.pretty if state else pretty, place)
        self.clients.add(client)
        self.log.info("%s %s", client, "connected" if state is None else "is still there")
        client.start(state)
        self.changed()
        return client

    def gone(self, client: Client, why: str) -> None:
        """A client has been closed. What it asked for and has not been started is forgotten."""
        self.clients.discard(client)
        for passage, request in tuple(client.passages.items()):
            if self.gate.forget(passage):
                del client.passages[passage]
                request.close_fds()
        self.log.info("%s is gone: %s", client, why)
        self.changed()

    def save(self, saver: Saver, asker: Client | None = None) -> dict[str, Any]:
        """The clients; `asker` is the one whose command of the moment the next process answers.

        Exact only while `why_not_quiet(asker)` has no reason against it.
        """
        clients = []
        for client in self.clients:
            if not client.greeted:
                continue
            saver.fd(f"client{client.place}", client.sock.fileno())
            state = client.state(client.current if client is asker else None)
            clients.append(
                {
                    "place": client.place,
                    "greeted": True,
                    "negotiated": state.negotiated,
                    "oob": state.oob,
                    "pretty": state.pretty,
                    "recovering": state.recovering and saver.exact,
                    "pending": saver.bytes(state.pending),
                    "unparsed": saver.bytes(state.unparsed),
                    "unsent": saver.bytes(state.unsent),
                    "asked": client.current.parsed.value
                    if client is asker and client.current
                    else None,
                }
            )
        return {"clients": clients}

    def load(self, data: dict[str, Any], loader: Loader, busy: bytes = b"") -> None:
        """Serve again who is still there. Those are let go that `busy` says something was lost of.

        They reconnect, as they would to a QEMU that died.
        """
        for saved in data["clients"]:
            place = saved["place"]
            sock = loader.socket(f"client{place}")
            if sock is None:
                continue
            if busy[place : place + 1] == b"\1":
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()
                continue
            state = ClientState(
                *(saved[key] for key in ("greeted", "negotiated", "oob", "pretty", "recovering")),
                *(raw(saved[key]) for key in ("pending", "unparsed", "unsent")),
            )
            client = self.adopt(sock, state=state)
            if client is not None and saved["asked"] is not None:
                self._asker = (client, saved["asked"])

    def answer_asker(self, reply: Reply) -> None:
        """Answer the command that another process left to us, if its client is still there."""
        asker, self._asker = self._asker, None
        if asker is not None:
            client, message = asker
            if "id" in message:
                reply["id"] = message["id"]
            client.send(serialise(reply, client.pretty))

    def why_not_quiet(self, asker: Client | None) -> str | None:
        """What keeps the clients from being given to another process just now."""
        for client in self.clients:
            if client.holds_descriptors:
                return f"{client} is in the middle of lending a descriptor"
            current = client.current
            if current is not None and client is not asker and current not in self._waiting():
                return f"{client} waits for the answer to {_name_of(current)}"
        return None

    def _waiting(self) -> list[Request]:
        """What waits at the gate, and can go through it in another process."""
        return [request for client in self.clients for request in client.passages.values()]

    async def finish(self, limit: float) -> None:
        """Have those answered whose commands of ours are under way, for `limit` seconds."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=limit)

    def close(self) -> None:
        """Close every connection and listening socket; handlers under way are cancelled."""
        for task in self._tasks:
            task.cancel()
        for listener in self.listeners:
            listener.close()
        self.listeners.clear()
        for client in tuple(self.clients):
            client.close("the server is closing", hang_up=False)
        for path in self._paths:
            with contextlib.suppress(OSError):
                path.unlink()
        self._paths.clear()
        with contextlib.suppress(ValueError):
            self.gate.on_change.remove(self._resume)

    # The instance

    @property
    def upstream(self) -> Upstream | None:
        """Whom commands are relayed to. Clients are greeted once there is one."""
        return self._upstream

    @upstream.setter
    def upstream(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._greetings = {pretty: serialise(upstream.greeting, pretty) for pretty in (False, True)}
        for client in tuple(self.clients):
            client.greet()

    def greeting(self, pretty: bool) -> bytes | None:
        return self._greetings.get(pretty)

    def on_upstream_event(self, event: Event) -> None:
        """Pass an instance's event on, unless `suppress` says not to."""
        if not self.suppress(event):
            self.emit(event)

    def event(self, name: str, data: Mapping[str, Any] | None = None) -> None:
        """Emit an event of our own, with the time of now."""
        now = time.time_ns() // 1000
        timestamp = {"seconds": now // 1_000_000, "microseconds": now % 1_000_000}
        event: Event = {"timestamp": timestamp, "event": name}
        self.emit(event if data is None else event | {"data": dict(data)})

    def emit(self, event: Event) -> None:
        """Send an event to every client that has negotiated."""
        printed: dict[bool, bytes] = {}
        for client in tuple(self.clients):
            if client.negotiated:
                if client.pretty not in printed:
                    printed[client.pretty] = serialise(event, client.pretty)
                client.send_event(printed[client.pretty])

    # Requests

    def defers(self, size: int) -> bool:
        """Whether input of this size is to be left alone for now, for the guest's sake."""
        return size > _SHORT and self.gate.state is GateState.CLOSED

    def _resume(self) -> None:
        """Look at what was deferred."""
        for client in tuple(self.clients):
            client.advance()

    def dispatch(self, client: Client, request: Request) -> None:
        """Have one message carried out: `client.answer` is called once, perhaps at once."""
        message = request.parsed.value
        try:
            name, out_of_band = _command_of(message, client.oob)
            arguments = message.get("arguments", {})
            own = self._commands.get(name) if client.negotiated else None
            if out_of_band and (own or name in ("query-events", "qmp_capabilities")):
                raise BadArguments(f"The command {name} does not support OOB")
            if name == "qmp_capabilities" or not client.negotiated:
                client.answer(request, _negotiate(client, name, arguments))
                return
            if own or name == "query-events":
                check_arguments(own.arguments if own else {}, arguments)
            if name in TAKE_FD and not out_of_band and not request.fds:
                # QEMU would take one that is left of a command that it refused, whoever's it was.
                check_arguments(TAKE_FD[name], arguments)
                raise BadArguments("No file descriptor supplied via SCM_RIGHTS")
            bare = {key: value for key, value in message.items() if key != "id"}
            # An id may be as long as it likes: it is not passed on.
            if request.size > MAX_RELAYED < (size := len(json.dumps(bare))):
                raise BadArguments(
                    f"The command {name:.40} has {size} bytes, more than the {MAX_RELAYED} "
                    "that are passed on to QEMU"
                )
        except BadArguments as failure:
            client.answer(request, error(str(failure)))
            return
        handler = own.handler if own else None if out_of_band else self.intercept.get(name)
        if handler is not None:
            task = asyncio.create_task(self._handle(client, request, name, handler, arguments))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif name == "query-events":
            # QEMU has it no more since 6.0, but its schema says the same.
            self._relay(client, request, name, {"execute": "query-qmp-schema"})
        else:
            self._relay(client, request, name, bare)

    async def _handle(
        self,
        client: Client,
        request: Request,
        name: str,
        handler: Handler,
        arguments: dict[str, Any],
    ) -> None:
        reply: Reply
        try:
            reply = {"return": await handler(arguments, client)}
        except SegueError as failure:
            reply = error_of(failure)
        except Exception as failure:
            self.log.exception("%s failed", name)
            reply = error(f"{name} failed: {failure!r} (see the supervisor's log)")
        client.answer(request, reply)

    def _relay(self, client: Client, request: Request, name: str, message: dict[str, Any]) -> None:
        def start() -> None:
            assert self._upstream is not None, "nobody is greeted before there is one"
            ours = self.carried_out.get(name)
            answer: asyncio.Future[Reply]
            try:
                work = ours(message.get("arguments", {})) if ours else None
                if work is None:
                    answer = self._upstream.relay(message, request.fds)
                else:
                    answer = asyncio.ensure_future(work)
            except Exception as failure:
                answer = asyncio.get_running_loop().create_future()
                answer.set_exception(failure)
            answer.add_done_callback(done)

        def done(future: asyncio.Future[Reply]) -> None:
            del client.passages[passage]
            try:
                client.answer(request, self._outcome(future, request, name, message))
            finally:
                # After the answer, so that those who wait are served before its next command.
                self.gate.leave(passage)

        read_only = is_read_only(name, message.get("arguments"))
        passage = Passage(name, read_only, start, "exec-oob" in message)
        client.passages[passage] = request
        self.gate.enter(passage)

    def _outcome(
        self, future: asyncio.Future[Reply], request: Request, name: str, message: dict[str, Any]
    ) -> Reply:
        """What the client is told; those who observe are told first."""
        try:
            reply = future.result()
            if "return" in reply:
                for observe in self.observers:
                    observe(name, message.get("arguments", {}), request.fds, reply["return"])
                if edit := self.edits.get(name):
                    reply = edit(reply)
        except (MonitorClosed, asyncio.CancelledError):
            return error(
                f"QEMU ended before it answered {name}: whether it was carried out cannot be known"
            )
        except SegueError as failure:
            return error_of(failure)
        except Exception as failure:
            # It waits for an answer, and upgrades wait for its command's end.
            self.log.exception("%s failed", name)
            return error(f"{name} failed: {failure!r} (see the supervisor's log)")
        return reply

    # What QEMU says of itself, and what we add

    def _own(self) -> dict[str, Members]:
        return {"query-events": {}} | {c.name: c.arguments for c in self._commands.values()}

    def _edit_commands(self, reply: Reply) -> Reply:
        known = {command["name"] for command in reply["return"]}
        reply["return"] += [{"name": name} for name in self._own() if name not in known]
        return reply

    @staticmethod
    def _without_ours(reply: Reply) -> Reply:
        """What QEMU holds for us (keeper.py) is nobody else's."""
        reply["return"] = [s for s in reply["return"] if s["fdset-id"] < FDSETS]
        return reply

    def _edit_schema(self, reply: Reply) -> Reply:
        known = {entry["name"] for entry in reply["return"]}
        reply["return"] += schema(self._own(), self._events, known)
        return reply

    def _events_of_schema(self, reply: Reply) -> Reply:
        theirs = [entry["name"] for entry in reply["return"] if entry["meta-type"] == "event"]
        return {"return": [{"name": name} for name in (*theirs, *self._events)]}


def _name_of(request: Request) -> str:
    message = request.parsed.value
    return str(message.get("execute")) if isinstance(message, dict) else "a message"


def _command_of(message: Any, oob_enabled: bool) -> tuple[str, bool]:
    """The command's name, and whether it is out-of-band. Raises BadArguments as QEMU would."""
    if not isinstance(message, dict):
        raise BadArguments("QMP input must be a JSON object")
    found: str | None = None
    for member, value in message.items():
        if member == "execute" or (member == "exec-oob" and oob_enabled):
            if not isinstance(value, str):
                raise BadArguments(f"QMP input member '{member}' must be a string")
            if found is not None:
                # Whichever came first: QEMU looks at them in the order of its hash table.
                raise BadArguments("QMP input member 'execute' clashes with 'exec-oob'")
            found = member
        elif member == "arguments":
            if not isinstance(value, dict):
                raise BadArguments("QMP input member 'arguments' must be an object")
        elif member != "id":
            raise BadArguments(f"QMP input member '{member}' is unexpected")
    if found is None:
        raise BadArguments("QMP input lacks member 'execute'")
    return message[found], found == "exec-oob"


def _negotiate(client: Client, name: str, arguments: dict[str, Any]) -> Reply:
    """`qmp_capabilities`, or whatever came in its place. Raises BadArguments."""
    if name != "qmp_capabilities":
        return error(
            "Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"
        )
    enable = arguments.get("enable", [])
    if not isinstance(enable, list):
        raise BadArguments("Invalid parameter type for 'enable', expected: array")
    for index, capability in enumerate(enable):
        if not isinstance(capability, str):
            raise BadArguments(f"Invalid parameter type for 'enable[{index}]', expected: string")
        if capability != "oob":
            # QEMU's own words: it has no name for an element here.
            raise BadArguments(f"Parameter 'null' does not accept value '{capability}'")
    check_arguments({"enable": (list, False)}, arguments)
    if client.negotiated:
        return error(
            "Capabilities negotiation is already complete, command ignored", "CommandNotFound"
        )
    client.negotiated = True
    client.oob = "oob" in enable
    return {"return": {}}
