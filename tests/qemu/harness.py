"""What the tests on real QEMU are made of: releases, machines run by `segue run`, clients.

Everything is looked at from outside: through the command line, the sockets that a user has, and
/proc. Nothing here reaches into Segue's objects.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qemu.qmp import EventListener, QMPClient

from segue.guest import Witness

SLOW = "SEGUE_NESTED" in os.environ
"""Whether this is the nested bed (scripts/nested-bed), where Python is 10 to 20 times slower."""

LIMIT = 300.0 if SLOW else 60.0
"""Seconds within which anything that a test waits for must have happened; never asserted."""


def cache() -> Path:
    base = os.environ.get("SEGUE_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "segue"


def qemu(release: str, target: str = "x86_64") -> str:
    return str(cache() / "qemu" / release / f"qemu-system-{target}")


def passt() -> Path:
    """The folder of a passt that is right, for PATH."""
    return cache() / "passt"


def newer_python() -> Path:
    """A Python that is newer than the oldest that Segue runs on."""
    return cache() / "python/root/usr/bin/python3"


def accelerator() -> list[str]:
    """The bed is there for its KVM; elsewhere machines have what QEMU does without a word."""
    return ["-accel", "kvm"] if SLOW else []


def wait_until(what: str, condition: Callable[[], Any], limit: float = LIMIT) -> Any:
    """Poll for what has no event to wait on (a process in /proc, a file)."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.2 if SLOW else 0.01)
    raise AssertionError(f"{what} did not happen within {limit:g} s")


class Client:
    """Somebody on a console: reads all the time, and can wait for what it reads."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.data = bytearray()
        self.closed = False
        self.witness: Witness | None = None
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    @classmethod
    def unix(cls, path: Path | str) -> Client:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(path))
        return cls(sock)

    def _read(self) -> None:
        while True:
            try:
                chunk = self.sock.recv(65536)
            except OSError:
                chunk = b""
            with self._change:
                self.data += chunk
                if self.witness is not None:
                    self.witness.feed(chunk)
                self.closed = not chunk
                self._change.notify_all()
            if not chunk:
                return

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def wait(self, condition: Callable[[], Any], what: str, limit: float = LIMIT) -> Any:
        with self._change:
            result = self._change.wait_for(lambda: condition() or self.closed, limit)
            value = condition()
        tail = bytes(self.data[-300:])
        assert value, f"{what}: {'the end came first' if result else 'not in time'}; read {tail!r}"
        return value

    def expect(self, pattern: bytes, start: int = 0, limit: float = LIMIT) -> re.Match[bytes]:
        """Wait until `pattern` is read, from offset `start` on."""
        compiled = re.compile(pattern)
        found: re.Match[bytes] = self.wait(
            lambda: compiled.search(self.data, start), f"waiting for {pattern!r}", limit
        )
        return found

    def command(self, line: str, limit: float = LIMIT) -> str:
        """Type a line into the guest's shell; what it prints before the next prompt."""
        start = len(self.data)
        self.send(line.encode() + b"; echo status=$?\n")
        found = self.expect(rb"status=(\d+)\r?\n", start, limit)
        return self.data[start : found.start()].decode(errors="replace")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
        self._thread.join(LIMIT)


@dataclass
class Machine:
    """One `segue run` in the foreground or detached."""

    segue: Segue
    name: str
    process: subprocess.Popen[bytes] | None
    clients: list[Client] = field(default_factory=list)

    @property
    def directory(self) -> Path:
        return self.segue.root / self.name

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads((self.directory / "status.json").read_text())
        return status

    @property
    def qemu_pid(self) -> int:
        return int(self.status()["qemu_pid"])

    def connect(self, path: Path | str) -> Client:
        client = Client.unix(path)
        self.clients.append(client)
        return client

    def upgrade(self, *arguments: str, status: int = 0) -> dict[str, Any]:
        """`segue upgrade --json`; its receipt. The exit status must be `status`."""
        done = self.segue("upgrade", self.name, "--json", *arguments)
        assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
        receipt: dict[str, Any] = json.loads(done.stdout)
        return receipt

    def handed_over(self, *arguments: str) -> dict[str, Any]:
        receipt = self.upgrade(*arguments)
        assert receipt["result"] == "done", receipt
        if SLOW:  # what the bed measured is told at its end (pytest -rP)
            versions = " to ".join(receipt[side]["version"] for side in ("from", "to"))
            stopped = receipt["blackout_seconds"] * 1000
            print(f"{receipt['mode']} from {versions}: stopped for {stopped:.0f} ms")
        return receipt

    def qmp(self) -> Qmp:
        return Qmp(self.directory / "qmp.sock")

    def stop(self) -> None:
        self.segue("stop", self.name, "--timeout", "1")

    def wait(self, limit: float = LIMIT) -> int:
        assert self.process is not None
        return self.process.wait(limit)


class Segue:
    """A run directory of its own, and the `segue` command in it."""

    def __init__(self, root: Path, environment: dict[str, str] | None = None) -> None:
        self.root = root
        self.environment = {**os.environ, "SEGUE_RUN_DIR": str(root), **(environment or {})}
        self.machines: list[Machine] = []

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "segue", *arguments]

    def __call__(self, *arguments: str, limit: float = LIMIT) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )

    def start(
        self,
        name: str,
        argv: list[str],
        *options: str,
        stdin: Any = subprocess.DEVNULL,
        stdout: Any = None,
        stderr: Any = None,
        wait: bool = True,
        preexec: Callable[[], None] | None = None,
        close_fds: bool = True,
    ) -> Machine:
        """`segue run` in the foreground, with `options`; returns once its QEMU runs."""
        process = subprocess.Popen(
            self.command("run", "--name", name, *options, "--", *argv),
            env=self.environment,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=preexec,
            close_fds=close_fds,
        )
        machine = Machine(self, name, process)
        self.machines.append(machine)
        if wait:
            status = self.root / name / "status.json"
            wait_until(
                f"the start of {name}",
                lambda: status.exists() or process.poll() is not None,
            )
            assert process.poll() is None, f"segue run ended with {process.returncode}"
        return machine

    def processes(self) -> list[int]:
        """Every process that has this run directory in its environment."""
        return processes_with(f"SEGUE_RUN_DIR={self.root}")

    def end(self) -> None:
        """End what a test left, for the next one's sake; `leftovers` has been asserted before."""
        for machine in self.machines:
            for client in machine.clients:
                client.close()
            if machine.process is not None and machine.process.poll() is None:
                machine.process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    machine.process.wait(10)
                if machine.process.poll() is None:
                    machine.process.kill()
                    machine.process.wait()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def leftovers(self) -> list[str]:
        """What is still there although all machines have ended."""
        left = [f"process {pid}: {command_of(pid)}" for pid in self.processes()]
        if self.root.exists():
            left += [str(path) for path in self.root.rglob("*")]
        return left


def processes_with(variable: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if variable.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
    return "(gone)"


def cpu_ticks(pid: int) -> int:
    """utime + stime of a process, in clock ticks (proc_pid_stat(5))."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return int(fields[11]) + int(fields[12])


def kill_between_turns(pid: int) -> None:
    """SIGKILL to a process that waits for events: it has read nothing that it has not passed on.

    A kill at any other moment loses that, which is documented, and so not what tests look for.
    """
    stop_between_turns(pid)
    os.kill(pid, signal.SIGKILL)


def stop_between_turns(pid: int) -> None:
    """SIGSTOP to a process that waits for events, and stands when this returns."""
    waiting = {"x86_64": ("232", "281"), "aarch64": ("22",)}[os.uname().machine]

    def stands() -> bool:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"T"

    for _ in range(1000):
        os.kill(pid, signal.SIGSTOP)
        wait_until("its standstill", stands)
        if Path(f"/proc/{pid}/syscall").read_text().split()[0] in waiting:
            break
        os.kill(pid, signal.SIGCONT)


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
        return state not in (b"Z", b"X")
    return False


@contextlib.contextmanager
def no_descriptor_leak(pid: int) -> Iterator[None]:
    """The process has as many descriptors afterwards as before."""
    before = descriptors(pid)
    yield
    wait_until(
        f"closing of descriptors; before {before}, now {descriptors(pid)}",
        lambda: len(descriptors(pid)) <= len(before),
        limit=10,
    )


def files(directory: Path) -> list[str]:
    """The names in a run directory, but for what is being written at this moment."""
    return sorted(p.name for p in directory.iterdir() if p.suffix != ".new")


def descriptors(pid: int) -> list[str]:
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(os.readlink(entry))
    return sorted(links)


class Qmp:
    """A client on the machine's QMP socket, by `qemu.qmp`: not our own code on both sides."""

    def __init__(self, path: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self._loop = asyncio.new_event_loop()
        self._client = QMPClient("test")
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._change = threading.Condition()
        self._run(self._connect(str(path)))

    async def _connect(self, path: str) -> None:
        await self._client.connect(path)
        self._listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        listener = EventListener()
        self._client.register_listener(listener)
        async for event in listener:
            with self._change:
                self.events.append(dict(event))
                self._change.notify_all()

    def _run(self, work: Any, limit: float = LIMIT) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(limit)

    def command(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        """The return value; raises qemu.qmp's ExecuteError."""
        return self._run(self._client.execute(name, arguments))

    def begin(self, name: str, arguments: dict[str, Any] | None = None) -> Future[Any]:
        """As `command`, without waiting for the answer."""
        work = self._client.execute(name, arguments)
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def event(self, limit: float = LIMIT, **data: Any) -> dict[str, Any]:
        """Wait for a SEGUE_UPGRADE event with these members."""

        def found() -> dict[str, Any] | None:
            for event in self.events:
                if event["event"] == "SEGUE_UPGRADE" and data.items() <= event["data"].items():
                    return event
            return None

        with self._change:
            self._change.wait_for(found, limit)
            result = found()
        assert result is not None, f"no event {data}; there were {self.events[-5:]}"
        return result

    def abandon(self) -> None:
        """What was begun will not be answered: the supervisor is about to be killed."""
        for task in asyncio.all_tasks(self._loop):
            self._loop.call_soon_threadsafe(task.cancel)

    def close(self) -> None:
        async def end() -> None:
            self._listening.cancel()
            with contextlib.suppress(Exception):
                await self._client.disconnect()

        with contextlib.suppress(Exception):
            self._run(end(), 5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def __enter__(self) -> Qmp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
