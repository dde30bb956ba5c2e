"""The user's terminal and other standard streams (`-chardev stdio`), and ptys."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import fcntl
import os
import select
import signal
import sys
import termios
from typing import Any

from segue.errors import SegueError
from segue.kept.channel import Channel, Descriptor, DescriptorChannel
from segue.kept.endpoints import Endpoint, Say
from segue.saved import Loader, Saver, raw, text

_TIOCGPTN = 0x80045430  # asm-generic/ioctls.h
_LOOK = 0.5  # seconds between looks for somebody who opens a pty; QEMU takes 1


def make_raw(fd: int, *, output: bool = False, signals: bool = False) -> None:
    """cfmakeraw(); `output` and `signals` keep the terminal's OPOST and ISIG as they are.

    Does nothing on what is not a terminal.
    """
    try:
        iflag, oflag, cflag, lflag, *speeds, cc = termios.tcgetattr(fd)
    except termios.error:
        return
    iflag &= ~(
        termios.IGNBRK
        | termios.BRKINT
        | termios.PARMRK
        | termios.ISTRIP
        | termios.INLCR
        | termios.IGNCR
        | termios.ICRNL
        | termios.IXON
    )
    oflag = oflag | termios.OPOST if output else oflag & ~termios.OPOST
    lflag &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN)
    if not signals:
        lflag &= ~termios.ISIG
    cflag = cflag & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    cc[termios.VMIN], cc[termios.VTIME] = b"\1", b"\0"
    termios.tcsetattr(fd, termios.TCSANOW, [iflag, oflag, cflag, lflag, *speeds, cc])


class RawTerminal:
    """A terminal in the mode that QEMU's stdio wants, until `restore`."""

    def __init__(self, fd: int, signals: bool) -> None:
        self._fd = fd
        self._signals = signals
        self._old: list[Any] | None = None

    def enter(self) -> None:
        try:
            self._old = termios.tcgetattr(self._fd)
        except termios.error:
            return
        self._apply()
        self._watch()

    def _watch(self) -> None:
        atexit.register(self.restore)
        # A shell that stopped us with Ctrl-Z has put its own modes back. As QEMU, only the
        # way back in is ours: stopping is left to the shell.
        with contextlib.suppress(ValueError, RuntimeError):  # not the main thread
            asyncio.get_running_loop().add_signal_handler(signal.SIGCONT, self._apply)

    def restore(self) -> None:
        if self._old is None:
            return
        atexit.unregister(self.restore)
        with contextlib.suppress(ValueError, RuntimeError):
            asyncio.get_running_loop().remove_signal_handler(signal.SIGCONT)
        with contextlib.suppress(termios.error):
            termios.tcsetattr(self._fd, termios.TCSANOW, self._old)
        self._old = None

    def save(self) -> list[Any] | None:
        """The modes that `restore` brings back."""
        if self._old is None:
            return None
        *modes, keys = self._old
        return [*modes, [text(k) if isinstance(k, bytes) else k for k in keys]]

    def load(self, saved: list[Any] | None) -> None:
        if saved is not None:
            *modes, keys = saved
            self._old = [*modes, [raw(k) if isinstance(k, str) else k for k in keys]]
            self._watch()

    def _apply(self) -> None:
        with contextlib.suppress(termios.error):
            make_raw(self._fd, output=True, signals=self._signals)


class Stdio(Endpoint):
    """Standard input and output: a terminal, pipes, files, or one of each."""

    def __init__(self, signals: bool, reads: int = 0, writes: int = 1) -> None:
        self._reads, self._writes = reads, writes
        self._terminal = RawTerminal(reads, signals)

    async def start(self) -> None:
        try:
            reads = Descriptor(self._reads, os.O_RDONLY)
            writes = Descriptor(self._writes, os.O_WRONLY)
        except OSError as error:
            raise SegueError(f"cannot use stdio: {error.strerror}") from None
        self._terminal.enter()
        self.came(DescriptorChannel(reads, writes))

    def save(self, saver: Saver) -> dict[str, Any]:
        return {"terminal": self._terminal.save()}

    async def load(
        self, data: dict[str, Any], channel: dict[str, Any] | None, loader: Loader
    ) -> Channel | None:
        # The shell that started a supervisor that was killed has its terminal back.
        if not loader.exact:
            return None
        self._terminal.load(data["terminal"])
        return None if channel is None else DescriptorChannel.load(channel, loader)

    def close(self) -> None:
        self._terminal.restore()

    def identity(self) -> dict[str, Any]:
        statuses = [os.fstat(fd) for fd in (self._reads, self._writes)]
        return {"inodes": [[status.st_dev, status.st_ino] for status in statuses]}

    def filename(self, channel: Channel | None) -> str:
        return "stdio"


class PtyChannel(Channel):
    """The master while somebody has the slave open. Output for a slave that is closed is lost.

    A terminal knows no MSG_DONTWAIT (keeper.py), so that it does not block is said each time.
    """

    def __init__(self, master: int) -> None:
        self.reads = self.writes = master

    def recv(self, size: int) -> bytes:
        try:
            os.set_blocking(self.reads, False)
            return os.read(self.reads, size)
        except BlockingIOError:
            raise
        except OSError:  # EIO: the slave was closed
            return b""

    def send(self, data: bytes | bytearray) -> int:
        if hung_up(self.writes):
            return len(data)
        os.set_blocking(self.writes, False)
        return os.write(self.writes, data)

    def save(self, saver: Saver) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        """The master stays: its slave's path is the user's for as long as the machine runs."""


class Pty(Endpoint):
    def __init__(self, label: str, link: str | None, out: Say) -> None:
        self._label = label
        self._link = link
        self._out = out
        self._master = -1
        self._timer: asyncio.TimerHandle | None = None
        self.path = ""

    async def start(self) -> None:
        if (found := self.found.fd("master")) is not None:
            self._master, self.path = found, _slave(found)
        else:
            self._open()
        os.set_blocking(self._master, False)
        self._out(f"char device redirected to {self.path} (label {self._label})")
        if self._link is not None and not _leads_to(self._link, self.path):
            try:
                os.symlink(self.path, self._link)
            except OSError as error:
                link, self._link = self._link, None
                raise SegueError(
                    f"Failed to create PTY symlink: {error.strerror}", f"remove {link}"
                ) from None
        self._look()

    def save(self, saver: Saver) -> dict[str, Any]:
        saver.fd("master", self._master, outlives=True)
        return {"path": self.path, "link": self._link}

    async def load(
        self, data: dict[str, Any], channel: dict[str, Any] | None, loader: Loader
    ) -> Channel | None:
        master = loader.fd("master")
        if master is None:
            if data["link"] is not None:
                with contextlib.suppress(OSError):
                    os.unlink(data["link"])
            await self.start()
            return None
        self._master, self.path, self._link = master, data["path"], data["link"]
        if channel is not None:
            return PtyChannel(master)
        self._look()
        return None

    def _open(self) -> None:
        try:
            self._master, slave = os.openpty()
        except OSError as error:
            raise SegueError(f"Failed to create PTY: {error.strerror}") from None
        self.path = os.ttyname(slave)
        make_raw(slave)
        os.close(slave)

    def left(self) -> None:
        self._look()

    def close(self) -> None:
        if self._timer:
            self._timer.cancel()
        if self._master >= 0:
            os.close(self._master)
            self._master = -1
            if self._link is not None:
                with contextlib.suppress(OSError):
                    os.unlink(self._link)

    def identity(self) -> dict[str, Any]:
        return {"path": self.path, "device": os.stat(self.path).st_rdev}

    def filename(self, channel: Channel | None) -> str:
        return f"pty:{self.path}"

    def _look(self) -> None:
        """A closed slave is reported for ever, so it cannot be waited for, only looked at.

        What somebody wrote before closing it again is still to be read.
        """
        self._timer = None
        if hung_up(self._master) and not readable(self._master):
            self._timer = asyncio.get_running_loop().call_later(_LOOK, self._look)
        else:
            self.came(PtyChannel(self._master))


def _slave(master: int) -> str:
    """ptsname(3), which Python has from 3.13 on."""
    number = fcntl.ioctl(master, _TIOCGPTN, bytes(4))
    return f"/dev/pts/{int.from_bytes(number, sys.byteorder)}"


def _leads_to(link: str, path: str) -> bool:
    try:
        return os.readlink(link) == path
    except OSError:
        return False


def hung_up(fd: int) -> bool:
    return bool(_poll(fd, select.POLLOUT) & select.POLLHUP)


def readable(fd: int) -> bool:
    return bool(_poll(fd, select.POLLIN) & select.POLLIN)


def _poll(fd: int, events: int) -> int:
    poll = select.poll()
    poll.register(fd, events)
    return next((found for _, found in poll.poll(0)), 0)
