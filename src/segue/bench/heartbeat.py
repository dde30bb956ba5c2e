"""What somebody outside sees of a guest that beats a thousand times a second.

A beat is a line `hb NUMBER NANOSECONDS`, the number and the guest's monotonic clock; `nonce HEX`,
drawn at boot, comes before every 1000th (tests/guests/linux/README.md). Each is stamped with the
host's monotonic clock as it is read.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from array import array
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field

from segue.errors import SegueError

_LINE = re.compile(rb"hb (\d+) (\d+)")
_NONCE = re.compile(rb"nonce ([0-9a-f]+)")


@dataclass
class Beats:
    """All beats that were read, in order. `lost` counts numbers that are missing or come twice."""

    arrived: array[float] = field(default_factory=lambda: array("d"))
    clocks: array[int] = field(default_factory=lambda: array("q"))
    lost: int = 0
    nonces: set[bytes] = field(default_factory=set)
    _number: int | None = None
    _rest: bytes = b""

    def feed(self, data: bytes, when: float) -> None:
        """Take what was read at `when`, in seconds."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if beat := _LINE.match(line):
                self._beat(int(beat[1]), int(beat[2]), when)
            elif nonce := _NONCE.match(line):
                self.nonces.add(nonce[1])

    def _beat(self, number: int, clock: int, when: float) -> None:
        if self._number is not None:
            self.lost += abs(number - self._number - 1)
        self._number = number
        self.clocks.append(clock)
        self.arrived.append(when)

    def gap(self, begin: float, end: float) -> float | None:
        """The longest time, in seconds, without a beat, of those that touch begin..end.

        None unless there was a beat before and one after: then nobody can say.
        """
        first = bisect_right(self.arrived, begin) - 1
        last = bisect_left(self.arrived, end)
        if first < 0 or last >= len(self.arrived) or first == last:
            return None
        seen = self.arrived[first : last + 1]
        return max(later - earlier for earlier, later in zip(seen, seen[1:], strict=False))

    def own_gap(self, begin: float, end: float) -> float | None:
        """As `gap`, by the guest's own clock, which stands still while the guest is stopped."""
        first = bisect_right(self.arrived, begin) - 1
        last = bisect_left(self.arrived, end)
        if first < 0 or last >= len(self.clocks) or first == last:
            return None
        seen = self.clocks[first : last + 1]
        return max(b - a for a, b in zip(seen, seen[1:], strict=False)) / 1e9


class Heartbeat:
    """Reads the beats of one guest, from as many sockets as it is heard on in turn."""

    def __init__(self) -> None:
        self.beats = Beats()
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self._change = threading.Condition()
        self._awaited: int | None = None

    def listen(self, sock: socket.socket) -> None:
        """Read from `sock` until its end, in a thread of its own; the socket is ours from here."""
        thread = threading.Thread(target=self._read, args=(sock,), name="heartbeat", daemon=True)
        self._threads.append(thread)
        self._sockets.append(sock)
        thread.start()

    def _read(self, sock: socket.socket) -> None:
        while True:
            try:
                data = sock.recv(65536)
            except OSError:
                return
            if not data:
                return
            self.beats.feed(data, time.monotonic())
            if self._awaited is not None and len(self.beats.arrived) >= self._awaited:
                with self._change:
                    self._change.notify_all()

    def wait(self, more: int, limit: float) -> None:
        """Until `more` beats have come from now on. Raises SegueError after `limit` seconds."""
        with self._change:
            self._awaited = wanted = len(self.beats.arrived) + more
            there = self._change.wait_for(lambda: len(self.beats.arrived) >= wanted, limit)
            self._awaited = None
        if not there:
            raise SegueError(
                f"the guest's heartbeat did not come for {limit:g} s", hint="is the host overloaded?"
            )

    def close(self) -> None:
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in self._sockets:
            sock.close()
