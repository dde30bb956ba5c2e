"""The tiny guests on plain QEMU, without Segue: what the other tests rest on."""

from __future__ import annotations

import fcntl
import socket
import struct
import subprocess
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from segue.guest import Witness, image
from tests.qemu.harness import LIMIT, Client, qemu, wait_until

AARCH64 = Path(__file__).parents[1] / "guests" / "aarch64" / "guest.bin"

Guest = tuple[Client, Witness, "subprocess.Popen[bytes]"]
Launch = Callable[..., "subprocess.Popen[bytes]"]
Boot = Callable[..., Guest]


@pytest.fixture
def launch() -> Iterator[Launch]:
    started: list[subprocess.Popen[bytes]] = []

    def start(
        console: socket.socket, release: str, machine: str, *more: str
    ) -> subprocess.Popen[bytes]:
        arm = machine == "virt"
        arguments = [
            qemu(release, "aarch64" if arm else "x86_64"),
            *("-M", machine, "-m", "32", "-nodefaults", "-display", "none"),
            *("-kernel", str(AARCH64 if arm else image())),
            *(("-cpu", "cortex-a57") if arm else ()),
            *("-chardev", f"socket,id=console,fd={console.fileno()}"),
            *("-serial", "chardev:console"),
            *more,
        ]
        process = subprocess.Popen(
            arguments,
            pass_fds=[console.fileno()],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def boot(launch: Launch) -> Iterator[Boot]:
    clients: list[Client] = []

    def start(release: str, machine: str, *more: str) -> Guest:
        ours, its = socket.socketpair()
        client = Client(ours)
        client.witness = witness = Witness()
        clients.append(client)
        with its:
            return client, witness, launch(its, release, machine, *more)

    yield start
    for client in clients:
        client.close()


@pytest.mark.parametrize("release", ["7.2", "10.0", "11.1"])
@pytest.mark.parametrize("machine", ["pc", "q35", "microvm", "microvm,acpi=off", "virt"])
def test_counts_hears_and_is_another_after_a_reset(boot: Boot, machine: str, release: str) -> None:
    client, witness, _ = boot(release, machine)
    sent = bytes(range(0x80, 0x100)) * 2
    client.wait(lambda: witness.ticks > 10, "the first ticks")
    client.send(sent)
    client.wait(lambda: len(witness.heard) == len(sent), "the echo")
    client.wait(lambda: witness.nonces == 2, "the nonce again, after 1000 ticks")
    assert witness.heard == sent
    assert not witness.faults
    nonce = witness.nonce
    assert nonce != "00000000"
    client.send(b"r")
    client.wait(lambda: witness.nonce not in (None, nonce) and witness.ticks > 10, "another boot")
    assert any(fault.startswith("booted again") for fault in witness.faults)


@pytest.mark.parametrize(
    ("command", "machine", "more", "status"),
    [
        (b"q", "pc", (), 0),
        (b"q", "q35", (), 0),
        (b"q", "microvm", (), 0),
        (b"q", "microvm,acpi=off", ("-device", "isa-debug-exit"), 1),
        (b"q", "virt", (), 0),
        (b"p", "q35", ("-device", "pvpanic", "-action", "panic=exit-failure"), 1),
    ],
)
def test_ends(boot: Boot, command: bytes, machine: str, more: tuple[str, ...], status: int) -> None:
    client, witness, process = boot("10.0", machine, *more)
    client.wait(lambda: witness.ticks > 10, "the first ticks")
    client.send(command)
    assert process.wait(LIMIT) == status
    assert not witness.faults


def test_tells_that_its_ram_changed(boot: Boot, tmp_path: Path) -> None:
    ram = tmp_path / "ram"
    backend = f"memory-backend-file,id=ram,size=32M,mem-path={ram},share=on"
    client, witness, _ = boot("10.0", "q35,memory-backend=ram", "-object", backend)
    client.wait(lambda: witness.ticks > 10, "the first ticks")
    with ram.open("r+b") as memory:
        memory.seek(2 * 2**20 + 100 * 4096)
        memory.write(bytes(4))
    client.wait(lambda: witness.faults, "the guest seeing it")
    assert [fault.partition(",")[0] for fault in witness.faults] == ["lost RAM"]


@pytest.mark.parametrize("release", ["7.2", "10.0", "11.1"])
def test_leaves_no_number_out_while_nobody_reads(launch: Launch, release: str) -> None:
    ours, its = socket.socketpair()
    its.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with its:
        launch(its, release, "q35")
    unread = [0]

    def stalled() -> bool:
        unread.append(struct.unpack("i", fcntl.ioctl(ours, termios.FIONREAD, bytes(4)))[0])
        return unread[-1] > 0 and len(set(unread[-20:])) == 1

    wait_until("a full buffer", stalled)
    witness = Witness()
    with ours:
        ours.settimeout(LIMIT)
        while witness.ticks < 500:  # far more than the buffer holds
            witness.feed(ours.recv(65536))
    assert witness.tick == witness.ticks
    assert not witness.faults
