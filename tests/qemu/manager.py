"""systemd's part in the life of a service, as far as sd_notify(3) and LISTEN_FDS go.

For what a real one (systemd.py) would make slow, or cannot show: when it acted on what it was told.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.qemu.harness import LIMIT, Segue

# The shell becomes the service, so that LISTEN_PID is right.
_BECOME = 'export LISTEN_PID=$$; exec "$@"'
_FIRST = 3


class Manager:
    """NOTIFY_SOCKET and a descriptor store, for one service at a time."""

    def __init__(self, place: Path) -> None:
        self._path = str(place / "notify")
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(self._path)
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self.stored: list[tuple[str, int]] = []
        self.ready = 0
        self._thread.start()

    def _listen(self) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(self._sock, 4096, 253)
            if not data:
                return
            told = dict(line.split("=", 1) for line in data.decode().split("\n"))
            with self._change:
                if "FDSTORE" in told:
                    self.stored += [(told["FDNAME"], fd) for fd in fds]
                    fds = []
                elif "FDSTOREREMOVE" in told:
                    for each in [each for each in self.stored if each[0] == told["FDNAME"]]:
                        self.stored.remove(each)
                        os.close(each[1])
                self.ready += "READY" in told
                self._change.notify_all()
            for fd in fds:  # a barrier's, too
                os.close(fd)

    @property
    def names(self) -> list[str]:
        """What is stored, without the machine's mark."""
        return sorted(name.partition(".")[2] for name, _ in self.stored)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        with self._change:
            assert self._change.wait_for(condition, LIMIT), f"{what}; stored: {self.names}"

    def start(
        self, segue: Segue, name: str, environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """`segue service NAME`, with all that is stored; it is ready."""
        with self._change:
            stored, ready = list(self.stored), self.ready
        environment = {**segue.environment, **environment, "NOTIFY_SOCKET": self._path}
        if stored:
            environment["LISTEN_FDS"] = str(len(stored))
            environment["LISTEN_FDNAMES"] = ":".join(name for name, _ in stored)

        def place() -> None:
            copies = [os.dup2(os.dup(fd), _FIRST + 500 + n) for n, (_, fd) in enumerate(stored)]
            for number, fd in enumerate(copies):
                os.dup2(fd, _FIRST + number, inheritable=True)

        process = subprocess.Popen(
            ["sh", "-c", _BECOME, "sh", sys.executable, "-m", "segue", "service", name],
            env=environment,
            start_new_session=True,
            preexec_fn=place,
            pass_fds=range(_FIRST, _FIRST + len(stored)),
        )
        self.wait(lambda: self.ready > ready or process.poll() is not None, "a service that is up")
        assert process.poll() is None
        return process

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.connect(self._path)
            end.send(b"")
        self._thread.join()
        for _, fd in self.stored:
            os.close(fd)
        self._sock.close()
