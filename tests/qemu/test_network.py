"""Networks through upgrades: what talks to the guest from outside, and the guest to it.

Everything happens in a network namespace of the test's own, on documentation addresses.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.qemu.harness import Client, Machine, Segue, cache, qemu, wait_until
from tests.qemu.netns import GUEST, HOST, Namespace, Ping, Stream

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace takes root")

ECHO = 5000


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    made = Namespace()
    yield made
    made.close()


def scripts(place: Path) -> str:
    """`script` and `downscript`, which leave a line a run in `place`/scripts."""
    bodies = {
        "up": f"echo up $1 >>{place}/scripts; ip address add {HOST}/24 dev $1; ip link set $1 up",
        "down": f"echo down $1 >>{place}/scripts",
    }
    for name, body in bodies.items():
        (place / name).write_text(f"#!/bin/sh\n{body}\n")
        (place / name).chmod(0o755)
    return f"script={place}/up,downscript={place}/down"


def linux(place: Path, *network: str, release: str = "7.2", words: str = "") -> list[str]:
    return [
        qemu(release),
        *("-M", "pc-q35-7.2", "-m", "256", "-nodefaults", "-display", "none"),
        *("-kernel", str(cache() / "linux/vmlinuz"), "-initrd", str(cache() / "linux/initrd.img")),
        *("-append", f"console=ttyS0 quiet segue.ip={GUEST}/24 {words}"),
        *("-serial", f"unix:{place}/console,server=on,wait=off"),
        *network,
    ]


class Guest:
    """A Linux guest on a network, its shell, and what is attached to it."""

    def __init__(self, segue: Segue, place: Path, namespace: Namespace, argv: list[str]) -> None:
        self.namespace = namespace
        with namespace.inside():
            self.machine: Machine = segue.start("net", argv)
        self.shell: Client = self.machine.connect(place / "console")
        self.shell.expect(rb"# ")

    def inbound(self) -> Stream:
        """A connection to a port of the guest that sends everything back."""
        self.shell.command(f"(nc -l -p {ECHO} -e cat &)")

        def connected() -> socket.socket | None:
            with contextlib.suppress(ConnectionError), self.namespace.inside():
                return socket.create_connection((GUEST, ECHO), 10)
            return None

        connection: socket.socket = wait_until("a connection to the guest", connected)
        connection.settimeout(60)
        return Stream(connection)

    def outbound(self, host: str = HOST) -> Stream:
        """A connection that the guest makes, and over which it sends everything back."""
        with self.namespace.inside():
            listener = socket.create_server((host, 0))
        with listener:
            listener.settimeout(60)
            self.shell.command(f"(nc {host} {listener.getsockname()[1]} -e cat &)")
            connection, _ = listener.accept()
        connection.settimeout(60)
        return Stream(connection)


def unharmed(ping: Ping) -> None:
    assert (ping.lost, ping.doubled) == ([], [])


def kept(receipt: dict[str, Any], kind: str) -> dict[str, Any]:
    entry: dict[str, Any] = next(k for k in receipt["kept"] if k["kind"] == kind)
    return entry


def test_tap_through_every_release(segue: Segue, place: Path, namespace: Namespace) -> None:
    """Two queues: pings and connections both ways notice nothing, nor does a reboot afterwards."""
    tap = f"tap,id=n0,ifname=t0,queues=2,{scripts(place)}"
    card = "virtio-net-pci,netdev=n0,mq=on,vectors=6"
    guest = Guest(
        segue, place, namespace, linux(place, "-smp", "2", "-netdev", tap, "-device", card)
    )
    ping, streams = Ping(namespace), [guest.inbound(), guest.outbound()]
    ping.wait()
    with namespace.inside():
        identity = {"interface": "t0", "queues": 2, "ifindex": socket.if_nametoindex("t0")}
    for release in ("10.0", "11.1", "10.0", "7.2"):
        receipt = guest.machine.handed_over("--to", qemu(release))
        assert kept(receipt, "tap")["held"]
        assert kept(receipt, "tap")["identity"] == identity
        for stream in streams:
            stream.wait()
    for stream in streams:
        stream.end()
    ping.wait()
    ping.end()
    unharmed(ping)

    seen = len(guest.shell.data)
    guest.shell.send(b"reboot -f\n")
    guest.shell.expect(rb"# ", seen + len("reboot -f\r\n# "))
    ping = Ping(namespace)
    ping.wait()
    ping.end()
    assert (place / "scripts").read_text() == "up t0\n"
    guest.machine.stop()
    guest.machine.wait()
    assert (place / "scripts").read_text() == "up t0\ndown t0\n"
    assert "t0" not in namespace.run("ip", "link")


def test_an_undone_upgrade_leaves_the_tap_as_it_was(
    segue: Segue, place: Path, namespace: Namespace
) -> None:
    """Nothing is lost when the successor is called off, or dies, even just before it may run."""
    tap = f"tap,id=n0,ifname=t0,{scripts(place)}"
    guest = Guest(
        segue, place, namespace, linux(place, "-netdev", tap, "-device", "virtio-net,netdev=n0")
    )
    ping, stream = Ping(namespace), guest.inbound()
    ping.wait()
    receipt = guest.machine.upgrade("--to", qemu("10.0"), "--rehearse")
    assert receipt["result"] == "rehearsed"
    stream.wait()
    with guest.machine.qmp() as qmp, guest.machine.qmp() as other:
        for phase in ("open", "move", "commit"):
            qmp.events.clear()
            going = qmp.begin("segue-upgrade", {"to": qemu("11.1"), "x-break": [phase]})
            qmp.event(phase=phase, state="break")
            incumbent = guest.machine.qemu_pid
            successor = next(
                pid for pid in segue.processes() if pid not in (incumbent, supervisor(guest))
            )
            os.kill(successor, signal.SIGKILL)
            other.command("x-segue-continue")
            assert going.result(60)["result"] == "failed"
            stream.wait()
    guest.machine.handed_over("--to", qemu("11.1"))
    stream.wait()
    stream.end()
    ping.wait()
    ping.end()
    unharmed(ping)


def supervisor(guest: Guest) -> int:
    return int(guest.machine.status()["supervisor_pid"])
