"""One host end for several devices (`mux=on`, `mon:stdio`): the escape character switches.

QEMU's own mux is not used, because nothing of it is part of a saved state: it reads up to 32
bytes ahead of a device that does not take them (an upgrade would lose them), and a successor
would start with the focus on another device and timestamps off. Instead each device, or *front*,
has a broker and a plain chardev of its own, and what chardev/char-mux.c does is done here,
between those brokers and the client.

A front's broker sees this mux as its client, over a socketpair. A human monitor has a client
only while it has the focus, so that its prompt comes when QEMU's would.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from segue.kept.base import Kept, Lending
from segue.kept.broker import TO_CLIENT, TO_GUEST, Broker
from segue.kept.channel import Channel, SocketChannel, Watches
from segue.kept.endpoints import Endpoint
from segue.saved import Loader, Saver, raw

_PIECE = 65536
_HELP = (
    "{0} h    print this help",
    "{0} x    exit emulator",
    "{0} s    save disk data back to file (if -snapshot)",
    "{0} t    toggle console timestamps",
    "{0} b    send break (magic sysrq)",
    "{0} c    switch between console and monitor",
    "{0} {0}  sends {0}",
)


@dataclass(frozen=True)
class Front:
    """A device behind the mux: the id of its own chardev, and whether it is a human monitor."""

    id: str
    monitor: bool = False


class _LegChannel(SocketChannel):
    """What a front's broker has of the mux. It is made anew for a client that outlives both."""

    def save(self, saver: Saver) -> dict[str, Any]:
        return super().save(saver) if saver.exact else {}


class _Port(Endpoint):
    """The mux as a front's broker sees it."""

    async def start(self) -> None:
        """It is opened by the mux, when there is a client."""

    async def load(
        self, data: dict[str, Any], channel: dict[str, Any] | None, loader: Loader
    ) -> Channel | None:
        sock = loader.socket("socket")
        if sock is None or channel is None:
            return None
        again = _LegChannel(sock)
        again.returning = channel["returning"]
        return again

    def identity(self) -> dict[str, Any]:
        return {}

    def filename(self, channel: Channel | None) -> str:
        return "mux"


@dataclass
class _Leg:
    """One front and our end of the way to it, while it has a client."""

    front: Front
    port: _Port
    broker: Broker
    sock: socket.socket | None = None
    pending: bytearray = field(default_factory=bytearray)
    greeted: bool = False


class Mux(Kept):
    """`fronts` in the order in which QEMU connects them; the last has the focus at first.

    `on_quit` and `on_commit` are called for the escapes that QEMU answers by ending and by
    `commit all`; a front's own `on_break` for a break.
    """

    kind = "chardev"

    def __init__(
        self,
        name: str,
        endpoint: Endpoint,
        fronts: Sequence[Front],
        *,
        shared: dict[str, str] | None = None,
        escape: int = 1,
    ) -> None:
        self.name = name
        self.endpoint = endpoint
        self.to_client = bytearray()
        self.on_quit: Callable[[], None] | None = None
        self.on_commit: Callable[[], None] | None = None
        self._escape = escape
        self._escaped = False
        self._stamps: _Timestamps | None = None
        self._channel: Channel | None = None
        self._input_ended = False
        self._flushed = asyncio.Event()
        self._watches = Watches()
        self._legs = [self._leg(front, shared or {}, index) for index, front in enumerate(fronts)]
        self._focus = len(fronts) - 1
        for leg in self._legs:
            leg.broker.changed = lambda: self.changed()
        endpoint.came = self._client_came
        endpoint.broke = self._break

    @staticmethod
    def _leg(front: Front, shared: dict[str, str], index: int) -> _Leg:
        if index and "logfile" in shared:  # one log for all: only the first may empty it
            shared = {**shared, "logappend": "on"}
        port = _Port()
        return _Leg(front, port, Broker(front.id, port, shared=shared, monitor=front.monitor))

    @property
    def brokers(self) -> list[Broker]:
        return [leg.broker for leg in self._legs]

    # -- the machine's life ---------------------------------------------------------------

    def inherit(self, loader: Loader) -> None:
        self.endpoint.found = loader.within("end")
        for leg in self._legs:
            leg.broker.inherit(loader.within(leg.front.id))

    def spare(self, on: bool) -> None:
        self.endpoint.spared = on
        for broker in self.brokers:
            broker.spare(on)

    async def start(self) -> None:
        await self.endpoint.start()

    def save(self, saver: Saver) -> dict[str, Any]:
        channel = self._channel
        return {
            "endpoint": self.endpoint.save(saver.within("end")),
            "channel": None if channel is None else channel.save(saver.within("end")),
            "input_ended": self._input_ended,
            "to_client": saver.bytes(self.to_client),
            "escaped": self._escaped and saver.exact,
            "stamps": None if self._stamps is None else self._stamps.save(),
            "focus": self._focus,
            "legs": [self._save_leg(leg, saver.within(leg.front.id)) for leg in self._legs],
        }

    @staticmethod
    def _save_leg(leg: _Leg, saver: Saver) -> dict[str, Any]:
        if leg.sock is not None and saver.exact:
            saver.fd("leg", leg.sock.fileno())
        return {
            "pending": saver.bytes(leg.pending),
            "greeted": leg.greeted,
            "broker": leg.broker.save(saver),
        }

    async def load(self, data: dict[str, Any], loader: Loader) -> None:
        self._input_ended, self._escaped = data["input_ended"], data["escaped"]
        self._focus = data["focus"]
        if data["stamps"] is not None:
            self._stamps = _Timestamps.load(data["stamps"])
        for leg, saved in zip(self._legs, data["legs"], strict=True):
            inner = loader.within(leg.front.id)
            leg.greeted = saved["greeted"]
            leg.pending += raw(saved["pending"])
            leg.sock = inner.socket("leg")
            if leg.sock is not None:
                leg.sock.setblocking(False)
            await leg.broker.load(saved["broker"], inner)
        channel = await self.endpoint.load(data["endpoint"], data["channel"], loader.within("end"))
        if channel is not None:
            self._channel = channel
            self.to_client += raw(data["to_client"])
            for leg in self._legs:
                if leg.sock is None and (not leg.front.monitor or leg is self._legs[self._focus]):
                    self._join(leg)
        self._pump()

    def arguments(self, lending: Lending) -> list[str]:
        return [word for broker in self.brokers for word in broker.arguments(lending)]

    def freeze(self) -> None:
        for broker in self.brokers:
            broker.freeze()

    def hold(self) -> None:
        for broker in self.brokers:
            broker.hold()

    def take_back(self) -> None:
        for broker in self.brokers:
            broker.take_back()

    def switch(self, number: int) -> None:
        for broker in self.brokers:
            broker.switch(number)

    def give_back(self) -> None:
        for broker in self.brokers:
            broker.give_back()

    def drop(self, number: int) -> None:
        for broker in self.brokers:
            broker.drop(number)

    async def flush(self) -> None:
        """Wait until the client has been sent all that there is for it."""
        for broker in self.brokers:
            await broker.flush()
        self._read_fronts()
        while self.to_client and self._channel is not None:
            self._flushed.clear()
            await self._flushed.wait()

    def close(self) -> None:
        if self._channel is not None:
            self._read_fronts()
            self._write_client()
        self._watches.close()
        for leg in self._legs:
            if leg.sock is not None:
                leg.sock.close()
                leg.sock = None
            leg.broker.close()
        if self._channel is not None:
            (self._channel.leave if self.endpoint.spared else self._channel.close)()
            self._channel = None
        self.endpoint.close()
        self._flushed.set()

    def identity(self) -> dict[str, Any]:
        client = self._channel.identity() if self._channel else None
        return {**self.endpoint.identity(), "client": client}

    def held_by(self, pid: int) -> bool | None:
        return all(broker.held_by(pid) for broker in self.brokers)

    def attach(self, sock: socket.socket) -> None:
        """One more client for the console: the first front that is no monitor."""
        legs = [leg for leg in self._legs if not leg.front.monitor] or self._legs
        legs[0].broker.attach(sock)

    # -- clients --------------------------------------------------------------------------

    def _client_came(self, channel: Channel) -> None:
        self._channel = channel
        self._input_ended = self._escaped = False
        for leg in self._legs:
            leg.greeted = False
            if not leg.front.monitor or leg is self._legs[self._focus]:
                self._join(leg)
        self.changed()
        self._pump()

    def _client_left(self) -> None:
        channel, self._channel = self._channel, None
        if channel is None:
            return
        self._watches.forget(channel.reads, channel.writes)
        channel.close()
        self.to_client.clear()
        self._flushed.set()
        for leg in self._legs:
            self._part(leg)
        self.endpoint.left()
        self.changed()
        self._pump()

    def _join(self, leg: _Leg) -> None:
        leg.sock, theirs = socket.socketpair()
        leg.sock.setblocking(False)
        channel = _LegChannel(theirs)
        channel.returning = leg.greeted
        leg.greeted = True
        leg.port.came(channel)

    def _part(self, leg: _Leg) -> None:
        if leg.sock is not None:
            self._write_front(leg)
            self._watches.forget(leg.sock.fileno())
            leg.sock.close()
            leg.sock = None

    # -- bytes ----------------------------------------------------------------------------

    def _pump(self) -> None:
        for leg in self._legs:
            self._write_front(leg)
        self._write_client()
        channel = self._channel
        # Each front may bring as much again as is allowed to wait: the brokers behind it wait.
        room = len(self.to_client) < TO_CLIENT
        for leg in self._legs:
            if leg.sock is not None:
                fd = leg.sock.fileno()
                self._watches.read(fd, self._on_fronts if room else None)
                self._watches.write(fd, self._pump if leg.pending else None)
        if channel is not None:
            wanted = len(self._legs[self._focus].pending) < TO_GUEST and not self._input_ended
            self._watches.read(channel.reads, self._on_client if wanted else None)
            self._watches.write(channel.writes, self._pump if self.to_client else None)
            watched = channel.hangs_up and not wanted and not self.to_client
            self._watches.hangup(channel.reads, self._client_left if watched else None)

    def _on_client(self) -> None:
        channel = self._channel
        if channel is None:
            return
        try:
            data = channel.recv(TO_GUEST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._input(data)
        elif channel.two_way:
            self._client_left()
            return
        else:
            self._input_ended = True
        self._pump()

    def _input(self, data: bytes) -> None:
        for byte in data:
            if self._escaped:
                self._escaped = False
                if byte == self._escape:
                    self._legs[self._focus].pending.append(byte)
                else:
                    self._command(chr(byte))
            elif byte == self._escape:
                self._escaped = True
            else:
                self._legs[self._focus].pending.append(byte)

    def _command(self, key: str) -> None:
        match key:
            case "h" | "?":
                self._output(self._help().encode())
            case "x":
                self._output(b"QEMU: Terminated\n\r")
                self._write_client()
                if self.on_quit:
                    self.on_quit()
            case "s" if self.on_commit:
                self.on_commit()
            case "b":
                self._break()
            case "c":
                self._switch_focus()
            case "t":
                self._stamps = None if self._stamps else _Timestamps()

    def _switch_focus(self) -> None:
        old = self._legs[self._focus]
        self._focus = (self._focus + 1) % len(self._legs)
        new = self._legs[self._focus]
        if new is old:
            return
        if old.front.monitor:
            self._read_fronts()
            self._part(old)
            self._output(b"\r\n")
        if new.front.monitor:
            self._join(new)

    def _break(self) -> None:
        broker = self._legs[self._focus].broker
        if broker.on_break:
            broker.on_break()

    def _help(self) -> str:
        if 0 < self._escape < 26:
            head, name = "\n\r", f"C-{chr(self._escape - 1 + ord('a'))}"
        else:
            head = f"\n\rEscape-Char set to Ascii: 0x{self._escape:02x}\n\r\n\r"
            name = "Escape-Char"
        return head + "".join(f"{line.format(name)}\n\r" for line in _HELP)

    def _write_front(self, leg: _Leg) -> None:
        while leg.pending and leg.sock is not None:
            try:
                del leg.pending[: leg.sock.send(leg.pending, socket.MSG_DONTWAIT)]
            except BlockingIOError:
                return

    def _on_fronts(self) -> None:
        self._read_fronts(once=True)
        self._pump()

    def _read_fronts(self, once: bool = False) -> None:
        for leg in self._legs:
            while leg.sock is not None:
                try:
                    data = leg.sock.recv(_PIECE, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    break
                self._output(data)
                if once or not data:
                    break

    def _output(self, data: bytes) -> None:
        if self._channel is not None:
            self.to_client += self._stamps.mark(data) if self._stamps else data

    def _write_client(self) -> None:
        while self.to_client and self._channel is not None:
            try:
                del self.to_client[: self._channel.send(self.to_client[:_PIECE])]
            except BlockingIOError:
                return
            except OSError:
                self.to_client.clear()
        self._flushed.set()


class _Timestamps:
    """The time since the first line, before each line."""

    def __init__(self) -> None:
        self._start: float | None = None
        self._new_line = False

    def save(self) -> list[Any]:
        return [self._start, self._new_line]

    @classmethod
    def load(cls, saved: list[Any]) -> _Timestamps:
        stamps = cls()
        stamps._start, stamps._new_line = saved
        return stamps

    def mark(self, data: bytes) -> bytes:
        marked = bytearray()
        for line in _lines(data):
            if self._new_line:
                marked += self._stamp()
            marked += line
            self._new_line = line.endswith(b"\n")
        return bytes(marked)

    def _stamp(self) -> bytes:
        now = time.monotonic()
        if self._start is None:
            self._start = now
        milliseconds = int((now - self._start) * 1000)
        seconds = milliseconds // 1000
        clock = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        return f"[{clock}.{milliseconds % 1000:03d}] ".encode()


def _lines(data: bytes) -> list[bytes]:
    """Lines that end in a newline alone: a carriage return does not end one."""
    pieces = [piece + b"\n" for piece in data.split(b"\n")]
    pieces[-1] = pieces[-1][:-1]
    return [piece for piece in pieces if piece]
