"""What systemd would be told, and what it would pass: by a datagram socket, as none runs here."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from segue.cpr import Descriptor, Misuse, State, section
from segue.cpr.systemd import Notifier, installed_version, listen_fds, reload_lines


class Manager:
    """systemd's end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(address.replace("@", "\0", 1))
        self.sock.settimeout(60)

    def heard(self) -> tuple[list[str], list[int]]:
        data, descriptors, _, _ = socket.recv_fds(self.sock, 4096, 253)
        return data.decode().split("\n"), descriptors


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    path = str(tmp_path / "notify")
    address = path if request.param == "path" else f"@{path}"
    manager = Manager(address)
    with manager.sock:
        yield manager


def test_the_life_of_a_service(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
    notifier = Notifier.from_environment()
    assert os.environ["NOTIFY_SOCKET"] == manager.address
    assert notifier.ready("up\nand well")
    assert manager.heard() == (["READY=1", "STATUS=up and well"], [])
    before = time.monotonic_ns() // 1000
    assert notifier.reloading()
    [reloading, stamp], _ = manager.heard()
    assert reloading == "RELOADING=1"
    assert stamp.startswith("MONOTONIC_USEC=")
    assert before <= int(stamp.partition("=")[2]) <= time.monotonic_ns() // 1000
    assert notifier.status("almost")
    assert notifier.main_pid(4711)
    assert notifier.stopping()
    assert [manager.heard()[0] for _ in range(3)] == [
        ["STATUS=almost"],
        ["MAINPID=4711"],
        ["STOPPING=1"],
    ]


def test_the_descriptor_store(manager: Manager) -> None:
    notifier = Notifier(manager.address)
    with socket.socket() as first, socket.socket() as second:
        assert notifier.store("clients", [first.fileno(), Descriptor.of("b", second)])
        lines, stored = manager.heard()
        assert lines == ["FDSTORE=1", "FDNAME=clients"]
        for fd, sock in zip(stored, (first, second), strict=True):
            assert os.path.sameopenfile(fd, sock.fileno())
            os.close(fd)
        # More than one message takes.
        assert notifier.store("many", [first.fileno()] * 300)
        counts = []
        for _ in range(2):
            lines, stored = manager.heard()
            assert lines == ["FDSTORE=1", "FDNAME=many"]
            counts.append(len(stored))
            for fd in stored:
                os.close(fd)
        assert counts == [253, 47]
        assert notifier.store("terminal", [first.fileno()], poll=False)
        lines, [fd] = manager.heard()
        assert lines == ["FDSTORE=1", "FDNAME=terminal", "FDPOLL=0"]
        os.close(fd)
    assert notifier.remove("clients")
    assert manager.heard() == (["FDSTOREREMOVE=1", "FDNAME=clients"], [])


def test_a_barrier_waits_until_all_has_been_acted_on(manager: Manager) -> None:
    notifier = Notifier(manager.address)
    done = threading.Event()

    def act() -> None:
        lines, [fd] = manager.heard()
        assert lines == ["BARRIER=1"]
        done.set()
        os.close(fd)

    acting = threading.Thread(target=act)
    acting.start()
    assert notifier.barrier()
    assert done.is_set()
    acting.join()
    # One that reads nothing is waited for no longer than is asked.
    assert not notifier.barrier(timeout=0)
    assert not Notifier(None).barrier()


def test_a_manager_that_reads_nothing_holds_nobody_up(manager: Manager) -> None:
    notifier = Notifier(manager.address, timeout=0)
    while notifier.status("the queue is not full yet"):
        pass
    assert manager.heard()[0] == ["STATUS=the queue is not full yet"]
    assert notifier.status("there is room again")


@pytest.mark.parametrize("name", ["", "a:b", "a\nb", "ü", "x" * 256])
def test_names_that_systemd_would_refuse(name: str) -> None:
    with pytest.raises(Misuse, match="no descriptor name"):
        Notifier(None).store(name, [])
    with pytest.raises(Misuse, match="no descriptor name"):
        Notifier(None).remove(name)


@pytest.mark.parametrize("address", [None, "/no/such/socket", "vsock:2:1234"])
def test_without_systemd_nothing_happens(address: str | None) -> None:
    notifier = Notifier(address)
    assert not notifier.ready()
    assert not notifier.store("name", [0])


def test_no_variable_no_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not Notifier.from_environment().ready()
    assert listen_fds({}) == ()
    for odd in (
        {"LISTEN_FDS": "1"},
        {"LISTEN_FDS": "1", "LISTEN_PID": "1"},
        {"LISTEN_FDS": "x", "LISTEN_PID": str(os.getpid())},
        {"LISTEN_FDS": "1", "LISTEN_PID": "x"},
    ):
        assert listen_fds(odd) == ()
        assert odd == {}


ACTIVATED = """
import os, sys
from segue.cpr.systemd import listen_fds
passed = listen_fds()
again = listen_fds()
print([(d.name, d.fd, os.get_inheritable(d.fd)) for d in passed], again,
      [name for name in os.environ if name.startswith("LISTEN_")])
"""


@pytest.mark.parametrize(
    ("names", "expected"),
    [("web:store", ["web", "store"]), ("web:web", ["web", "web"]), (None, ["unknown"] * 2)],
)
def test_what_systemd_passes(names: str | None, expected: list[str]) -> None:
    # The shell becomes the service, so that LISTEN_PID is right, as systemd does it.
    shell = 'exec 3</dev/null 4</dev/zero; export LISTEN_PID=$$; exec "$@"'
    environment = {**os.environ, "LISTEN_FDS": "2"}
    if names is not None:
        environment["LISTEN_FDNAMES"] = names
    done = subprocess.run(
        ["sh", "-c", shell, "sh", sys.executable, "-c", ACTIVATED],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = expected
    assert done.stdout == f"[('{first}', 3, False), ('{second}', 4, False)] () []\n"


@section("stored", version=1)
@dataclass(frozen=True)
class Stored:
    client: Descriptor


def test_a_state_file_with_descriptors_from_the_store(manager: Manager, tmp_path: Path) -> None:
    """As after a crash: the state from a file, the descriptors from whoever held them."""
    ours, theirs = socket.socketpair()
    with theirs:
        (tmp_path / "state").write_bytes(State(Stored(Descriptor.of("client", ours))).dump())
        assert Notifier(manager.address).store("client", [ours.fileno()])
        ours.close()
        _, [fd] = manager.heard()
        data = (tmp_path / "state").read_bytes()
        stored = State.parse(data, Stored, descriptors={"client": fd}).get(Stored)
        with stored.client.socket() as client:
            client.sendall(b"still here")
            assert theirs.recv(100) == b"still here"


def test_the_lines_of_a_unit() -> None:
    assert reload_lines(253) == "Type=notify-reload\n"
    assert reload_lines(252) == "Type=notify\nExecReload=kill -HUP $MAINPID\n"


@pytest.mark.parametrize(
    ("says", "version"),
    [
        ("echo 'systemd 252 (252.38-1~deb12u1)'", 252),
        ("echo 'systemd 257~rc1 (257~rc1-1)'", 257),
        ("echo nonsense", None),
        ("exit 1", None),
    ],
)
def test_the_installed_version(
    says: str, version: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(f"#!/bin/sh\n{says}\n")
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert installed_version() == version
    if version is None:
        assert reload_lines() == reload_lines(252)
    systemctl.unlink()
    assert installed_version() is None
