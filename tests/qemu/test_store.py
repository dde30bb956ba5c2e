"""A service whose QEMU dies: its guest boots again, and its consoles' clients are still there."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from segue.guest import Witness
from tests.qemu.conftest import tiny
from tests.qemu.harness import Client, Machine, Segue, alive, qemu, wait_until
from tests.qemu.manager import Manager

NAME = "served"


class Service:
    """One machine of every kind of entrance, as systemd has it."""

    def __init__(self, segue: Segue, place: Path) -> None:
        self.segue, self.place = segue, place
        self.manager = Manager(place)
        self._config = place / "config/segue/machines"
        self._config.mkdir(parents=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.write()
        self.process = self._start()
        self.machine = Machine(segue, NAME, self.process)
        self.clients: list[Client] = []

    def write(self, *more: str) -> None:
        argv = tiny(
            self.place,
            "7.2",
            *("-qmp", f"tcp:127.0.0.1:{self.port},server=on,wait=off"),
            *("-device", "virtio-serial-pci"),
            *("-chardev", f"pty,id=p0,path={self.place}/pty"),
            *("-device", "virtconsole,chardev=p0"),
            *more,
        )
        (self._config / NAME).write_text(shlex.join(argv))

    def _start(self) -> subprocess.Popen[bytes]:
        return self.manager.start(self.segue, NAME, {"SEGUE_CONFIG_DIR": str(self._config.parent)})

    def again(self) -> None:
        """As Restart= does it."""
        self.process = self.machine.process = self._start()

    def connect(self, path: Path) -> Client:
        client = Client.unix(path)
        self.clients.append(client)
        return client

    @contextlib.contextmanager
    def monitor(self) -> Iterator[BinaryIO]:
        """A client of the user's own monitor, which has connected."""
        with (
            socket.create_connection(("127.0.0.1", self.port), 60) as sock,
            sock.makefile("rb") as lines,
        ):
            yield lines

    def console(self) -> Client:
        client = self.connect(self.place / "console")
        boots(client)
        return client

    def stored(self, *names: str) -> None:
        """Wait until that is stored, beside what is always."""
        wanted = sorted(["control0.listener0", f"{self.serial}.listener0", self.pty, *names])
        self.manager.wait(lambda: self.manager.names == wanted, f"{wanted} in the store")

    @property
    def serial(self) -> str:
        return self._of("kept", "listener0")

    @property
    def pty(self) -> str:
        return self._of("kept", "master") + ".master"

    def _of(self, kind: str, what: str) -> str:
        self.manager.wait(
            lambda: any(n.startswith(kind) and n.endswith(what) for n in self.manager.names),
            f"{what} in the store",
        )
        found = [n for n in self.manager.names if n.startswith(kind) and n.endswith(what)]
        assert len(found) == 1
        return found[0].removesuffix("." + what)

    def kill_qemu(self) -> None:
        os.kill(self.machine.qemu_pid, signal.SIGKILL)
        assert self.process.wait(60) == 128 + signal.SIGKILL

    def close(self) -> None:
        for client in self.clients:
            client.close()
        if self.process.poll() is None:
            self.segue("stop", NAME, "--timeout", "1")
            self.process.wait(60)
        self.manager.close()


def boots(client: Client) -> None:
    """From here on each byte is checked of a guest that boots, or runs."""
    client.witness = witness = Witness()
    client.wait(lambda: witness.ticks > 20, "the guest's ticks")
    assert not witness.faults, witness.faults


@pytest.fixture
def service(segue: Segue, place: Path) -> Iterator[Service]:
    made = Service(segue, place)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("supervisor_too", [False, True], ids=["qemu", "both"])
def test_clients_of_consoles_see_the_guest_boot_again(
    service: Service, supervisor_too: bool
) -> None:
    console = service.console()
    viewer = service.connect(service.machine.directory / "console.sock")
    service.stored(f"{service.serial}.socket", f"{service.serial[:-4]}.viewer0")
    terminal = os.readlink(service.place / "pty")
    slave = os.open(terminal, os.O_RDWR | os.O_NOCTTY)
    before = service.machine.qemu_pid
    with service.monitor() as early:
        assert b"QMP" in early.readline()
        if supervisor_too:
            os.kill(service.process.pid, signal.SIGKILL)
            service.process.wait()
            os.kill(before, signal.SIGKILL)
            wait_until("QEMU's death", lambda: not alive(before))
        else:
            service.kill_qemu()
        assert early.readline() == b"", "a monitor of a dead QEMU"
    # The port listens all the while.
    with service.monitor() as meanwhile:
        service.again()
        assert b"QMP" in meanwhile.readline()
    assert service.machine.qemu_pid != before
    for client in (console, viewer):
        boots(client)
    assert os.readlink(service.place / "pty") == terminal
    os.write(slave, b"x")
    os.close(slave)
    service.stored(f"{service.serial}.socket", f"{service.serial[:-4]}.viewer0")


def test_the_store_holds_nothing_that_is_gone(service: Service) -> None:
    console = service.console()
    service.stored(f"{service.serial}.socket")
    assert service.segue("reexec", NAME).returncode == 0
    console.close()
    service.stored()
    console = service.console()
    service.stored(f"{service.serial}.socket")
    service.machine.handed_over("--to", qemu("10.0"))
    service.stored(f"{service.serial}.socket")
    service.segue("stop", NAME, "--timeout", "1")
    assert service.process.wait(60) == 0
    console.wait(lambda: console.closed, "the end")
    service.manager.wait(lambda: not service.manager.names, "an empty store")


def test_a_supervisor_that_is_killed_alone(service: Service) -> None:
    """Its QEMU has them all: what systemd passes makes no second of anything."""
    console = service.console()
    service.stored(f"{service.serial}.socket")
    before = service.machine.qemu_pid
    os.kill(service.process.pid, signal.SIGKILL)
    service.process.wait()
    service.again()
    assert service.machine.qemu_pid == before
    boots(console)
    service.stored(f"{service.serial}.socket")
    console.close()
    service.stored()


def test_another_command_line_begins_with_nothing(service: Service) -> None:
    """Its ports are free by then."""
    console = service.console()
    service.stored(f"{service.serial}.socket")
    service.kill_qemu()
    service.write("-device", "virtio-rng-pci")
    service.again()
    console.wait(lambda: console.closed, "the end of the old client")
    service.console()
    with service.monitor() as monitor:
        assert b"QMP" in monitor.readline()
    service.stored(f"{service.serial}.socket")
