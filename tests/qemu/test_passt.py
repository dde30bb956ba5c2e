"""User networking through upgrades: Debian 13's passt, and the relay of frames in front of it.

As a user has it: the guest at 10.0.2.15, the host's own addresses at 10.0.2.2, a forwarded port.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.qemu.conftest import tiny
from tests.qemu.harness import LIMIT, Segue, alive, passt, qemu, wait_until
from tests.qemu.netns import Namespace, Stream
from tests.qemu.test_network import ECHO, Guest, kept, linux

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace takes root")

GATEWAY, ADDRESS, PORT = "10.0.2.2", "10.0.2.15", 2222
FORWARD = f"hostfwd=tcp:127.0.0.1:{PORT}-:{ECHO}"


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    """With what passt looks for: an interface with a default route."""
    made = Namespace()
    for command in (
        "ip link add up0 type veth peer name up1",
        "ip address add 192.0.2.1/24 dev up0",
        "ip link set up1 up",
        "ip link set up0 up",
        "ip route add default via 192.0.2.254",
    ):
        made.run(*command.split())
    yield made
    made.close()


@pytest.fixture
def command(segue: Segue) -> Segue:
    segue.environment["PATH"] = f"{passt()}:{os.environ['PATH']}"
    return segue


class UserGuest(Guest):
    address = ADDRESS

    def inbound_socket(self) -> socket.socket:
        """By the forwarded port; passt takes a connection before it knows that the guest does."""
        self.shell.command(f"(nc -l -p {ECHO} -e cat &)")

        def connected() -> socket.socket | None:
            with contextlib.suppress(OSError), self.namespace.inside():
                connection = socket.create_connection(("127.0.0.1", PORT), 1)
                with contextlib.ExitStack() as stack:
                    stack.enter_context(connection)
                    connection.sendall(b"?")
                    if connection.recv(1) == b"?":
                        stack.pop_all()
                        connection.settimeout(60)
                        return connection
            return None

        connection: socket.socket = wait_until("a connection to the guest", connected)
        return connection

    def listens(self, port: int) -> None:
        """Wait until somebody in the guest does."""
        wait_until(
            f"somebody at port {port}",
            lambda: f":{port} " in self.shell.command("netstat -lnt"),
        )

    def outbound(self, host: str = "127.0.0.1") -> Stream:
        return super().outbound(host)

    def outbound_socket(self, host: str = "127.0.0.1") -> socket.socket:
        with self.namespace.inside():
            listener = socket.create_server((host, 0))
        with listener:
            listener.settimeout(60)
            self.shell.command(f"(nc {GATEWAY} {listener.getsockname()[1]} -e cat &)")
            connection, _ = listener.accept()
        connection.settimeout(60)
        return connection


def guest(command: Segue, place: Path, namespace: Namespace, *network: str) -> UserGuest:
    argv = [word.replace("192.0.2.2/24", f"{ADDRESS}/24") for word in linux(place, *network)]
    return UserGuest(command, place, namespace, argv)


def test_connections_both_ways_outlive_every_release(
    command: Segue, place: Path, namespace: Namespace
) -> None:
    network = ("-netdev", f"user,id=n0,{FORWARD}", "-device", "virtio-net-pci,netdev=n0")
    one = guest(command, place, namespace, *network)
    streams = [one.inbound(), one.outbound()]
    first = kept(one.machine.status(), "passt")["identity"]
    for release in ("10.0", "11.1", "10.0", "7.2"):
        receipt = one.machine.handed_over("--to", qemu(release))
        assert receipt["not_kept"] == []
        assert kept(receipt, "passt")["held"]
        assert kept(receipt, "passt")["identity"] == first
        for stream in streams:
            stream.wait()
    for stream in streams:
        stream.end()
    one.outbound().end()
    one.machine.stop()
    one.machine.wait()
    wait_until("the end of passt", lambda: not alive(first["pid"]), 10)


def test_connections_outlive_the_supervisor_s_code(
    command: Segue, place: Path, namespace: Namespace
) -> None:
    network = ("-netdev", f"user,id=n0,{FORWARD}", "-device", "virtio-net-pci,netdev=n0")
    one = guest(command, place, namespace, *network)
    streams = [one.inbound(), one.outbound()]
    first = kept(one.machine.status(), "passt")["identity"]
    for release in ("10.0", "7.2"):
        for _ in range(2):
            with namespace.inside():
                assert command("reexec", "net").returncode == 0
            for stream in streams:
                stream.wait()
        receipt = one.machine.handed_over("--to", qemu(release))
        assert kept(receipt, "passt")["identity"] == first
    for stream in streams:
        stream.end()


class Session:
    """A shell in the guest over one connection, as by ssh: it is told to count, again and again."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(LIMIT)
        self._lines = connection.makefile("rw", newline="\n")
        self._connection = connection
        self.answers: list[str] = []
        self.slowest = 0.0
        self._ending = False
        self._came = threading.Condition()
        self._thread = threading.Thread(target=self._talk, daemon=True)
        self._thread.start()

    def _talk(self) -> None:
        with contextlib.suppress(OSError):
            while not self._ending:
                asked = time.monotonic()
                self._lines.write("n=$((n + 1)); echo $$ $n\n")
                self._lines.flush()
                answer = self._lines.readline()
                self.slowest = max(self.slowest, time.monotonic() - asked)
                with self._came:
                    self.answers.append(answer)
                    self._came.notify_all()
                time.sleep(0.005)

    def wait(self, more: int = 20) -> None:
        with self._came:
            wanted = len(self.answers) + more
            assert self._came.wait_for(lambda: len(self.answers) >= wanted, LIMIT), "no answers"

    def end(self) -> None:
        """It was one and the same shell, and missed no word."""
        self._ending = True
        self._thread.join(LIMIT)
        self._lines.close()
        self._connection.close()
        pid = self.answers[0].split()[0]
        assert self.answers == [f"{pid} {n + 1}\n" for n in range(len(self.answers))]


class Callers:
    """A new connection to a forwarded port each time the last has had its answer and ended."""

    def __init__(self, namespace: Namespace, port: int) -> None:
        self._namespace, self._port = namespace, port
        self.served = 0
        self.failed: list[str] = []
        self._ending = False
        self._came = threading.Condition()
        self._thread = threading.Thread(target=self._call, daemon=True)
        self._thread.start()

    def _call(self) -> None:
        while not self._ending:
            question, began = os.urandom(32), time.monotonic()
            try:
                with self._namespace.inside():
                    connection = socket.create_connection(("127.0.0.1", self._port), LIMIT)
                with connection:
                    connection.sendall(question)
                    answer = connection.recv(len(question), socket.MSG_WAITALL)
                if answer != question:
                    self.failed.append(f"call {self.served}: {answer!r} came back")
            except OSError as error:
                self.failed.append(
                    f"call {self.served}, after {time.monotonic() - began:.3f} s: {error}"
                )
            with self._came:
                self.served += 1
                self._came.notify_all()
            time.sleep(0.02)

    def wait(self, more: int = 3) -> None:
        with self._came:
            wanted = self.served + more
            assert self._came.wait_for(lambda: self.served >= wanted, LIMIT), "no answers"

    def end(self) -> None:
        self._ending = True
        self._thread.join(LIMIT)
        assert self.failed == []


@pytest.mark.parametrize("upgrades", [3, pytest.param(20, marks=pytest.mark.long)])
def test_a_session_and_a_listening_port(
    command: Segue, place: Path, namespace: Namespace, upgrades: int
) -> None:
    """A shell over one connection, ports of the guest that are called all the time, and data."""
    shell, echo = PORT + 1, PORT + 2
    forwards = f"hostfwd=tcp:127.0.0.1:{shell}-:23,hostfwd=tcp:127.0.0.1:{echo}-:7,{FORWARD}"
    network = ("-netdev", f"user,id=n0,{forwards}", "-device", "virtio-net-pci,netdev=n0")
    one = guest(command, place, namespace, *network)
    for port, program in ((23, "sh"), (7, "cat")):
        one.shell.command(f"(nc -ll -p {port} -e {program} 2>/dev/null &)")
        one.listens(port)
    # First what the guest sends: only then passt knows its MAC address.
    streams = [one.outbound(), one.inbound()]
    with namespace.inside():
        session = Session(socket.create_connection(("127.0.0.1", shell), LIMIT))
    callers = Callers(namespace, echo)
    parts: list[Session | Callers | Stream] = [session, callers, *streams]
    session.wait()
    for number in range(upgrades):
        receipt = one.machine.handed_over("--to", qemu(("10.0", "11.1", "7.2")[number % 3]))
        assert receipt["not_kept"] == []
        for part in parts:
            part.wait()
    for part in parts:
        part.end()
    sys.stdout.write(
        f"{upgrades} upgrades: {len(session.answers)} answers of one shell, the slowest after "
        f"{session.slowest * 1000:.0f} ms; {callers.served} calls; "
        f"{sum(s.sent for s in streams)} bytes"
    )


def test_a_guest_that_is_shut_in(command: Segue, place: Path, namespace: Namespace) -> None:
    """restrict=on: it answers who calls, and reaches nobody by itself, before and after."""
    network = ("-netdev", f"user,id=n0,restrict=on,{FORWARD}")
    one = guest(command, place, namespace, *network, "-device", "virtio-net-pci,netdev=n0")
    with namespace.inside():
        listener = socket.create_server(("127.0.0.1", 0))
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        datagrams.bind(("127.0.0.1", 0))
    port, udp = listener.getsockname()[1], datagrams.getsockname()[1]
    with listener, datagrams:
        listener.setblocking(False)
        datagrams.setblocking(False)
        called = one.inbound()
        for release in ("11.1", "7.2"):
            assert "nc: timed out" in one.shell.command(f"timeout 5 nc -w 1 {GATEWAY} {port}")
            one.shell.command(f"echo x | nc -u -w 1 {GATEWAY} {udp}")
            assert "100% packet loss" in one.shell.command(f"ping -c 2 -W 1 {GATEWAY}")
            for sock in (listener, datagrams):
                with pytest.raises(BlockingIOError):
                    sock.accept() if sock is listener else sock.recv(1)
            receipt = one.machine.handed_over("--to", qemu(release))
            assert receipt["not_kept"] == []
            assert kept(receipt, "passt")["held"]
            called.wait()
            with namespace.inside():
                assert command("reexec", "net").returncode == 0
        called.end()
        one.inbound().end()


def test_a_passt_that_dies_is_started_again(
    command: Segue, place: Path, namespace: Namespace
) -> None:
    network = ("-netdev", f"user,id=n0,{FORWARD}", "-device", "virtio-net-pci,netdev=n0")
    one = guest(command, place, namespace, *network)
    one.inbound().end()
    first = kept(one.machine.status(), "passt")["identity"]["pid"]
    os.kill(first, signal.SIGKILL)
    one.inbound().end()
    one.machine.handed_over("--to", qemu("10.0"))
    one.outbound().end()
    assert kept(one.machine.status(), "passt")["identity"]["pid"] != first


@pytest.mark.parametrize(
    "words",
    [
        "",
        "-nic user,model=virtio-net-pci,mac=52:54:00:aa:00:01",
        "-nic user,model=e1000e -nic user",
        "-nic user,model=e1000e -nic none -nic hubport,hubid=7,model=virtio-net-pci",
        "-net nic,model=virtio-net-pci -net user",
        "-netdev user,id=a -device virtio-net,netdev=a -netdev user,id=b -device e1000,netdev=b",
    ],
)
def test_the_guest_has_the_same_cards_as_with_slirp(
    command: Segue, place: Path, namespace: Namespace, words: str
) -> None:
    """In the same places and with the same addresses, whoever serves the network."""
    seen = []
    for how in ("slirp", "passt"):
        machine = tiny(place, "7.2", *words.split(), machine="pc")
        machine.remove("-nodefaults")
        with namespace.inside():
            started = command.start(how, machine, f"--net-user={how}")
        started.handed_over("--to", qemu("11.1"))
        with started.qmp() as qmp:
            buses = qmp.command("query-pci")
            text = qmp.command("human-monitor-command", {"command-line": "info network"})
        cards = [
            (device["slot"], device["id"])
            for device in buses[0]["devices"]
            if device["class_info"]["class"] == 0x200
        ]
        seen.append((cards, re.findall("macaddr=(.*)", text)))
        assert len([k for k in started.status()["kept"] if k["kind"] == "passt"]) == (
            (words.count("user") or not words) * (how == "passt")
        )
        started.stop()
        started.wait()
    assert seen[0] == seen[1]
    assert seen[0][0]
