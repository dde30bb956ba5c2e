"""Numbered streams on the lines of a Linux guest: each number once and in order, both ways.

The guest writes `out N` on a line and expects `in N` there (tests/guests/linux/README.md); what
it received it tells in its reports. Here are the far ends of such lines.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import socket
import threading
from collections.abc import Callable
from typing import Any

from tests.qemu.harness import LIMIT

# What a telnet server says first.
_TELNET = re.compile(rb"\xff[\xfb-\xfe].", re.DOTALL)
_OUT = re.compile(rb"out (\d+)")
# What QEMU says on the standard output that a line may be on.
_SAID = re.compile(rb"char device redirected to \S+ \(label \S+\)")
_AHEAD = 4096  # bytes of a flood that wait here


class Line:
    """The far end of one stream: `reads` and `writes` are descriptors, -1 for none.

    `name` is what the guest calls its own end. For each number that arrives one is sent; while
    `flood` is set, as many as are taken. Whatever is wrong is a sentence in `faults`.
    """

    def __init__(self, name: str, reads: int, writes: int = -1) -> None:
        self.name = name
        self.reads, self.writes = reads, writes
        self.numbers = 0
        """How many were received."""
        self.sent = 0
        """How many were sent, whether or not the guest has read them."""
        self.flood = False
        self.answers = True
        self.faults: list[str] = []
        self._last = -1
        self._away = False
        self._rest = b""
        self._pending = bytearray()

    def reopened(self, reads: int, writes: int) -> None:
        """Another client took its place: what came in between nobody has seen."""
        self.reads, self.writes = reads, writes
        self._away, self._rest = True, b""

    def feed(self, data: bytes) -> None:
        text = _TELNET.sub(b"", self._rest + data)
        *lines, self._rest = text.split(b"\n")
        for line in lines:
            self._line(line.rstrip(b"\r"))

    def _line(self, line: bytes) -> None:
        match = _OUT.fullmatch(line)
        if match is None:
            # After an absence the first line may be cut off.
            if not self._away and not _SAID.fullmatch(line):
                self.faults.append(f"{self.name}: {line!r} came after {self._last}")
            return
        number = int(match[1])
        if number <= self._last if self._away else number != self._last + 1:
            self.faults.append(f"{self.name}: {number} came after {self._last}")
        self._away = False
        self._last = number
        self.numbers += 1
        if self.answers and not self.flood:
            self._answer()

    def _answer(self) -> None:
        self._pending += b"in %d\n" % self.sent
        self.sent += 1

    @property
    def settled(self) -> bool:
        """Nothing more will be sent, and what was is on its way."""
        return not self.answers and not self._pending

    @property
    def wants_to_write(self) -> bool:
        return self.writes >= 0 and (bool(self._pending) or (self.flood and self.answers))

    def write(self) -> None:
        while self.flood and self.answers and len(self._pending) < _AHEAD:
            self._answer()
        with contextlib.suppress(BlockingIOError):
            del self._pending[: os.write(self.writes, self._pending)]


class Switchboard:
    """Serves any number of lines from one thread. Lines are changed under `lock` alone."""

    def __init__(self) -> None:
        self.lines: dict[str, Line] = {}
        self.lock = threading.Condition()
        self._wake, self._woken = socket.socketpair()
        self._end = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def add(self, line: Line) -> Line:
        for fd in {line.reads, line.writes} - {-1}:
            os.set_blocking(fd, False)
        with self.lock:
            self.lines[line.name] = line
        self._wake.send(b"+")
        return line

    def remove(self, line: Line) -> None:
        """Nothing more is read from it or written to it until it is added again."""
        with self.lock:
            del self.lines[line.name]
        self._wake.send(b"-")

    def flood(self, on: bool, *names: str) -> None:
        with self.lock:
            for name in names:
                self.lines[name].flood = on
        self._wake.send(b"~")

    def wait(self, condition: Callable[[], Any], what: str, limit: float = LIMIT) -> None:
        with self.lock:
            assert self.lock.wait_for(condition, limit), f"{what}: not in time; {self}"

    def moving(self, count: int = 10) -> None:
        """Wait until every line has brought that many numbers more."""
        with self.lock:
            before = {line: line.numbers for line in self.lines.values()}
        self.wait(
            lambda: all(line.numbers >= n + count for line, n in before.items()), "numbers going on"
        )

    def close(self) -> None:
        self._end = True
        self._wake.send(b"!")
        self._thread.join(LIMIT)
        self._wake.close()
        self._woken.close()

    @property
    def faults(self) -> list[str]:
        return [fault for line in self.lines.values() for fault in line.faults[:2]]

    def __str__(self) -> str:
        return ", ".join(f"{n}: {x.numbers} out, {x.sent} in" for n, x in self.lines.items())

    def _run(self) -> None:
        while not self._end:
            with selectors.PollSelector() as selector:
                selector.register(self._woken, selectors.EVENT_READ)
                with self.lock:
                    for fd, mask in self._masks().items():
                        selector.register(fd, mask)
                ready = {key.fd: mask for key, mask in selector.select()}
            if ready.pop(self._woken.fileno(), 0):
                self._woken.recv(4096)
                continue  # what is ready may be gone
            with self.lock:
                self._serve(ready)
                self.lock.notify_all()

    def _masks(self) -> dict[int, int]:
        masks: dict[int, int] = {}
        for line in self.lines.values():
            if line.reads >= 0:
                masks[line.reads] = masks.get(line.reads, 0) | selectors.EVENT_READ
            if line.wants_to_write:
                masks[line.writes] = masks.get(line.writes, 0) | selectors.EVENT_WRITE
        return masks

    def _serve(self, ready: dict[int, int]) -> None:
        for line in self.lines.values():
            try:
                if ready.get(line.reads, 0) & selectors.EVENT_READ:
                    if data := os.read(line.reads, 65536):
                        line.feed(data)
                    else:
                        line.reads = -1
                if ready.get(line.writes, 0) & selectors.EVENT_WRITE and line.wants_to_write:
                    line.write()
            except BlockingIOError:
                continue
            except OSError as error:
                if line.reads >= 0 and line.answers:
                    line.faults.append(f"{line.name}: {error}")
                line.reads = line.writes = -1
