"""Descriptors that a client, or whoever started the machine, gives QEMU: every QEMU has them."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError

from tests.qemu.conftest import tiny, unharmed, watch
from tests.qemu.harness import Client, Machine, Segue, qemu, wait_until

ROUND = ("10.0", "11.1", "7.2")


def test_descriptors_of_clients(segue: Segue, place: Path) -> None:
    """`getfd` and `add-fd` take descriptors, and a new QEMU has those that clients still lend."""
    guest = segue.start("guest", tiny(place, "7.2"))
    console = watch(guest, place)
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(guest.directory / "qmp.sock"))
    greeting = Client(sock)
    guest.clients.append(greeting)
    greeting.send(b'{"execute":"qmp_capabilities"}')
    greeting.expect(rb'"return": \{\}')

    def lend(command: bytes) -> None:
        start = len(greeting.data)
        with (place / "file").open("w+b") as file:
            file.write(b"lent")
            file.flush()
            socket.send_fds(sock, [command], [file.fileno()])
        greeting.expect(rb'"return"', start)

    lend(b'{"execute":"getfd","arguments":{"fdname":"lent"}}')
    lend(b'{"execute":"add-fd","arguments":{"fdset-id":7,"opaque":"a file"}}')
    with guest.qmp() as client:
        for release in ROUND:
            guest.handed_over("--to", qemu(release))
            (fdset,) = client.command("query-fdsets")
            assert fdset["fdset-id"] == 7
            assert [fd["opaque"] for fd in fdset["fds"]] == ["a file"]
        client.command("closefd", {"fdname": "lent"})
        with pytest.raises(ExecuteError):
            client.command("closefd", {"fdname": "lent"})
        client.command("remove-fd", {"fdset-id": 7})
        guest.handed_over("--to", qemu("10.0"))
        assert client.command("query-fdsets") == []
    unharmed(console)


def test_a_descriptor_that_qemu_has_left_is_nobodys(segue: Segue, place: Path) -> None:
    """One that came with a command that was wrong: `getfd` without any takes it, in plain QEMU."""
    guest = segue.start("guest", tiny(place, "7.2"))
    console = watch(guest, place)
    with socket.socket(socket.AF_UNIX) as sock, (place / "file").open("w") as file:
        sock.connect(str(guest.directory / "qmp.sock"))
        client = Client(sock)
        guest.clients.append(client)
        client.send(b'{"execute":"qmp_capabilities"}')
        client.expect(rb'"return": \{\}')
        wrong = b'{"execute":"getfd","arguments":{"name":"x"}}'
        socket.send_fds(sock, [wrong], [file.fileno()])
        client.expect(b"'fdname' is missing")
        for line in (
            b'{"execute":"getfd","arguments":{"fdname":"x"}}',
            b'{"execute":"add-fd","arguments":{"fdset-id":7}}',
            b'{"execute":"add-fd"}',
        ):
            start = len(client.data)
            client.send(line)
            client.expect(b"No file descriptor supplied via SCM_RIGHTS", start)
    guest.handed_over("--to", qemu("10.0"))
    unharmed(console)


def test_descriptors_of_the_command_line(segue: Segue, place: Path) -> None:
    """`-add-fd`, with a disk behind it: each QEMU has the same open file."""
    image = place / "image"
    image.write_bytes(bytes(1 << 20))
    with image.open("r+b") as file:
        fd = file.fileno()
        image.unlink()
        argv = tiny(
            place,
            "7.2",
            *("-add-fd", f"fd={fd},set=3,opaque=rdwr:image"),
            *("-blockdev", "driver=file,node-name=disk,filename=/dev/fdset/3"),
            *("-device", "virtio-blk-pci,drive=disk"),
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "segue", "run", "--name", "guest", "--", *argv],
            env=segue.environment,
            stdin=subprocess.DEVNULL,
            pass_fds=[fd],
            start_new_session=True,
        )
    guest = Machine(segue, "guest", process)
    segue.machines.append(guest)
    wait_until("the start", (guest.directory / "status.json").exists)
    console = watch(guest, place)
    for release in ROUND:
        receipt = guest.handed_over("--to", qemu(release))
        assert "fdset 3" in [kept["name"] for kept in receipt["kept"]]
        with guest.qmp() as client:
            (fdset,) = client.command("query-fdsets")
            assert fdset["fdset-id"] == 3
    unharmed(console)
