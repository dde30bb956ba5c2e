"""A network namespace of a test's own, and what looks at a guest from inside it.

A namespace belongs to a thread, and a socket or a child to the one that it was made in: so a
test goes in, makes what it needs, and comes out again.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

from segue.kept import tun
from tests.qemu.harness import LIMIT, SLOW

_SO_RCVBUFFORCE = 33  # asm-generic/socket.h; Python has no name for it
_ALL_PROTOCOLS = 3  # ETH_P_ALL
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)

HOST, GUEST = "192.0.2.1", "192.0.2.2"

PACE = 0.01 if SLOW else 0.002


class Namespace:
    """Empty but for `lo`."""

    def __init__(self) -> None:
        outside = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _libc.unshare(_CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            self._fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        finally:
            _libc.setns(outside, _CLONE_NEWNET)
            os.close(outside)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _libc.setns(self._fd, _CLONE_NEWNET)
            yield
        finally:
            _libc.setns(outside, _CLONE_NEWNET)
            os.close(outside)

    def run(self, *command: str) -> str:
        with self.inside():
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout

    def close(self) -> None:
        os.close(self._fd)


class Ping:
    """An echo request every `pace` seconds, each numbered, from a thread of its own."""

    def __init__(
        self, namespace: Namespace, to: str = GUEST, pace: float = PACE, size: int = 40
    ) -> None:
        with namespace.inside():
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        # What is not read at once must not look as if it were lost.
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 24)
        self._to, self._pace, self._size = to, pace, size
        self.sent: dict[int, float] = {}
        self.answers: dict[int, list[float]] = {}
        self._ending = False
        self._came = threading.Condition()
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._send, self._read)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        due, number = time.monotonic(), 0
        while not self._ending:
            body = struct.pack("!BBHHHI", 8, 0, 0, 77, number & 0xFFFF, number) + bytes(self._size)
            body = body[:2] + struct.pack("!H", _checksum(body)) + body[4:]
            self.sent[number] = time.monotonic()
            try:
                self._socket.sendto(body, (self._to, 0))
            except TimeoutError:  # no room: it never left
                del self.sent[number]
            number += 1
            due += self._pace
            time.sleep(max(0, due - time.monotonic()))

    def _read(self) -> None:
        self._socket.settimeout(0.1)
        while True:
            try:
                packet = self._socket.recv(1 << 16)
            except TimeoutError:
                if self._ending:
                    return
                continue
            if packet[20] == 0 and len(packet) >= 32:
                number = int.from_bytes(packet[28:32], "big")
                with self._came:
                    self.answers.setdefault(number, []).append(time.monotonic())
                    self._came.notify_all()

    def wait(self, more: int = 200, limit: float = LIMIT) -> None:
        """Wait until `more` further requests have been answered."""
        with self._came:
            wanted = len(self.answers) + more
            assert self._came.wait_for(lambda: len(self.answers) >= wanted, limit), "no answers"

    def end(self) -> None:
        self._ending = True
        for thread in self._threads:
            thread.join(10)
        self._socket.close()

    @property
    def lost(self) -> list[int]:
        """Numbers without an answer, from the first answered one to the last."""
        answers = dict(self.answers)
        first, last = min(answers), max(answers)
        return [n for n in list(self.sent) if first < n < last and n not in answers]

    @property
    def doubled(self) -> list[int]:
        return [n for n, times in dict(self.answers).items() if len(times) > 1]

    @property
    def slowest(self) -> float:
        """Seconds that the slowest answer took."""
        answers = dict(self.answers)
        first = min(answers)
        return max(t[0] - self.sent[n] for n, t in answers.items() if n > first)


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


class Capture:
    """All frames of an interface, both ways, from now on."""

    def __init__(self, namespace: Namespace, interface: str) -> None:
        with namespace.inside():
            self._socket = socket.socket(
                socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS)
            )
            self._socket.bind((interface, 0))
        self.frames: list[bytes] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        self._socket.settimeout(0.1)
        with contextlib.suppress(OSError):
            while self._socket.fileno() >= 0:
                with contextlib.suppress(TimeoutError):
                    self.frames.append(self._socket.recv(1 << 17))

    def end(self) -> None:
        self._socket.close()
        self._thread.join(10)


class Cable:
    """A tap in the namespace, whose frames go to and come from a socket: a peer of `-netdev`s.

    With `to` each is a datagram that is sent there; on a stream socket it has its length before it.
    """

    def __init__(self, namespace: Namespace, sock: socket.socket, to: Any = None) -> None:
        with namespace.inside():
            self._tap, name = tun.open_queue("cable%d", tun.IFF_TAP | tun.IFF_NO_PI)
            subprocess.run(["ip", "address", "add", f"{HOST}/24", "dev", name], check=True)
            subprocess.run(["ip", "link", "set", name, "up"], check=True)
        os.set_blocking(self._tap, True)
        sock.settimeout(None)
        self.socket = sock
        self._to = to
        self._streams = sock.type == socket.SOCK_STREAM
        self._ending = False
        for work in (self._out, self._back):
            threading.Thread(target=work, daemon=True).start()

    def _out(self) -> None:
        with contextlib.suppress(OSError):
            while not self._ending:
                frame = os.read(self._tap, 1 << 17)
                if self._streams:
                    self.socket.sendall(len(frame).to_bytes(4, "big") + frame)
                elif self._to is not None:
                    self.socket.sendto(frame, self._to)
                else:
                    self.socket.send(frame)

    def _back(self) -> None:
        with contextlib.suppress(OSError, struct.error):
            while not self._ending:
                if self._streams:
                    head = self.socket.recv(4, socket.MSG_WAITALL)
                    size: int = struct.unpack("!I", head)[0]
                    frame = self.socket.recv(size, socket.MSG_WAITALL)
                else:
                    frame = self.socket.recv(1 << 17)
                if frame:
                    os.write(self._tap, frame)

    def close(self) -> None:
        self._ending = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        os.close(self._tap)


class Stream:
    """Bytes sent over a TCP connection whose other end sends them back; both sums are kept."""

    def __init__(self, connection: socket.socket, pace: float = 0.001, chunk: int = 4096) -> None:
        self._socket = connection
        self._pace, self._chunk = pace, chunk
        self._out, self._back = hashlib.sha256(), hashlib.sha256()
        self.sent = self.received = 0
        self.error: OSError | None = None
        self._ending = False
        self._came = threading.Condition()
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._send, self._read)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        try:
            while not self._ending:
                chunk = os.urandom(self._chunk)
                self._out.update(chunk)
                self.sent += len(chunk)
                self._socket.sendall(chunk)
                time.sleep(self._pace)
            self._socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.error = error

    def _read(self) -> None:
        try:
            while chunk := self._socket.recv(1 << 16):
                self._back.update(chunk)
                with self._came:
                    self.received += len(chunk)
                    self._came.notify_all()
        except OSError as error:
            self.error = error

    def wait(self, more: int = 1 << 16, limit: float = LIMIT) -> None:
        """Wait until `more` further bytes have come back."""
        with self._came:
            wanted = self.received + more
            assert self._came.wait_for(lambda: self.received >= wanted, limit), self.error

    def end(self) -> None:
        """All that was sent has come back, in order, and nothing else."""
        self._ending = True
        for thread in self._threads:
            thread.join(LIMIT)
        self._socket.close()
        assert self.error is None, self.error
        assert self.received == self.sent
        assert self._back.digest() == self._out.digest()
