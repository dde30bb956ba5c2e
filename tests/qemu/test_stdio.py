"""A machine whose standard streams are no terminal: pipes, files, a socket, nothing, closed.

Each case is run twice, by QEMU alone and by `segue run`, and looks the same from outside: what
comes out, whether it goes on when its input has ended, and its exit status.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from segue.guest import Witness, image
from tests.qemu.harness import LIMIT, Machine, Segue, qemu, wait_until

BARE = ("-M", "q35", "-m", "64", "-nodefaults", "-display", "none")
SERIAL = (*BARE, "-kernel", str(image()), "-serial", "stdio")
# The firmware's network boot would eat what is typed early.
NOGRAPHIC = ("-M", "q35", "-m", "64", "-nographic", "-nic", "none", "-kernel", str(image()))
MONITOR = (*BARE, "-S", "-monitor", "stdio")
# What the guest's `p` is then: its end, with 2 * 1 + 1.
DEBUG_EXIT = ("-device", "isa-debug-exit,iobase=0x505")

_VARYING = re.compile(rb"(tick \d{8}|nonce [0-9a-f]{8} tick \d{8})\r\n")


class Run:
    """A command whose standard input and output are each a pipe, file, socket, null or full.

    `typed` is what a file holds from the start.
    """

    def __init__(
        self, command: list[str], segue: Segue, stdin: str, stdout: str, typed: bytes = b""
    ) -> None:
        place = segue.root.parent
        self.status: int | None = None
        self.errors = ""
        self._out = place / "out"
        self._read = bytearray()
        self._reader: threading.Thread | None = None
        (place / "in").write_bytes(typed)
        theirs, self._input, source = _streams(place, stdin, stdout)
        self.process = subprocess.Popen(
            command,
            env=segue.environment,
            stdin=theirs[0],
            stdout=theirs[1],
            stderr=subprocess.PIPE,
        )
        for fd in theirs:
            os.close(fd)
        if source >= 0:
            self._reader = threading.Thread(target=self._follow, args=(source,), daemon=True)
            self._reader.start()

    def _follow(self, source: int) -> None:
        with open(source, "rb", 0) as file:
            while chunk := file.read(65536):
                self._read += chunk

    @property
    def said(self) -> bytes:
        return bytes(self._read) if self._reader else self._out.read_bytes()

    def expect(self, text: bytes, since: int | None = None) -> None:
        """Wait until it says this, from now on or `since` it had said so many bytes."""
        start = len(self.said) if since is None else since
        wait_until(f"{text!r}", lambda: text in self.said[start:])

    def type(self, data: bytes) -> None:
        """All of it, however long that takes."""
        while data:
            data = data[os.write(self._input, data) :]

    def end_of_input(self) -> None:
        os.close(self._input)
        self._input = -1

    def end(self) -> int:
        """Its exit status, once it has ended and all that it said has been read."""
        _, errors = self.process.communicate(timeout=LIMIT)
        self.errors = errors.decode()
        if self._reader is not None:
            self._reader.join(LIMIT)
        if self._input >= 0:
            self.end_of_input()
        return self.process.returncode


def _streams(place: Path, stdin: str, stdout: str) -> tuple[tuple[int, int], int, int]:
    """(Theirs), and ours to write to and to read from; -1 for none."""
    if stdin == stdout == "socket":
        ours, theirs = (end.detach() for end in socket.socketpair())
        return (theirs, os.dup(theirs)), ours, os.dup(ours)
    reads, ours = os.pipe() if stdin == "pipe" else (-1, -1)
    source, writes = os.pipe() if stdout == "pipe" else (-1, -1)
    if reads < 0:
        reads = os.open(place / "in" if stdin == "file" else os.devnull, os.O_RDONLY)
    if writes < 0:
        path = {"file": str(place / "out"), "full": "/dev/full"}.get(stdout, os.devnull)
        writes = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    return (reads, writes), ours, source


def twice(
    segue: Segue,
    argv: tuple[str, ...],
    live: Callable[[Run], None],
    streams: str,
    typed: bytes = b"",
    same: Callable[[bytes], object] | None = None,
) -> Run:
    """Neither finds what the other has left; the run by Segue, which was as QEMU's own."""
    stdin, stdout = streams.split()
    runs = []
    for before in ([], segue.command("run", "--name", "guest", "--")):
        run = Run([*before, qemu("10.0"), *argv], segue, stdin, stdout, typed)
        try:
            live(run)
            run.status = run.end()
        finally:
            run.process.kill()
            run.process.wait()
        runs.append(run)
    plain, ours = runs
    assert ours.status == plain.status
    if stdout in ("pipe", "file", "socket"):
        same = same or what_it_said
        assert same(ours.said) == same(plain.said)
    assert not segue.leftovers()
    return ours


def what_it_said(out: bytes) -> bytes:
    """Without the firmware's dots, the guest's numbers, which are right, and a line cut off."""
    if b"segue guest" not in out:
        return out
    whole = out[out.find(b"segue guest") : out.rfind(b"\n") + 1]
    witness = Witness()
    witness.feed(whole)
    assert not witness.faults, witness.faults[:3]
    assert witness.nonces
    return _VARYING.sub(b"", whole)


def types(keys: bytes) -> Callable[[Run], None]:
    def live(run: Run) -> None:
        run.expect(b"tick 00000020", 0)
        run.type(keys)

    return live


@pytest.mark.parametrize(
    ("streams", "end"), [("pipe pipe", b"q"), ("pipe file", b"p"), ("socket socket", b"q")]
)
def test_a_guest_that_ends(segue: Segue, streams: str, end: bytes) -> None:
    """By its power button, and with an exit status of its own."""
    run = twice(segue, (*SERIAL, *DEBUG_EXIT), types(b"abc" + end), streams)
    assert run.said.count(b"got ") == 4
    assert run.status == (3 if end == b"p" else 0)
    # The supervisor's one word: it cannot know that a guest meant it.
    assert bool(run.errors) == (end == b"p")


def test_a_guest_that_ends_at_once(segue: Segue) -> None:
    """Its input lies there from the start: it is off while Segue still looks at it."""

    def off(out: bytes) -> bool:
        return what_it_said(out).endswith(b"got 71\r\n")

    for _ in range(3):
        run = twice(segue, SERIAL, lambda run: None, "file pipe", b"abcq", off)
        assert off(run.said)
        assert run.errors == ""


# The supervisor does not come to look before the guest is off.
LATE = """#!/bin/sh
case "$*" in *-kernel*) (sleep 0.7; kill -CONT $PPID) & kill -STOP $PPID;; esac
exec {qemu} "$@"
"""


@pytest.mark.parametrize(("end", "status"), [(b"q", 0), (b"p", 3)])
def test_a_guest_that_has_ended_when_segue_looks(
    segue: Segue, place: Path, end: bytes, status: int
) -> None:
    late = place / "qemu-late"
    late.write_text(LATE.format(qemu=qemu("10.0")))
    late.chmod(0o755)
    argv = [str(late), *SERIAL, *DEBUG_EXIT]
    command = segue.command("run", "--name", "guest", "--", *argv)
    run = Run(command, segue, "file", "pipe", b"abc" + end)
    assert run.end() == status, run.errors
    assert what_it_said(run.said).endswith(b"got %02x\r\n" % ord(end))
    assert not segue.leftovers()


@pytest.mark.parametrize(
    ("argv", "streams"),
    [(SERIAL, "pipe pipe"), (SERIAL, "file file"), (NOGRAPHIC, "null pipe")],
    ids=["serial-pipe", "serial-file", "nographic-null"],
)
def test_input_that_ends_is_not_the_guests_end(
    segue: Segue, argv: tuple[str, ...], streams: str
) -> None:
    def live(run: Run) -> None:
        run.expect(b"tick 00000020", 0)
        if streams == "pipe pipe":
            before = len(run.said)
            run.type(b"abc")
            run.expect(b"got 63", before)
            run.end_of_input()
        run.expect(b"nonce")
        run.process.send_signal(signal.SIGTERM)

    run = twice(segue, argv, live, streams)
    assert run.status == 0
    assert "terminating on signal 15" in run.errors


@pytest.mark.parametrize("stdout", ["null", "full"])
def test_output_that_nobody_takes(segue: Segue, stdout: str) -> None:
    def live(run: Run) -> None:
        while run.process.poll() is None:  # it is heard from the moment on that it has begun
            with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
                run.type(b"q")
                run.process.wait(0.1)

    assert twice(segue, SERIAL, live, f"pipe {stdout}").errors == ""


@pytest.mark.parametrize("streams", ["pipe pipe", "file pipe", "socket socket"])
def test_a_monitor(segue: Segue, streams: str) -> None:
    """Not a byte differs: the greeting, the echo, the answers."""
    typed = b"info name\ninfo status\nhelp quit\nquit\n"

    def live(run: Run) -> None:
        if not streams.startswith("file"):
            run.type(typed)

    run = twice(segue, MONITOR, live, streams, typed, bytes)
    assert b"QEMU 10.0.2 monitor" in run.said
    assert (run.status, run.errors) == (0, "")


@pytest.mark.parametrize(("keys", "status"), [(b"q", 0), (b"p", 3)])
def test_nographic(segue: Segue, keys: bytes, status: int) -> None:
    argv = (*NOGRAPHIC, *DEBUG_EXIT)
    assert twice(segue, argv, types(keys), "pipe pipe").status == status


MUX_KEYS = {b"\1x": b"QEMU: Terminated\n\r", b"\1cquit\n": b"QEMU 10.0.2 monitor - type 'help'"}


@pytest.mark.parametrize("keys", MUX_KEYS)
def test_keys_of_the_mux_in_a_pipe(segue: Segue, keys: bytes) -> None:
    """What the guest says goes on in between, so that only the words can be compared."""
    said = MUX_KEYS[keys]
    run = twice(segue, NOGRAPHIC, types(keys), "pipe pipe", same=lambda out: out.count(said))
    assert said in run.said
    assert run.status == 0


@pytest.mark.parametrize("streams", ["pipe pipe", "file file", "socket socket"])
def test_numbered_bytes_through_upgrades(segue: Segue, place: Path, streams: str) -> None:
    """The ticks are numbered in one direction; the other is a text in which each byte counts."""
    text = b" " * 64 + b"".join(b"%d," % number for number in range(2000))
    stdin, stdout = streams.split()
    command = segue.command("run", "--name", "guest", "--", qemu("7.2"), *SERIAL)
    run = Run(command, segue, stdin, stdout, text)
    machine = Machine(segue, "guest", run.process)
    segue.machines.append(machine)
    run.expect(b"tick 00000020", 0)
    if stdin != "file":
        threading.Thread(target=run.type, args=(text,), daemon=True).start()
    for release in ("10.0", "11.1", "7.2"):
        machine.handed_over("--to", qemu(release))
        run.expect(b"tick")
    end = b"".join(b"got %02x\r\n" % byte for byte in b"1999,")
    wait_until("the end of the text", lambda: end in _VARYING.sub(b"", run.said))
    assert segue("stop", "guest", "--timeout", "0.1").returncode == 0
    assert run.end() == 0
    out = run.said
    witness = Witness()
    witness.feed(out[out.find(b"segue guest") : out.rfind(b"\n") + 1])
    assert not witness.faults, witness.faults[:3]
    assert bytes(witness.heard).lstrip() == text.lstrip()


CLOSED = 'exec "$@" <&- >&- 2>&-'


def test_streams_that_are_closed(segue: Segue, place: Path) -> None:
    """QEMU alone refuses a guest on them, or aborts; here they are as /dev/null.

    What the supervisor opens for itself gets their numbers otherwise, and the guest would read it.
    """
    serial = ("-chardev", f"socket,id=c,path={place}/console,server=on,wait=off")
    argv = [qemu("10.0"), *SERIAL, *serial, "-device", "isa-serial,chardev=c"]
    run = segue.command("run", "--name", "guest", "--", *argv)
    process = subprocess.Popen(["sh", "-c", CLOSED, "sh", *run], env=segue.environment)
    machine = Machine(segue, "guest", process)
    segue.machines.append(machine)
    wait_until("its start", (machine.directory / "status.json").exists)
    for release in ("11.1", "10.0"):
        machine.handed_over("--to", qemu(release))
    for fd in (0, 1, 2):
        assert os.readlink(f"/proc/{process.pid}/fd/{fd}") == os.devnull
    for command in ("ls", "show guest", "upgrade guest", "stop guest --timeout 0.1"):
        shell = ["sh", "-c", CLOSED, "sh", *segue.command(*command.split())]
        assert subprocess.run(shell, env=segue.environment, timeout=LIMIT).returncode == 0
    assert machine.wait() == 0
