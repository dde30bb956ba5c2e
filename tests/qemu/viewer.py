"""A VNC viewer: the first words of the protocol (RFC 6143), up to the picture's size."""

from __future__ import annotations

import socket
import subprocess

_NO_PASSWORD, _PASSWORD = 1, 2


def free_display() -> int:
    """A TCP port that a display may have; `-vnc :N` stands for port 5900 + N."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Refused(Exception):
    """The server does not take this password."""


class Viewer:
    def __init__(self, port: int, password: str | None = None) -> None:
        self._sock = socket.create_connection(("127.0.0.1", port), 20)
        try:
            self._greet(password)
        except BaseException:
            self._sock.close()
            raise

    def _greet(self, password: str | None) -> None:
        with self._sock.makefile("rb") as reader:
            assert reader.read(12) == b"RFB 003.008\n"
            self._sock.sendall(b"RFB 003.008\n")
            kinds = reader.read(reader.read(1)[0])
            kind = _NO_PASSWORD if password is None else _PASSWORD
            if kind not in kinds:
                raise Refused(f"security types {list(kinds)}")
            self._sock.sendall(bytes([kind]))
            if password is not None:
                self._sock.sendall(_answer(reader.read(16), password))
            if reader.read(4) != bytes(4):
                raise Refused("wrong password")
            self._sock.sendall(b"\1")
            header = reader.read(24)
            self.width, self.height = (int.from_bytes(header[n : n + 2]) for n in (0, 2))
            self.name = reader.read(int.from_bytes(header[20:24])).decode()

    def ended(self) -> None:
        """The server closes the connection."""
        while self._sock.recv(4096):
            pass
        self._sock.close()

    def close(self) -> None:
        self._sock.close()


def _answer(challenge: bytes, password: str) -> bytes:
    """DES with the password as its key, each byte's bits in the opposite order."""
    key = password.encode()[:8].ljust(8, b"\0")
    mirrored = bytes(int(f"{byte:08b}"[::-1], 2) for byte in key).hex()
    words = "enc -des-ecb -nopad -provider legacy -provider default -K".split()
    return subprocess.run(
        ["openssl", *words, mirrored], input=challenge, capture_output=True, check=True
    ).stdout
