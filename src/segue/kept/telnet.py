"""Telnet as QEMU's `telnet=on` speaks it (tcp_chr_process_IAC_bytes() in char-socket.c).

Its peculiarities are kept, because clients have learnt to live with them: every command but
BREAK is taken to have three bytes, and 0xff in the guest's output is *not* doubled.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from segue.kept.channel import SocketChannel
from segue.saved import Saver, raw, text

IAC = 0xFF
BREAK = 0xF3

# WILL echo, WILL suppress go-ahead, WILL binary, DO binary: one character at a time, no echo.
GREETING = bytes.fromhex("fffb01 fffb03 fffb00 fffd00")


class TelnetChannel(SocketChannel):
    def __init__(
        self, sock: socket.socket, broke: Callable[[], None], known: dict[str, Any] | None = None
    ) -> None:
        """`known` is what `save` gave for a client that has been greeted."""
        super().__init__(sock)
        self._greeting = GREETING if known is None else raw(known["greeting"])
        self._broke = broke
        self._seen = 0 if known is None else known["seen"]  # bytes of a command so far
        self._greet()

    def save(self, saver: Saver) -> dict[str, Any]:
        more = {"greeting": text(self._greeting), "seen": self._seen} if saver.exact else {}
        return super().save(saver) | {"greeting": "", "seen": 0} | more

    def recv(self, size: int) -> bytes:
        data = super().recv(size)
        if not data:
            return b""
        plain = self._strip(data)
        if not plain:
            raise BlockingIOError
        return plain

    def send(self, data: bytes | bytearray) -> int:
        self._greet()
        if self._greeting:
            raise BlockingIOError
        return super().send(data)

    def _greet(self) -> None:
        if self._greeting:
            try:
                sent = self.sock.send(self._greeting, socket.MSG_DONTWAIT)
            except OSError:
                return  # too early, or the client is gone, which reading will find
            self._greeting = self._greeting[sent:]

    def _strip(self, data: bytes) -> bytes:
        if not self._seen and IAC not in data:
            return data
        plain = bytearray()
        for byte in data:
            if not self._seen:
                if byte == IAC:
                    self._seen = 1
                else:
                    plain.append(byte)
            elif self._seen == 1 and byte == IAC:
                plain.append(byte)
                self._seen = 0
            else:
                if self._seen == 1 and byte == BREAK:
                    self._broke()
                    self._seen = 2
                self._seen = (self._seen + 1) % 3
        return bytes(plain)
