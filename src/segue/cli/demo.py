"""segue demo: a tiny guest that counts aloud, and its QEMU replaced three times meanwhile.

What is said of the guest is not Segue's own word: the demo is a client of the guest's serial
port, and judges what arrives there.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from segue import machines
from segue.cli import output, receipts
from segue.errors import SegueError, UsageError

if TYPE_CHECKING:
    from segue.cli.parser import Commands
    from segue.guest import Witness

_NAME = "demo"
_UPGRADES = 3
# What is shown between two upgrades, and how long a guest may keep silent before we give up.
_TICKS_SHOWN = 1500
_SILENCE = 20.0
_ENDING = 30.0

_DESCRIPTION = """\
Start a guest of about one KiB that prints a number at every timer interrupt, a
thousand a second, and replace its QEMU three times. A client on its serial
port checks that no number is missing or comes twice, and that a number drawn
at boot, which only its RAM knows, is still the same."""

_EPILOG = """\
example, two releases side by side:
  segue demo --to /opt/qemu-11/bin/qemu-system-x86_64 --to qemu-system-x86_64"""


def declare(commands: Commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="see a guest being upgraded three times",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument("--qemu", metavar="BIN", help="the QEMU to start with (default: in PATH)")
    parser.add_argument(
        "--to",
        metavar="BIN",
        action="append",
        help="the QEMU to move to; several are taken in turn (default: the first one, afresh)",
    )
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> int:
    from segue.cli.upgrade import binary

    qemu = binary(arguments.qemu) if arguments.qemu else _installed_qemu()
    targets = [binary(target) for target in arguments.to or [qemu]]
    with _ended_by_signals(), tempfile.TemporaryDirectory(prefix="segue-demo-") as folder:
        # A place of its own: nothing is left behind, and no other machine can be in the way.
        os.environ["SEGUE_RUN_DIR"] = folder
        with _machine(qemu, Path(folder)) as serial:
            _perform(serial, targets)
    return 0


def _installed_qemu() -> str:
    found = shutil.which("qemu-system-x86_64")
    if found is None:
        raise UsageError(
            "there is no qemu-system-x86_64 in PATH",
            hint="install it (Debian: apt-get install qemu-system-x86), or name one: --qemu BIN",
        )
    return found


@contextmanager
def _machine(qemu: str, folder: Path) -> Iterator[Path]:
    """The demo's machine while it runs; yields the path of its serial port's socket."""
    from segue.guest import image

    serial = folder / "serial"
    command = [
        *(qemu, "-M", "q35", "-m", "32", "-nodefaults", "-display", "none"),
        *("-serial", f"unix:{serial},server=on,wait=off", "-kernel", os.fspath(image())),
    ]
    print(f"$ segue run --name {_NAME} --detach -- {shlex.join(command)}", flush=True)
    starting: subprocess.Popen[str] | None = None
    machine: machines.MachineStatus | None = None
    try:
        with _signals_wait():
            # A session of its own: Ctrl-C is for us alone, who then wait until there is something
            # to end.
            starting = subprocess.Popen(
                [sys.executable, "-m", "segue", "run", "--name", _NAME, "--detach", "--", *command],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        _, said = starting.communicate()
        if starting.returncode:
            what, *_ = said.strip().splitlines() or ["segue: no reason was given"]
            raise SegueError(
                f"the demo's guest could not be started: {what.removeprefix('segue: ')}",
                hint="try another QEMU: segue demo --qemu BIN",
            )
        machine = machines.find(_NAME)
        yield serial
    finally:
        with _uninterrupted():
            if starting is not None:
                starting.wait(_ENDING)
                with contextlib.suppress(SegueError):  # it never came up, or is gone
                    machine = machines.find(_NAME) if machine is None else machine
                if machine is not None:
                    _end(machine)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP clean up behind us, as Ctrl-C does."""

    def end(number: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, end) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """What comes meanwhile comes at the end: a process is started and known, or neither.

    Not by a mask, which the process would inherit.
    """
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, lambda n, _: came.append(n)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Who presses Ctrl-C twice wants an end as well, but not one that leaves a guest behind."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _end(machine: machines.MachineStatus) -> None:
    """End the machine, whatever state we have left it in, and wait until it is gone."""
    from segue.cli import connection

    try:
        # The guest has no ACPI: pressing its power button would only take time.
        connection.ask(machine, "quit", timeout=_ENDING)
    except SegueError:
        pass  # it ended before it could answer; or it does not end, which is seen below
    if not machines.wait_until_gone(machine, _ENDING):
        output.tell_failure(
            "the demo's supervisor does not end",
            hint=f"kill {machine.supervisor_pid} {machine.report.get('qemu_pid')}",
        )


def _perform(serial: Path, targets: Sequence[str]) -> None:
    from segue.cli.upgrade import upgrade

    started = machines.find(_NAME).report
    with Listener(serial) as listener:
        _count(listener, _who(started["qemu_version"], started["qemu_pid"]))
        nonce = listener.witness.nonce
        print(f"  the guest drew {nonce} at boot", flush=True)
        longest = 0.0
        for number, target in zip(range(1, _UPGRADES + 1), itertools.cycle(targets), strict=False):
            print(f"\n$ segue upgrade {_NAME} --force --to {shlex.quote(target)}", flush=True)
            receipt = upgrade(machines.find(_NAME), {"to": target, "force": True})
            if receipts.exit_status(receipt):
                error = receipt["error"] or {}
                raise SegueError(
                    f"upgrade {number} failed: {error.get('what')}",
                    error.get("hint"),
                    receipt["guest"],
                )
            print(receipts.sentence(receipt), flush=True)
            longest = max(longest, receipt["blackout_seconds"] or 0.0)
            now = receipts.side(receipt, "to")
            _count(listener, _who(now["version"], now["pid"]))
            _judge(listener.witness, nonce)
        ticks = listener.witness.ticks
    print(
        f"\n{_UPGRADES + 1} QEMU processes, one guest: {ticks} ticks, none missing and none twice, "
        f"{nonce} still in its RAM, never stopped for more than {output.seconds(longest)}",
        flush=True,
    )


def _who(version: str, pid: int) -> str:
    return f"QEMU {output.version(version)}, pid {pid}"


def _judge(witness: Witness, nonce: str | None) -> None:
    if witness.faults:
        raise SegueError(f"the guest was disturbed: {witness.faults[0]}", hint="please report it")
    if witness.nonce != nonce:
        raise SegueError("this is not the guest that was started", hint="please report it")
    print(f"  every tick there, in order, and still {witness.nonce} in its RAM", flush=True)


def _count(listener: Listener, who: str) -> None:
    """Show the guest counting for a while."""
    witness = listener.witness
    first = witness.ticks
    lively = output.is_lively(sys.stdout)
    start = "\r" if lively else ""

    def enough() -> bool:
        if lively:
            print(f"\r  {who}: tick {witness.tick or 0}", end="", flush=True)
        return witness.ticks - first >= _TICKS_SHOWN and witness.nonce is not None

    listener.wait(enough)
    print(f"{start}  {who}: tick {witness.tick}", flush=True)


class Listener:
    """A client of the guest's serial port, reading all the time in a thread of its own."""

    def __init__(self, path: Path) -> None:
        from segue.guest import Witness

        self.witness = Witness()
        self._news = threading.Condition()
        self._closed = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._listen, name="serial port", daemon=True)
        self._socket.connect(os.fspath(path))

    def __enter__(self) -> Listener:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def wait(self, enough: Callable[[], bool]) -> None:
        """Until `enough()` at one of its ticks. Raises SegueError if the guest falls silent."""
        silent_since = time.monotonic()
        seen = self.witness.ticks
        with self._news:
            while not enough():
                self._news.wait(0.05)
                now = time.monotonic()
                if self.witness.ticks != seen:
                    seen, silent_since = self.witness.ticks, now
                elif self._closed or now - silent_since > _SILENCE:
                    raise SegueError(
                        "the guest fell silent" if not self._closed else "the console was closed"
                    )

    def _listen(self) -> None:
        while True:
            try:
                data = self._socket.recv(65536)
            except OSError:
                data = b""
            with self._news:
                if data:
                    self.witness.feed(data)
                else:
                    self._closed = True
                self._news.notify_all()
            if not data:
                return
