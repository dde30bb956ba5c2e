"""A guest's network seen from outside: an echo request every two milliseconds, each numbered.

All in a network namespace of the bench's own, which its children share; so nothing of the host's
network is touched, and it takes root.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import subprocess
import threading
import time

from segue.errors import SegueError, UsageError

_CLONE_NEWNET = 0x40000000
_PACE = 0.002


def enter_namespace() -> None:
    """For the calling thread, and all that it starts from now on."""
    if os.geteuid() != 0:
        raise UsageError("--load net takes root: it makes a network namespace and taps in it")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET):
        number = ctypes.get_errno()
        raise SegueError(f"no network namespace could be made: {os.strerror(number)}")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)  # noqa: S607


class Pings:
    """`begin` and `end` a stretch of requests; `lost` and `sent` count over all stretches.

    `patience` is how many seconds an answer may take before it counts as lost.
    """

    patience = 0.5

    def __init__(self, to: str) -> None:
        self._to = to
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._socket.settimeout(0.1)
        self._number = self._first = 0
        self._answered: set[int] = set()
        self._threads: list[threading.Thread] = []
        self._ending = threading.Event()
        self.lost = self.sent = 0

    def begin(self) -> None:
        self._ending.clear()
        self._first = self._number
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._send, self._read)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Counted are those from the first that was answered on: before it ARP has to be done.

        Does nothing between stretches.
        """
        self._ending.set()
        for thread in self._threads:
            thread.join()
        answered = {number for number in self._answered if number >= self._first}
        if answered:
            expected = set(range(min(answered), self._number))
            self.sent += len(expected)
            self.lost += len(expected - answered)
        self._answered = set()
        self._threads = []

    def _send(self) -> None:
        due = time.monotonic()
        while not self._ending.is_set():
            body = struct.pack("!BBHHHI", 8, 0, 0, 77, self._number & 0xFFFF, self._number)
            body = body[:2] + struct.pack("!H", _checksum(body)) + body[4:]
            with contextlib.suppress(OSError):  # no room, or nobody answers to ARP yet
                self._socket.sendto(body, (self._to, 0))
            self._number += 1
            due += _PACE
            time.sleep(max(0, due - time.monotonic()))

    def _read(self) -> None:
        until = float("inf")
        while time.monotonic() < until:
            with contextlib.suppress(TimeoutError):
                packet = self._socket.recv(2048)
                if packet[20] == 0 and len(packet) >= 32:
                    self.answered(int.from_bytes(packet[28:32], "big"))
            if self._ending.is_set() and until == float("inf"):
                until = time.monotonic() + self.patience

    def answered(self, number: int) -> None:
        self._answered.add(number)

    def close(self) -> None:
        if self._threads:
            self.end()
        self._socket.close()


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF
