"""User networking that outlives QEMU: a passt of ours, and a relay of frames to each instance.

slirp's connections live inside QEMU and end with it; passt's are sockets of a process of its own.
The guest sees the network that slirp would show it: the same addresses, the same MTU.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segue.errors import SegueError
from segue.kept.base import Kept, Lending
from segue.kept.relay import Relay, StreamFar
from segue.qemu.instance import start_time
from segue.saved import Loader, Saver

# The first that was tried and found to be right. 2023-03-09, Debian 12's, corrupts data towards
# the guest with no upgrade at all.
OLDEST = (2025, 5, 3)

# passt drops what finds no room, and sends the first of a connection only once.
_ROOM = 4 << 20
_SO_SNDBUFFORCE = 32  # asm-generic/socket.h; Python has no name for it

_ROUTES = Path("/proc/net/route")
_ANSWER_LIMIT = 5.0
# Seconds until a passt that has died is started anew; doubled each time it dies young.
_AGAIN, _AGAIN_AT_MOST = 0.5, 60.0
_YOUNG = 10.0


@dataclass(frozen=True)
class Found:
    """A passt that can be used."""

    path: str
    version: str


def find() -> Found | str:
    """The passt in PATH, or what keeps it from being used."""
    places = [Path(folder, "passt") for folder in os.get_exec_path()]
    path = next((str(p) for p in places if os.access(p, os.X_OK)), None)
    if path is None:
        return "passt is not installed"
    said = _version(path)
    date = re.search(r"(20\d\d)_?(\d\d)_?(\d\d)", said)
    if date is None:
        return f"{path} does not tell its version"
    if tuple(map(int, date.groups())) < OLDEST:
        oldest = "-".join(f"{number:02}" for number in OLDEST)
        return (
            f"{path} is of {'-'.join(date.groups())}, and old ones corrupt data: "
            f"{oldest} or newer is needed"
        )
    if not _has_route():
        return "this host has no default route, which passt needs"
    return Found(path, said)


def _version(path: str) -> str:
    """What `passt --version` says. It says it on a terminal only: to a pipe nothing is flushed."""
    ours, theirs = os.openpty()
    try:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(
                [path, "--version"],
                stdin=subprocess.DEVNULL,
                stdout=theirs,
                stderr=subprocess.DEVNULL,
                timeout=_ANSWER_LIMIT,
            )
        if select.select([ours], [], [], 0)[0]:
            return os.read(ours, 4096).decode(errors="replace").partition("\r\n")[0]
        return ""
    finally:
        os.close(ours)
        os.close(theirs)


def _has_route() -> bool:
    """Without a default route passt gives the guest another address than it was told to."""
    with contextlib.suppress(OSError):
        for line in _ROUTES.read_text().splitlines()[1:]:
            if line.split()[1] == "00000000":
                return True
    return False


class Passt(Kept):
    """One user network.

    `command` is how passt is to be run (usernet.py), `more` what an instance is told besides.
    With `restrict` the guest is shut in (restrict.py).
    """

    kind = "passt"

    def __init__(
        self,
        name: str,
        command: list[str],
        version: str,
        more: tuple[str, ...] = (),
        restrict: bool = False,
    ) -> None:
        self.name = name
        self.pid = self._start_time = 0
        self._version = version
        self._command = command
        self._more = more
        if restrict:
            from segue.kept.restrict import admits

            self._relay = Relay(self._broken, admits)
        else:
            self._relay = Relay(self._broken)
        self._far: socket.socket | None = None
        # Whether each instance has a duplicate: not of that of a passt that was started since.
        self._far_is_lent = False
        self._say: Callable[[str], None]
        self._pidfile: Path
        self._pidfd = -1
        self._started = 0.0
        self._delay = _AGAIN
        self._again: asyncio.Task[None] | None = None

    def move_in(self, directory: Path, say: Callable[[str], None]) -> None:
        self._say = say
        self._pidfile = directory / f"passt-{os.getpid()}-{id(self)}.pid"

    async def start(self) -> None:
        far = await asyncio.to_thread(self._run)
        self._take(far)

    def save(self, saver: Saver) -> dict[str, Any]:
        if self._far is not None:
            saver.fd("far", self._far.fileno(), lent=self._far_is_lent)
        return {
            "pid": self.pid,
            "start_time": self._start_time,
            "far_is_lent": self._far_is_lent,
            "relay": self._relay.save(saver.within("relay")),
        }

    async def load(self, data: dict[str, Any], loader: Loader) -> None:
        self.pid, self._start_time = data["pid"], data["start_time"]
        self._far_is_lent = data["far_is_lent"]
        self._far = loader.socket("far")
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(self.pid)
            if start_time(self.pid) == self._start_time:
                self._pidfd = pidfd
            else:
                os.close(pidfd)
        far = StreamFar(self._far) if self._far is not None else None
        self._relay.load(data["relay"], loader.within("relay"), far)
        if far is None:
            self._broken()

    def _run(self) -> socket.socket:
        """Start passt; it goes into the background when it is ready. Raises SegueError."""
        ours, theirs = socket.socketpair()
        for option in (_SO_SNDBUFFORCE, socket.SO_SNDBUF):  # the first is root's
            with contextlib.suppress(OSError):
                theirs.setsockopt(socket.SOL_SOCKET, option, _ROOM)
                break
        try:
            with theirs:
                path = str(self._pidfile)
                command = [*self._command, "--fd", str(theirs.fileno()), "--pid", path]
                done = subprocess.run(
                    command,
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                    timeout=_ANSWER_LIMIT,
                )
                if done.returncode:
                    said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
                    raise SegueError(
                        f"passt for {self.name}: {said[-1]}", hint="--net-user=slirp does without"
                    )
                self.pid = int(self._pidfile.read_text())
                self._pidfd = os.pidfd_open(self.pid)
                self._start_time = start_time(self.pid)
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            ours.close()
            raise SegueError(f"passt for {self.name}: {error}") from None
        except BaseException:
            ours.close()
            raise
        finally:
            self._pidfile.unlink(missing_ok=True)
        return ours

    def _take(self, far: socket.socket) -> None:
        self._started = time.monotonic()
        self._far = far
        self._far_is_lent = False
        self._relay.join(StreamFar(far))

    # -- its death ----------------------------------------------------------------------------

    def _broken(self) -> None:
        """Its end of the socket is closed: it is dead, or as good as dead."""
        self._end()
        self._far = None
        if time.monotonic() - self._started > _YOUNG:
            self._delay = _AGAIN
        self._say(
            f"{self.name}: its passt (pid {self.pid}) has died, and the connections through it are "
            "lost; it is started again"
        )
        self._again = asyncio.get_running_loop().create_task(self._start_again())

    async def _start_again(self) -> None:
        while True:
            await asyncio.sleep(self._delay)
            self._delay = min(2 * self._delay, _AGAIN_AT_MOST)
            try:
                far = await asyncio.to_thread(self._run)
            except SegueError as error:
                self._say(error.what)
            else:
                self._take(far)
                self.changed()
                return

    def _end(self) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.close(self._pidfd)
            self._pidfd = -1

    # -- lending ------------------------------------------------------------------------------

    def arguments(self, lending: Lending) -> list[str]:
        if self._far is not None:
            # So that it does not end with a supervisor that is killed.
            lending.inherit(self._far.fileno())
            self._far_is_lent = True
        return [*self._relay.arguments(self.name, lending), *self._more]

    def hold(self) -> None:
        self._relay.hold()

    def take_back(self) -> None:
        self._relay.take_back()

    def switch(self, number: int) -> None:
        self._relay.switch(number)

    def give_back(self) -> None:
        self._relay.give_back()

    def drop(self, number: int) -> None:
        self._relay.drop(number)

    def identity(self) -> dict[str, Any]:
        return {"pid": self.pid, "version": self._version}

    def held_by(self, pid: int) -> bool:
        return self._relay.held_by(pid)

    def close(self) -> None:
        if self._again is not None:
            self._again.cancel()
        self._relay.close()
        self._end()
