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
from itertools import pairwise

from segue.errors import SegueError

_LINE = re.compile(rb"hb (\d+) (\d+)\r?")
_NONCE = re.compile(rb"nonce ([0-9a-f]+)\r?")

# A guest is back when so many seconds of beats are as even as they were before.
_EVEN = 0.1
# Of the beats that came before in such a time so many must come.
_RATE = 0.95
# No wait that is shorter than this says that a guest is not itself yet.
_UNNOTICED = 0.002


@dataclass
class Beats:
    """All beats that were read, in order.

    `lost` counts numbers that are missing or come twice, `garbled` the bytes of lines that are
    nothing that the guest says. The first line of a connection may be the end of one.
    """

    arrived: array[float] = field(default_factory=lambda: array("d"))
    clocks: array[int] = field(default_factory=lambda: array("q"))
    lost: int = 0
    garbled: int = 0
    nonces: set[bytes] = field(default_factory=set)
    _number: int | None = None
    _rest: bytes = b""

    def feed(self, data: bytes, when: float) -> None:
        """Take what was read at `when`, in seconds."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if beat := _LINE.fullmatch(line):
                self._beat(int(beat[1]), int(beat[2]), when)
            elif nonce := _NONCE.fullmatch(line):
                self.nonces.add(nonce[1])
            elif self._number is not None:
                self.garbled += len(line)

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
        seen = self._touching(begin, end, self.arrived)
        return max(later - earlier for earlier, later in pairwise(seen)) if seen else None

    def own_gap(self, begin: float, end: float) -> float | None:
        """As `gap`, by the guest's own clock, which stands still while the guest is stopped."""
        seen = self._touching(begin, end, self.clocks)
        return max(later - earlier for earlier, later in pairwise(seen)) / 1e9 if seen else None

    def brownout(self, quiet: float, begin: float, end: float) -> float | None:
        """Seconds from the end of the gap in begin..end until the guest is itself again.

        That is when the beats of the next tenth of a second are as many as there were in one
        between `quiet` and `begin`, and none was waited for longer than any was then. None if that
        does not come before the last beat that was read.
        """
        seen = self._touching(begin, end, self.arrived)
        usual = self.gap(quiet, begin)
        if not seen or usual is None or begin <= quiet:
            return None
        wanted = _RATE * _EVEN * self._count(quiet, begin) / (begin - quiet)
        longest = max(usual, _UNNOTICED)
        _, gap_ended = max(pairwise(seen), key=lambda pair: pair[1] - pair[0])
        first = bisect_left(self.arrived, gap_ended)
        for since in self.arrived[first:]:
            until = since + _EVEN
            if until > self.arrived[-1]:
                return None
            if self._count(since, until) >= wanted and (self.gap(since, until) or 0) <= longest:
                return since - gap_ended
        return None

    def between(self, begin: float, end: float) -> list[float]:
        return list(self.arrived[bisect_left(self.arrived, begin) : bisect_left(self.arrived, end)])

    def _count(self, begin: float, end: float) -> int:
        return bisect_left(self.arrived, end) - bisect_left(self.arrived, begin)

    def _touching(self, begin: float, end: float, values: array[float] | array[int]) -> list[float]:
        """The values of the last beat before `begin` to the first after `end`; [] if one lacks."""
        first = bisect_right(self.arrived, begin) - 1
        last = bisect_left(self.arrived, end)
        if first < 0 or last >= len(self.arrived) or first == last:
            return []
        return list(values[first : last + 1])


class Heartbeat:
    """Reads the beats of one guest, from as many sockets as it is heard on in turn."""

    def __init__(self) -> None:
        self.beats = Beats()
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self._change = threading.Condition()
        self._awaited: int | None = None
        self._closed = False

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
            there = self._change.wait_for(
                lambda: len(self.beats.arrived) >= wanted or self._closed, limit
            )
            self._awaited = None
        if not there or self._closed:
            raise SegueError(
                f"the guest's heartbeat did not come for {limit:g} s",
                hint="is the host overloaded?",
            )

    def close(self) -> None:
        """Whoever waits, in a thread that cannot be cancelled, does not wait any longer."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in self._sockets:
            sock.close()
