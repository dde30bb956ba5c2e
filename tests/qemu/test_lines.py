"""Serial lines, consoles and ports of every kind: their clients notice nothing of an upgrade.

One Linux guest has them all, with a stream of numbers in both directions on each
(tests/qemu/lines.py), and goes through every test that asks for it. What needs no Linux is tried
on the tiny guest.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.qemu.conftest import tiny, unharmed, watch
from tests.qemu.harness import Segue, cache, qemu, wait_until
from tests.qemu.lines import Line, Switchboard

RATE = 50
"""Numbers a second that the guest writes on each line."""
SERVER = "server=on,wait=off"
PORT, MUTE, FILE = (f"/dev/vport1p{n}" for n in (1, 2, 3))


class Guest:
    """Linux with a line of every kind, each with its client."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.segue = Segue(place / "run", {"SEGUE_TESTING": "1"})
        self.board = Switchboard()
        for end in ("in", "out"):
            os.mkfifo(place / f"fifo.{end}")
        self.datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.datagrams.bind(("127.0.0.1", 0))
        self.datagrams.connect(("127.0.0.1", free_port()))
        terminal, slave = pty.openpty()
        try:
            argv = self.arguments()
            self.machine = self.segue.start("lines", argv, stdin=slave, stdout=slave)
        finally:
            os.close(slave)
        self.reports = self.machine.connect(place / "reports")
        self.shell = self.machine.connect(place / "shell")
        self.add("/dev/ttyS0", terminal)
        for name, chardev in (
            ("/dev/ttyS1", "serial1"),
            ("/dev/ttyS2", "serial2"),
            ("/dev/ttyS3", "serial3"),
            ("/dev/hvc2", "hvc-unix"),
            ("/dev/hvc3", "hvc-tcp"),
            ("/dev/hvc4", "hvc-telnet"),
            ("/dev/hvc5", "hvc-pty"),
            (PORT, "port"),
        ):
            self.add(name, self.call(chardev))
        fifo = [os.open(place / f"fifo.{end}", os.O_RDWR) for end in ("out", "in")]
        self.board.add(Line("/dev/hvc6", *fifo))
        self.add("/dev/hvc7", self.datagrams.fileno())
        self.board.moving()

    def arguments(self) -> list[str]:
        unix = f"socket,{SERVER},path={self.place}/"
        tcp = f"socket,{SERVER},host=127.0.0.1,port=0"
        here, there = self.datagrams.getsockname()[1], self.datagrams.getpeername()[1]
        # Each message about a port takes one of 32 buffers: QEMU drops those that find none.
        ports = {
            1: f"{unix}port,id=port",
            2: f"{unix}mute,id=mute",
            3: f"file,id=file,path={self.place}/file",
        }
        consoles = {
            0: f"{unix}reports,id=reports",
            1: f"{unix}shell,id=shell",
            2: f"{unix}hvc,id=hvc-unix",
            3: f"{tcp},id=hvc-tcp",
            4: f"{tcp},id=hvc-telnet,telnet=on",
            5: "pty,id=hvc-pty",
            6: f"pipe,id=hvc-pipe,path={self.place}/fifo",
            7: f"udp,id=hvc-udp,host=127.0.0.1,port={here},localaddr=127.0.0.1,localport={there}",
        }
        argv = []
        for kind, chardevs in (("virtconsole", consoles), ("virtserialport", ports)):
            argv += ["-device", f"virtio-serial-pci,max_ports=31,id={kind}"]
            for number, chardev in chardevs.items():
                name = dict(pair.partition("=")[::2] for pair in chardev.split(","))["id"]
                argv += ["-chardev", chardev]
                argv += ["-device", f"{kind},bus={kind}.0,nr={number},chardev={name},name={name}"]
        streams = [f"/dev/ttyS{n}" for n in range(4)] + [f"/dev/hvc{n}" for n in range(2, 8)]
        words = "console=hvc0 quiet segue.shell=/dev/hvc1 segue.report=/dev/hvc0"
        words += f" segue.stream={','.join([*streams, PORT, FILE])} segue.stream-rate={RATE}"
        return [
            qemu("7.2"),
            *("-M", "q35", "-m", "256", "-nodefaults", "-display", "none"),
            *("-kernel", str(cache() / "linux/vmlinuz"), "-append", words),
            *("-initrd", str(cache() / "linux/initrd.img")),
            *("-serial", "stdio", "-serial", f"unix:{self.place}/serial,{SERVER}"),
            *("-serial", f"telnet:127.0.0.1:0,{SERVER}", "-serial", "pty"),
            *argv,
        ]

    def call(self, chardev: str) -> int:
        """A descriptor of a new client of this character device."""
        kept = next(k for k in self.machine.status()["kept"] if k["name"] == chardev)
        if "path" in kept["identity"]:
            return os.open(kept["identity"]["path"], os.O_RDWR | os.O_NOCTTY)
        kind, _, address = kept["identity"]["address"].partition(":")
        if kind == "unix":
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(address.partition(",")[0])
            return sock.detach()
        return socket.create_connection(("127.0.0.1", int(address.split(":")[1]))).detach()

    def add(self, name: str, fd: int) -> None:
        self.board.add(Line(name, fd, fd))

    def told(self, name: str) -> int:
        """Up to which number the guest says that all came, in order."""
        found = re.findall(rb"stream %s in-ok (\d+)\r?\n" % name.encode(), self.reports.data)
        return int(found[-1]) if found else -1

    def check(self) -> None:
        assert self.board.faults == []
        assert not re.findall(rb"stream \S+ in-BAD.*", self.reports.data)

    def settle(self) -> None:
        """Send nothing more; the guest has received every number that was sent."""
        lines = list(self.board.lines.values())
        with self.board.lock:
            for line in lines:
                line.answers = False
        self.board.wait(lambda: all(line.settled for line in lines), "all being sent")
        self.reports.wait(
            lambda: all(self.told(line.name) == line.sent - 1 for line in lines),
            f"all numbers being received; {self.board}",
        )

    def close(self) -> None:
        self.board.close()
        for line in self.board.lines.values():
            for fd in {line.reads, line.writes} - {-1, self.datagrams.fileno()}:
                os.close(fd)
        self.datagrams.close()
        self.segue.end()


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    place = Path(tempfile.mkdtemp(prefix="segue-"))
    made = Guest(place)
    try:
        yield made
        made.settle()
        made.check()
        made.shell.send(b"poweroff -f\n")
        assert made.machine.wait() == 0
        written = re.findall(rb"out (\d+)\n", (place / "file").read_bytes())
        assert len(written) > RATE
        assert [int(number) for number in written] == list(range(len(written)))
        wait_until("the end of all that was started", lambda: not made.segue.leftovers(), 10)
    finally:
        made.close()
        shutil.rmtree(place, ignore_errors=True)


def test_each_number_once_and_in_order_through_every_release(guest: Guest) -> None:
    flooded = ("/dev/ttyS1", "/dev/hvc2", "/dev/hvc5", PORT)
    for release in ("10.0", "11.1", "7.2"):
        guest.board.flood(True, *flooded)
        receipt = guest.machine.handed_over("--to", qemu(release))
        guest.board.flood(False, *flooded)
        assert not [kept for kept in receipt["kept"] if kept.get("held") is False]
        guest.board.moving()
        guest.check()


def through(guest: Guest, reexecs: int, upgrades: int) -> None:
    """A supervisor that becomes another again and again, and QEMU too, under a flood."""
    flooded = ("/dev/hvc2", PORT)
    releases = itertools.cycle(("10.0", "11.1", "7.2"))
    steps = sorted(
        [(n / reexecs, "reexec") for n in range(reexecs)]
        + [(n / upgrades, "upgrade") for n in range(upgrades)]
    )
    for _, step in steps:
        guest.board.flood(True, *flooded)
        if step == "reexec":
            done = guest.segue("reexec", "lines")
            assert done.returncode == 0, done.stderr
        else:
            guest.machine.handed_over("--to", qemu(next(releases)), "--force")
        guest.board.flood(False, *flooded)
        guest.board.moving()
        guest.check()


def test_each_number_once_and_in_order_through_newer_supervisors(guest: Guest) -> None:
    through(guest, reexecs=4, upgrades=1)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_fifty_supervisors_and_twenty_upgrades(guest: Guest) -> None:
    through(guest, reexecs=50, upgrades=20)


@pytest.mark.parametrize("name", ["/dev/ttyS1", "/dev/ttyS2", "/dev/hvc3", "/dev/hvc5"])
def test_a_client_that_does_not_read_delays_nobody(guest: Guest, name: str) -> None:
    """What it did not read waits for it, through an upgrade."""
    line = guest.board.lines[name]
    guest.board.remove(line)
    guest.machine.handed_over("--force")
    guest.board.moving()
    guest.board.add(line)
    guest.board.moving()
    guest.check()


CALLED = {"/dev/ttyS1": "serial1", "/dev/hvc4": "hvc-telnet", "/dev/hvc3": "hvc-tcp", PORT: "port"}


@pytest.mark.parametrize("name", CALLED)
def test_another_client_after_one_that_left(guest: Guest, name: str) -> None:
    """One dies, an upgrade passes, another takes the line at the same address."""
    line = guest.board.lines[name]
    guest.board.remove(line)
    os.close(line.reads)
    guest.machine.handed_over("--force")
    fd = guest.call(CALLED[name])
    line.reopened(fd, fd)
    guest.board.add(line)
    guest.board.moving()
    assert not guest.board.faults


def test_a_ports_guest_sees_its_client_come_and_go(guest: Guest) -> None:
    """A port without a client is at its end at once; with one, a reader waits."""
    shell = guest.shell
    at_end = f"timeout 5 cat {MUTE}; [ $? = 0 ] && echo 'nobody ''there'"
    assert "nobody there" in shell.command(at_end)
    client = guest.machine.connect(guest.place / "mute")
    start = len(shell.data)
    shell.command(f"while timeout 1 cat {MUTE}; do :; done; echo 'somebody ''came'")
    shell.expect(rb"somebody came", start)
    shell.command(f"(read -r line; echo 'heard '$line; cat; echo 'it ''went') <{MUTE} & true")
    guest.machine.handed_over("--force")
    client.send(b"hello\n")
    shell.expect(rb"heard hello", start)
    client.close()
    guest.machine.clients.remove(client)
    shell.expect(rb"it went", start)
    guest.machine.handed_over("--force")
    assert "nobody there" in shell.command(at_end)


def test_console_through_an_upgrade(segue: Segue, place: Path) -> None:
    guest = segue.start("guest", tiny(place, "7.2"))
    console = watch(guest, place)
    terminal, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "segue", "console", "guest"],
        env=segue.environment,
        stdin=slave,
        stdout=slave,
        stderr=slave,
    ) as process:
        os.close(slave)
        user = Terminal(terminal)
        user.expect(rb"tick \d+")
        guest.handed_over("--to", qemu("10.0"))
        user.type(b"Z")
        user.expect(rb"got 5a")
        user.type(b"\x1d")
        assert process.wait(10) == 0
        user.expect(rb"detached")
    user.close()
    unharmed(console)


def test_ctrl_a_and_a_monitor_through_an_upgrade(segue: Segue) -> None:
    """`-nographic`: what was half typed at the monitor is still there on the next QEMU."""
    argv = [a for a in tiny(segue.root, "7.2") if a not in ("-display", "none", "-nodefaults")]
    argv = [*argv[: argv.index("-serial")], "-nographic"]
    terminal, slave = pty.openpty()
    guest = segue.start("guest", argv, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    user = Terminal(terminal)
    user.expect(rb"tick \d+")
    user.type(b"\x01c")
    user.expect(rb"QEMU 7\.2\.\d+ monitor.*\(qemu\) ")
    user.type(b"info sta")
    user.expect(rb"info sta")
    guest.handed_over("--to", qemu("10.0"))
    user.type(b"tus\r")
    user.expect(rb"VM status: running")
    user.type(b"info version\r")
    user.expect(rb"\n10\.0\.")
    user.type(b"\x01cW")
    user.expect(rb"got 57")
    guest.handed_over("--to", qemu("11.1"))
    user.type(b"\x01h")
    user.expect(rb"exit emulator")
    user.type(b"\x01x")
    assert guest.wait() == 0
    user.expect(rb"QEMU: Terminated")
    user.close()


class Terminal:
    """The user's side of a terminal."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.data = b""

    def type(self, keys: bytes) -> None:
        os.write(self.fd, keys)

    def expect(self, pattern: bytes) -> None:
        """Read until `pattern` comes; what precedes its end is forgotten."""
        os.set_blocking(self.fd, False)

        def found() -> re.Match[bytes] | None:
            with contextlib.suppress(BlockingIOError):
                self.data += os.read(self.fd, 65536)
            return re.search(pattern, self.data, re.DOTALL)

        try:
            match = wait_until(f"{pattern!r} on the terminal", found)
        except (AssertionError, OSError):
            raise AssertionError(f"no {pattern!r}; read {self.data[-500:]!r}") from None
        self.data = self.data[match.end() :]

    def close(self) -> None:
        os.close(self.fd)
