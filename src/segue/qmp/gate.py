"""Which relayed commands may pass, and when.

While two machines are compared only what changes nothing may pass, and while the guest is paused
nothing may: a `cont` or `device_add` would start a second guest, or make the comparison untrue.
What may not pass waits here, in order, and goes to whatever instance is served when it may.

    state      set by        what passes
    OPEN       open()        everything
    READ_ONLY  read_only()   what is known to change nothing (`is_read_only`)
    CLOSED     close()       nothing

Few commands are under way at once: QEMU runs them one after the other anyway, and stops reading
after eight, out-of-band ones included, and the supervisor's own must not queue up behind fifty
clients' commands. Out-of-band ones pass whatever the number under way.
"""

from __future__ import annotations

import asyncio
import enum
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from segue.errors import TimedOut

MAX_IN_FLIGHT = 4


class GateState(enum.Enum):
    OPEN = "open"
    READ_ONLY = "read-only"
    CLOSED = "closed"


@dataclass(eq=False)
class Passage:
    """One command's way through: `start` is called when it may go, `Gate.leave` when it is done."""

    command: str
    read_only: bool
    start: Callable[[], None]
    out_of_band: bool = False


class Gate:
    def __init__(self) -> None:
        self._state = GateState.OPEN
        self._waiting: deque[Passage] = deque()
        self._inside: set[Passage] = set()
        # Called after each change of state.
        self.on_change: list[Callable[[], None]] = []
        self._moved = asyncio.Event()

    @property
    def state(self) -> GateState:
        return self._state

    @property
    def in_flight(self) -> list[str]:
        """The names of the commands that an instance has been given and not answered."""
        return sorted(passage.command for passage in self._inside)

    def open(self) -> None:
        self._change(GateState.OPEN)

    def read_only(self) -> None:
        self._change(GateState.READ_ONLY)

    def close(self) -> None:
        self._change(GateState.CLOSED)

    async def drain(self, timeout: float = 10) -> None:
        """Wait until no command is under way that may not pass now.

        Raises TimedOut, naming them, after `timeout` seconds.
        """
        try:
            async with asyncio.timeout(timeout):
                while not self._quiet():
                    self._moved.clear()
                    await self._moved.wait()
        except TimeoutError:
            names = ", ".join(self.in_flight)
            raise TimedOut(
                f"QEMU did not answer {names} within {timeout:g} s",
                hint="a client of its QMP socket gave this command: wait until it is done",
            ) from None

    def enter(self, passage: Passage) -> None:
        """Call `passage.start()` now, or as soon as it may pass."""
        if self._may_pass(passage):
            self._go(passage)
        else:
            self._waiting.append(passage)

    def leave(self, passage: Passage) -> None:
        """Its answer has come, or will not come."""
        self._inside.discard(passage)
        if self._waiting:
            self._pump()
        self._moved.set()

    def forget(self, passage: Passage) -> bool:
        """Take back one that still waits; False if it has gone."""
        try:
            self._waiting.remove(passage)
        except ValueError:
            return False
        return True

    def _change(self, state: GateState) -> None:
        self._state = state
        self._pump()
        self._moved.set()
        for callback in self.on_change:
            callback()

    def _quiet(self) -> bool:
        if self._state is GateState.READ_ONLY:
            return all(passage.read_only for passage in self._inside)
        return not self._inside

    def _may_pass(self, passage: Passage) -> bool:
        if self._state is GateState.CLOSED:
            return False
        if self._state is GateState.READ_ONLY and not passage.read_only:
            return False
        return passage.out_of_band or len(self._inside) < MAX_IN_FLIGHT

    def _go(self, passage: Passage) -> None:
        self._inside.add(passage)
        passage.start()

    def _pump(self) -> None:
        for passage in tuple(self._waiting):
            # `start` may end in `leave`, and that in here: look again at who still waits.
            if self._may_pass(passage) and self.forget(passage):
                self._go(passage)


# Commands that change nothing that the guest, the host or another client can see, besides those
# whose name says so. Not among them on purpose: `screendump`, `memsave`, `pmemsave` (write files;
# device memory may notice a read), `getfd`/`add-fd` (what they bring would be lost with the
# incumbent), `ringbuf-read` (takes), `calc-dirty-rate` (uses the migration's bitmap).
_READ_ONLY = frozenset(
    {
        "device-list-properties",
        "object-list-properties",
        "qom-get",
        "qom-list",
        "qom-list-get",
        "qom-list-properties",
        "qom-list-types",
        "trace-event-get-state",
        "x-debug-block-dirty-bitmap-sha256",
        "x-debug-query-block-graph",
    }
)
_READ_ONLY_PREFIXES = ("query-", "x-query-")
_READ_ONLY_HMP = frozenset({"info", "help", "?"})


def is_read_only(command: str, arguments: Any) -> bool:
    """Whether this QMP command is known to change nothing."""
    if command == "human-monitor-command":
        line = arguments.get("command-line") if isinstance(arguments, dict) else None
        # One line is one command to QEMU: nothing after it can start another.
        return isinstance(line, str) and bool(_READ_ONLY_HMP.intersection(line.split()[:1]))
    return command in _READ_ONLY or command.startswith(_READ_ONLY_PREFIXES)
