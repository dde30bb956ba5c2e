"""What it costs a QMP client that a supervisor stands between it and QEMU.

Two QEMUs run the tiny guest: one by itself, one under Segue. The same command is given to both in
turn, by the same client, so that what disturbs the one disturbs the other:

    alone       to QEMU's own socket
    one         through the supervisor, whose only client this is
    many        the same with 49 more clients, who listen to events

Then commands are given without a pause through upgrades; `waited` is the longest that one of
them waited for its answer in each.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segue import machines
from segue.errors import SegueError
from segue.guest import image

LISTENERS = 49
_COMMAND = b'{"execute":"query-status"}'
_LIMIT = 60.0
# At the beginning caches are cold on either side.
_WARM_UP = 50

Tell = Callable[[str], None]


@dataclass
class Figures:
    """Seconds; a list has one for each round trip, `waited` one for each upgrade."""

    version: str = ""
    alone: list[float] = field(default_factory=list)
    one: list[float] = field(default_factory=list)
    many: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    commands: int = 0
    """How many were given, and answered, through the upgrades."""

    def to_json(self) -> dict[str, Any]:
        alone = statistics.median(self.alone)
        medians = {"one": statistics.median(self.one), "many": statistics.median(self.many)}
        return {
            "qemu_version": self.version,
            "round_trips": len(self.alone),
            "alone_seconds": alone,
            "seconds": medians,
            "added_seconds": {name: median - alone for name, median in medians.items()},
            "listeners": LISTENERS,
            "upgrades": len(self.waited),
            "commands_through_upgrades": self.commands,
            "longest_wait_seconds": max(self.waited, default=None),
            "median_wait_seconds": statistics.median(self.waited) if self.waited else None,
        }


class Asker:
    """A client that gives a command and waits for its answer, with nothing in between."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(_LIMIT)
        self._sock.connect(str(path))
        self._rest = b""
        self.version = _version(self._line())
        self.ask(b'{"execute":"qmp_capabilities"}')

    def ask(self, command: bytes = _COMMAND) -> float:
        """Seconds until the answer was there. Events that come meanwhile are passed over."""
        began = time.perf_counter()
        self._sock.sendall(command)
        while not (line := self._line()).startswith(b'{"return"'):
            if line.startswith(b'{"error"'):
                raise SegueError(f"QEMU refused {command.decode()}: {line.decode()}")
        return time.perf_counter() - began

    def _line(self) -> bytes:
        while b"\n" not in self._rest:
            chunk = self._sock.recv(65536)
            if not chunk:
                raise SegueError("QEMU has closed the connection")
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def close(self) -> None:
        self._sock.close()


def _version(greeting: bytes) -> str:
    version = json.loads(greeting)["QMP"]["version"]["qemu"]
    return f"{version['major']}.{version['minor']}.{version['micro']}"


def measure(old: Path, new: Path, runs: int, upgrades: int, place: Path, tell: Tell) -> Figures:
    """`runs` round trips each, and `upgrades` between `old` and `new`; `place` is a directory.

    Raises SegueError where something does not start or an upgrade fails.
    """
    figures = Figures()
    with contextlib.ExitStack() as stack:
        alone = stack.enter_context(_qemu(old, place))
        name = f"bench-qmp-{os.getpid()}"
        machine = stack.enter_context(_machine(name, old))
        direct = stack.enter_context(contextlib.closing(Asker(alone)))
        through = stack.enter_context(contextlib.closing(Asker(machine.directory.qmp)))
        figures.version = direct.version
        tell(f"round trips: {runs} each")
        _in_turn(runs, (direct, figures.alone), (through, figures.one))
        for _ in range(LISTENERS):
            stack.enter_context(contextlib.closing(Asker(machine.directory.qmp)))
        tell(f"round trips beside {LISTENERS} clients")
        _in_turn(runs, (direct, []), (through, figures.many))
        for number, binary in zip(range(upgrades), itertools.cycle((new, old)), strict=False):
            tell(f"upgrade {number + 1} of {upgrades}")
            with _asking(machine.directory.qmp) as waits:
                _segue("upgrade", name, "--to", str(binary), "--force", "--json")
            figures.waited.append(max(waits))
            figures.commands += len(waits)
    return figures


def _in_turn(runs: int, *pairs: tuple[Asker, list[float]]) -> None:
    for number in range(_WARM_UP + runs):
        for asker, found in pairs:
            seconds = asker.ask()
            if number >= _WARM_UP:
                found.append(seconds)


@contextlib.contextmanager
def _asking(path: Path) -> Iterator[list[float]]:
    """What each command took that was given meanwhile; there is at least one."""
    asker, waits, ending = Asker(path), [], threading.Event()
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            waits.append(asker.ask())
            while not ending.is_set():
                waits.append(asker.ask())
        except (OSError, SegueError) as error:
            failures.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield waits
    finally:
        ending.set()
        thread.join()
        asker.close()
    if failures:
        raise SegueError(f"a command had no answer through the upgrade: {failures[0]}")


def _tiny(binary: Path) -> list[str]:
    """The tiny guest with nobody at its console."""
    return [
        *(str(binary), "-M", "q35", "-m", "64", "-nodefaults", "-display", "none"),
        *("-kernel", str(image()), "-serial", "null"),
    ]


@contextlib.contextmanager
def _qemu(binary: Path, place: Path) -> Iterator[Path]:
    """QEMU without Segue; the path of its QMP socket."""
    path = place / "alone.qmp"
    listener = socket.socket(socket.AF_UNIX)
    with listener:
        listener.bind(str(path))
        listener.listen()
        qmp = f"socket,id=qmp,fd={listener.fileno()},server=on,wait=off"
        process = subprocess.Popen(
            [*_tiny(binary), "-chardev", qmp, "-mon", "chardev=qmp,mode=control"],
            stdin=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
        )
    try:
        yield path
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _machine(name: str, binary: Path) -> Iterator[machines.MachineStatus]:
    _segue("run", "--name", name, "--detach", "--", *_tiny(binary))
    try:
        yield machines.find(name)
    finally:
        # Nothing in the tiny guest listens to a power button.
        _segue("stop", name, "--timeout", "0.1")


def _segue(*arguments: str) -> None:
    """The command itself, as a user would give it. Raises SegueError with what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "segue", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise SegueError(f"segue {arguments[0]}: {said[0] if said else done.returncode}")
