"""One more client of a character device, beside the main one (`segue console`)."""

from __future__ import annotations

import contextlib
import socket

# What a viewer that does not read can be behind. Beyond it the oldest output is dropped: a
# person who comes back wants to see the present, and a script should use the main client's end.
LAG = 256 * 1024


class Viewer:
    def __init__(self, sock: socket.socket, pending: bytes = b"") -> None:
        sock.setblocking(False)
        self.sock = sock
        self.fd = sock.fileno()
        self.pending = bytearray(pending)

    def close(self, hang_up: bool = True) -> None:
        # An instance may hold a duplicate, which would keep the connection open.
        if hang_up:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def feed(self, data: bytes) -> None:
        self.pending += data
        if (excess := len(self.pending) - LAG) > 0:
            del self.pending[:excess]

    def flush(self) -> None:
        """Send what goes. Raises OSError if the viewer has gone."""
        while self.pending:
            try:
                del self.pending[: self.sock.send(self.pending, socket.MSG_DONTWAIT)]
            except BlockingIOError:
                return

    def recv(self, size: int) -> bytes | None:
        """None if there is nothing now, b"" if the viewer has gone."""
        try:
            return self.sock.recv(size, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:
            return b""
