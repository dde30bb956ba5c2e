"""One QEMU process: started with exactly the descriptors it is lent, watched by a pidfd."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import select
import signal
import socket
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from segue.errors import InstanceDied, MonitorClosed, NotRunning, TimedOut
from segue.qemu.monitor import Event, Monitor
from segue.qemu.traceable import traceable
from segue.saved import Loader, Saver, raw

MONITOR_ID = "segue-monitor"
UNKNOWN_STATUS = 1
_MESSAGE = re.compile(r"qemu[\w.+-]*: ")  # begins with the program's name
_STOPPED = frozenset({b"T", b"t", b"Z", b"X"})


def monitor_words(number: int) -> list[str]:
    """The arguments for a monitor of ours on the descriptor of that number."""
    return ["-chardev", f"socket,id={MONITOR_ID},fd={number}", "-qmp", f"chardev:{MONITOR_ID}"]


def start_time(pid: int) -> int:
    """Field 22 of /proc/PID/stat, clock ticks since boot: with the pid it names one process.

    Raises OSError if there is no such process.
    """
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _exit_status(pidfd: int) -> int | None:
    """As a shell would show it, of a process that has ended; it is reaped.

    None where it is not our child: then it was started by a supervisor that was killed, and only
    its parent is told.
    """
    try:
        ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    except ChildProcessError:
        return None
    assert ended is not None
    return ended.si_status if ended.si_code == os.CLD_EXITED else 128 + ended.si_status


def _stands_still(pid: int) -> bool:
    """Whether a SIGSTOP has taken hold: no thread of it will run a line of its program.

    One that is stopped shows that all were told; a thread that waits in the kernel where no
    signal is heard (D) stops before it is back in its program, one that runs has yet to notice.
    """
    states = set()
    for path in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            states.add((path / "stat").read_bytes().rpartition(b")")[2].split()[0])
    return bool(states & _STOPPED) and states <= _STOPPED | {b"D"}


def last_message(lines: Sequence[str]) -> str:
    """Of what QEMU has said the last message, with the advice in the lines that follow it."""
    begins = (number for number, line in enumerate(lines) if _MESSAGE.match(line))
    first = max(begins, default=len(lines) - 1)
    return " ".join(list(lines)[max(first, 0) :])


class Instance:
    """A QEMU process and its monitor. Made by `spawn`, taken into service by `connect`.

    `inherited`: device and inode of each descriptor that it was given, by its number there.
    """

    def __init__(
        self,
        number: int,
        argv: list[str],
        pid: int,
        sock: socket.socket,
        their_end: socket.socket,
        inherited: Mapping[int, int],
    ) -> None:
        self.number = number
        self.inherited = {number: _identity(fd) for fd, number in inherited.items()}
        self.argv = argv
        self.pid = pid
        self.start_time = start_time(pid)
        self.last_words: deque[str] = deque(maxlen=20)
        self._sock: socket.socket | None = sock
        self._their_end = their_end
        self._monitor: Monitor | None = None
        self._loop = asyncio.get_running_loop()
        self._pidfd = os.pidfd_open(pid)
        self._stderr = -1
        self._half_a_line = b""
        self._shuts_down = False
        self.replaced = False
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._read_last_words: Callable[[], None] = lambda: None
        self._loop.add_reader(self._pidfd, self._reap)

    @classmethod
    def spawn(
        cls,
        number: int,
        argv: Sequence[str],
        descriptors: Sequence[int],
        *,
        on_stderr: Callable[[bytes], None],
        stdout: int | None = None,
        before_exec: Callable[[], None] | None = None,
    ) -> Instance:
        """Start QEMU with `argv` and a monitor of ours; no descriptor but those named passes.

        `before_exec` is called in the new process; if it raises, subprocess.SubprocessError is.

        It gets a session of its own: a Ctrl-C at the terminal is for the supervisor, which tells
        QEMU what it means. It inherits a duplicate of our end of the monitor too, so that the
        connection outlives a supervisor that is killed.
        """
        ours, theirs = socket.socketpair()
        try:
            return cls.launch(
                number,
                [*argv, *monitor_words(theirs.fileno())],
                (ours, theirs),
                (*descriptors, theirs.fileno(), ours.fileno()),
                on_stderr=on_stderr,
                stdout=stdout,
                before_exec=before_exec,
            )
        except BaseException:
            ours.close()
            theirs.close()
            raise

    @classmethod
    def launch(
        cls,
        number: int,
        argv: list[str],
        ends: tuple[socket.socket, socket.socket],
        descriptors: Sequence[int],
        *,
        on_stderr: Callable[[bytes], None],
        stdout: int | None = None,
        before_exec: Callable[[], None] | None = None,
        command: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Instance:
        """As `spawn`, with a monitor's ends that are there already.

        `command` is what is started where that is not QEMU itself, but what will execute `argv`;
        `environment` comes on top of our own.
        """
        read_end, write_end = os.pipe()
        try:
            process = subprocess.Popen(
                command or argv,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=write_end,
                pass_fds=descriptors,
                start_new_session=True,
                preexec_fn=traceable(before_exec),
                env={**os.environ, **(environment or {})},
            )
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        # Reaped by us, in whatever process we are then.
        process.returncode = 0  # or its destructor would wait for it
        instance = cls(number, argv, process.pid, *ends, {fd: fd for fd in descriptors})
        instance._read_stderr(read_end, on_stderr)
        return instance

    def save(self, saver: Saver) -> dict[str, Any]:
        """Legal while no command is under way, where the state is to be exact."""
        saver.fd("monitor", self.monitor.fileno(), lent=True)
        saver.fd("their-end", self._their_end.fileno(), lent=True)
        if self._stderr >= 0:
            saver.fd("stderr", self._stderr)
        return {
            "number": self.number,
            "argv": self.argv,
            "pid": self.pid,
            "start_time": self.start_time,
            "inherited": [[number, *identity] for number, identity in self.inherited.items()],
            "last_words": list(self.last_words),
            "half_a_line": saver.bytes(self._half_a_line),
            "monitor": self.monitor.save(),
        }

    @classmethod
    async def load(
        cls,
        data: dict[str, Any],
        loader: Loader,
        *,
        on_stderr: Callable[[bytes], None],
        timeout: float = 10,
    ) -> Instance:
        """The instance that another process of ours had.

        Raises NotRunning if it is no more, KeyError if its monitor is lost, MonitorClosed or
        TimedOut if it does not answer.
        """
        try:
            if start_time(data["pid"]) != data["start_time"]:
                raise ProcessLookupError
            ends = [socket.socket(fileno=loader.needed(n)) for n in ("monitor", "their-end")]
            instance = cls(data["number"], data["argv"], data["pid"], ends[0], ends[1], {})
        except (FileNotFoundError, ProcessLookupError):
            raise NotRunning(f"QEMU (pid {data['pid']}) is no more", guest="lost") from None
        instance._sock = None
        instance.inherited = {number: (dev, ino) for number, dev, ino in data["inherited"]}
        instance.last_words.extend(data["last_words"])
        if (stderr := loader.fd("stderr")) is not None:
            instance._half_a_line = raw(data["half_a_line"])
            instance._read_stderr(stderr, on_stderr)
        if loader.exact:
            instance._monitor = Monitor.load(ends[0], data["monitor"])
            return instance
        try:
            greeting = data["monitor"]["greeting"]
            instance._monitor = await Monitor.recover(ends[0], greeting, timeout)
        except TimeoutError:
            raise TimedOut(f"QEMU (pid {instance.pid}) did not answer for {timeout:g} s") from None
        instance._monitor.listen(instance._heard)
        return instance

    def _heard(self, event: Event) -> None:
        """Of a process whose exit status nobody will tell us."""
        self._shuts_down = self._shuts_down or event["event"] == "SHUTDOWN"

    def become(
        self,
        number: int,
        argv: list[str],
        ends: tuple[socket.socket, socket.socket],
        inherited: Mapping[int, int],
    ) -> Instance:
        """The instance that this one's process is from now on, having executed another program.

        This one has ended, with exit status 0, and is `replaced`. `inherited`: our descriptor → its
        number there.
        """
        successor = Instance(number, argv, self.pid, *ends, inherited)
        successor.last_words = self.last_words
        successor._read_last_words = self._read_last_words
        successor._stderr = self._stderr
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.monitor.close()
        self.replaced = True
        self._ended.set_result(0)
        return successor

    async def connect(self, timeout: float) -> Monitor:
        """Wait for QEMU's greeting, at most `timeout` seconds.

        Raises InstanceDied with QEMU's last words if it ended instead, TimedOut if it says nothing.
        """
        assert self._sock is not None
        sock, self._sock = self._sock, None
        connecting = asyncio.ensure_future(Monitor.connect(sock, timeout))
        try:
            await asyncio.wait((connecting, self._ended), return_when=asyncio.FIRST_COMPLETED)
            if not connecting.done():
                raise await self.death()
            self._monitor = connecting.result()
        except TimeoutError:
            raise TimedOut(f"QEMU (pid {self.pid}) did not answer for {timeout:g} s") from None
        except MonitorClosed:
            # Its end of the socket closes a moment before its pidfd becomes readable.
            with contextlib.suppress(TimeoutError):
                await self.wait(timeout=2)
                raise await self.death() from None
            raise
        finally:
            connecting.cancel()
            with contextlib.suppress(BaseException):
                await connecting
        return self._monitor

    @property
    def monitor(self) -> Monitor:
        assert self._monitor is not None, "connect() comes first"
        return self._monitor

    @property
    def running(self) -> bool:
        return not self._ended.done()

    @property
    def exit_status(self) -> int | None:
        """As a shell would show it: 128 + signal for a killed process; None while it runs."""
        return self._ended.result() if self._ended.done() else None

    @property
    def version(self) -> str:
        v: dict[str, Any] = self.monitor.greeting["QMP"]["version"]["qemu"]
        return f"{v['major']}.{v['minor']}.{v['micro']}"

    def on_end(self, callback: Callable[[int], None]) -> Callable[[], None]:
        """Call `callback` with the exit status as soon as the process has been reaped.

        Returns how to end that.
        """

        def ended(future: asyncio.Future[int]) -> None:
            callback(future.result())

        self._ended.add_done_callback(ended)

        def forget() -> None:
            self._ended.remove_done_callback(ended)

        return forget

    async def wait(self, timeout: float | None = None) -> int:
        """The exit status. Raises TimeoutError after `timeout` seconds."""
        async with asyncio.timeout(timeout):
            return await asyncio.shield(self._ended)

    async def death(self) -> InstanceDied:
        """An error that tells how QEMU ended and what it said last."""
        await self.wait()
        return self.how_it_ended()

    def how_it_ended(self) -> InstanceDied:
        """As `death`, of one that does not run any more."""
        status = self._ended.result()
        how = f"exit status {status}" if status < 128 else signal.Signals(status - 128).name
        said = last_message(self.last_words)
        what = f"QEMU (pid {self.pid}) ended with {how}{said and ': '}{said}"
        return InstanceDied(what, hint="all that it said is in the machine's qemu.log")

    def signal(self, number: int) -> None:
        """Send a signal; a process that has ended is left alone, whoever has its pid now."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def kill(self) -> int:
        """SIGKILL, and wait until the process is dead and reaped; its exit status."""
        self.signal(signal.SIGKILL)
        return await self.wait()

    async def hold_still(self) -> None:
        """Stop it with SIGSTOP, until nothing of it can run; all that it has said is taken in.

        `go_on` lets it run again. A process that ends meanwhile is reaped as ever.
        """
        self.signal(signal.SIGSTOP)
        while self.running and not _stands_still(self.pid):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        self.monitor.read_now()

    def go_on(self) -> None:
        self.signal(signal.SIGCONT)

    def close(self) -> None:
        """Let go of what held its monitor open until it was reaped."""
        self._their_end.close()

    def kill_at_once(self) -> None:
        """As `kill`, without the event loop; for the last moments of the supervisor."""
        self.signal(signal.SIGKILL)
        if self.running:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            poll.poll()
            self._reap()

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        status = _exit_status(self._pidfd)
        os.close(self._pidfd)
        self._read_last_words()
        if self._monitor is not None:
            self._monitor.read_rest()
        elif self._sock is not None:
            self._sock.close()
        if status is None:
            status = 0 if self._shuts_down else UNKNOWN_STATUS
        self._ended.set_result(status)

    def _read_stderr(self, fd: int, on_stderr: Callable[[bytes], None]) -> None:
        os.set_blocking(fd, False)
        self._stderr = fd
        at_end = False

        def readable() -> None:
            nonlocal at_end
            if at_end:
                return
            try:
                os.set_blocking(fd, False)  # QEMU undoes it (keeper.py)
                chunk = os.read(fd, 65536)
            except BlockingIOError:
                return
            if not chunk:
                self._loop.remove_reader(fd)
                os.close(fd)
                self._stderr = -1
                at_end = True
                return
            on_stderr(chunk)
            *lines, self._half_a_line = (self._half_a_line + chunk).split(b"\n")
            self.last_words.extend(line.decode(errors="replace").rstrip() for line in lines)

        self._read_last_words = readable
        self._loop.add_reader(fd, readable)
