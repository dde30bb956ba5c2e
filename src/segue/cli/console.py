"""segue console: this terminal on a machine's first serial console.

Bytes go through as they are, in both directions. On a terminal, Ctrl-] detaches; the terminal is
put back as it was, however this ends. When a piped stdin ends, the output is shown on until the
console closes: nothing tells when a guest has answered.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import termios
import tty
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from segue import machines
from segue.cli import output
from segue.errors import NotRunning, SegueError

if TYPE_CHECKING:
    from segue.cli.parser import Commands

_DETACH = b"\x1d"  # Ctrl-]
_CHUNK = 65536

_DESCRIPTION = """\
Attach to the first serial console of a machine. Every key goes to the guest,
Ctrl-C too; Ctrl-] detaches. Input may also come from a pipe; when that ends,
what the guest prints is shown on until its console is closed (or Ctrl-C)."""


def declare(commands: Commands) -> None:
    parser = commands.add_parser(
        "console", help="attach to the serial console", description=_DESCRIPTION
    )
    parser.add_argument("name", metavar="NAME", help="the machine")
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> int:
    machine = machines.find(arguments.name)
    with _connect(machine) as sock, _woken() as woken, _raw(sys.stdin.fileno()) as terminal:
        if terminal:
            output.say(f"attached to {machine.name}; Ctrl-] detaches\r")
        detached = _relay(sock, sys.stdin.fileno(), sys.stdout.fileno(), terminal, woken)
        if terminal:
            said = "detached" if detached else "the console was closed"
            output.say(f"\r\n{said}\r")
    return 0


def _connect(machine: machines.MachineStatus) -> socket.socket:
    path = machine.directory.console
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(os.fspath(path))
    except FileNotFoundError:
        sock.close()
        raise SegueError(
            f"machine {machine.name} has no console to attach to",
            hint="its first serial port is connected elsewhere, or it has none",
        ) from None
    except OSError as error:
        sock.close()
        raise NotRunning(
            f"the console of machine {machine.name} does not answer: {error.strerror}"
        ) from error
    return sock


@contextmanager
def _raw(fd: int) -> Iterator[bool]:
    """A terminal in raw mode for a while; says whether `fd` is one."""
    if not os.isatty(fd):
        yield False
        return
    before = termios.tcgetattr(fd)
    handlers = {
        number: signal.signal(number, _end_by_signal) for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        tty.setraw(fd)
        yield True
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _end_by_signal(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


@contextmanager
def _woken() -> Iterator[int]:
    """What is readable once a signal has come: one that comes just before select() ends it too."""
    woken, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(waker)
    try:
        yield woken
    finally:
        signal.set_wakeup_fd(before)
        os.close(woken)
        os.close(waker)


def _relay(sock: socket.socket, source: int, sink: int, terminal: bool, woken: int) -> bool:
    """Move bytes until the console closes (False) or the user detaches (True)."""
    sock.setblocking(False)
    to_guest = b""
    sources = [source]
    while True:
        # While the guest does not read, we do not either: what was not typed needs no buffer.
        listened = sources if len(to_guest) < _CHUNK else []
        readable, _, _ = select.select(
            [sock.fileno(), woken, *listened], [sock.fileno()] if to_guest else [], []
        )
        detach = b""
        if source in readable:
            typed = os.read(source, _CHUNK)
            if not typed:
                sources.clear()
            elif terminal:
                typed, detach, _ = typed.partition(_DETACH)
            to_guest += typed
        if to_guest:
            try:
                to_guest = to_guest[sock.send(to_guest) :]
            except BlockingIOError:
                pass
            except OSError:
                return False
        if detach:
            return True
        if sock.fileno() in readable and not _show(sock, sink):
            return False


def _show(sock: socket.socket, sink: int) -> bool:
    try:
        shown = sock.recv(_CHUNK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    rest = memoryview(shown)
    while rest:
        rest = rest[os.write(sink, rest) :]
    return bool(shown)
