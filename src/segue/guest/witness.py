"""What the tiny guest's output proves: it never stopped counting, and it is the same guest.

A witness reads the console like anybody else, so what it says holds for what a client saw: a
byte that was lost or came twice makes a line that is none, or a tick out of turn.
"""

from __future__ import annotations

import re

_LINE = re.compile(
    rb"(?P<banner>segue guest \w+ \d+)"
    rb"|tick (?P<tick>\d{8})"
    rb"|nonce (?P<nonce>[0-9a-f]{8}) tick (?P<at>\d{8})"
    rb"|got (?P<got>[0-9a-f]{2})"
    rb"|BAD tick (?P<bad>\d{8})"
)
_WRAP = 10**8


class Witness:
    """Follows one guest from its output, in pieces of any size.

    It may begin anywhere: the first line is taken as cut off unless it is whole, and firmware's
    text before the banner is passed over. Everything that is wrong ends up in `faults`, one
    sentence each; a guest that booted again is a fault, whose new nonce is then followed.
    """

    def __init__(self) -> None:
        self.tick: int | None = None
        """The last tick seen, modulo 10**8."""
        self.ticks = 0
        """How many tick lines were seen."""
        self.nonce: str | None = None
        """Eight hex digits, known from the first nonce line on."""
        self.nonces = 0
        """How many nonce lines were seen."""
        self.heard = bytearray()
        """The bytes that the guest says it received."""
        self.faults: list[str] = []
        self._rest = b""
        self._following = False

    def feed(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._line(line)

    def _line(self, line: bytes) -> None:
        match = _LINE.fullmatch(line.removesuffix(b"\r"))
        if match is None or not line.endswith(b"\r"):
            if self._following:
                self.faults.append(f"not a line of the guest: {line!r}")
            return
        if match["banner"]:
            if self._following:
                self.faults.append(f"booted again after tick {self.tick}")
            self.tick = self.nonce = None
        elif match["tick"]:
            self._tick(int(match["tick"]))
        elif match["nonce"]:
            self._nonce(match["nonce"].decode(), int(match["at"]))
        elif match["got"]:
            self.heard.append(int(match["got"], 16))
        else:
            self.faults.append(f"lost RAM, seen at tick {int(match['bad'])}")
        self._following = True

    def _tick(self, tick: int) -> None:
        if self.tick is not None and tick != (self.tick + 1) % _WRAP:
            self.faults.append(f"tick {tick} came after tick {self.tick}")
        self.tick = tick
        self.ticks += 1

    def _nonce(self, nonce: str, at: int) -> None:
        if self.nonce not in (None, nonce):
            self.faults.append(f"nonce {self.nonce} became {nonce} at tick {at}")
        if self.tick is not None and at != self.tick:
            self.faults.append(f"the nonce's tick {at} came after tick {self.tick}")
        self.nonce = nonce
        self.nonces += 1
