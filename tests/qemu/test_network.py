"""Networks through upgrades: what talks to the guest from outside, and the guest to it.

Everything happens in a network namespace of the test's own, on documentation addresses.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from segue.kept import tun
from tests.qemu.conftest import tiny
from tests.qemu.harness import (
    LIMIT,
    Client,
    Machine,
    Segue,
    accelerator,
    alive,
    cache,
    kill_between_turns,
    qemu,
    wait_until,
)
from tests.qemu.netns import GUEST, HOST, Capture, Namespace, Ping, Stream

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace takes root")

ECHO = 5000
RARP = b"\x80\x35"

# Whether the kernel moves the packets, where there is one that can (the nested bed's).
VHOST = ["off", *(["on"] if os.path.exists("/dev/vhost-net") else [])]


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
        *accelerator(),
        *("-M", "pc-q35-7.2", "-m", "256", "-nodefaults", "-display", "none"),
        *("-kernel", str(cache() / "linux/vmlinuz"), "-initrd", str(cache() / "linux/initrd.img")),
        *("-append", f"console=ttyS0 quiet segue.ip={GUEST}/24 {words}"),
        *("-serial", f"unix:{place}/console,server=on,wait=off"),
        *network,
    ]


class Guest:
    """A Linux guest on a network, its shell, and what is attached to it."""

    def __init__(
        self,
        segue: Segue,
        place: Path,
        namespace: Namespace,
        argv: list[str],
        *,
        close_fds: bool = True,
    ) -> None:
        self.namespace = namespace
        with namespace.inside():
            self.machine: Machine = segue.start("net", argv, close_fds=close_fds)
        self.shell: Client = self.machine.connect(place / "console")
        self.shell.expect(rb"# ")

    def discarded(self) -> int:
        """Answers to pings that the guest's own kernel has thrown away since it began.

        A guest that a busy host let wait for half a second finds hundreds of pings at once, and
        the socket that answers them has room for fewer. That has nothing to do with upgrades.
        """
        told = self.shell.command("cat /proc/net/snmp").splitlines()
        names, numbers = (line.split() for line in told if line.startswith("Icmp:"))
        return int(numbers[names.index("OutErrors")])

    def inbound(self) -> Stream:
        return Stream(self.inbound_socket())

    def outbound(self, host: str = HOST) -> Stream:
        return Stream(self.outbound_socket(host))

    def inbound_socket(self) -> socket.socket:
        """A connection to a port of the guest that sends everything back."""
        self.shell.command(f"(nc -l -p {ECHO} -e cat &)")

        def connected() -> socket.socket | None:
            with contextlib.suppress(ConnectionError), self.namespace.inside():
                return socket.create_connection((GUEST, ECHO), 10)
            return None

        connection: socket.socket = wait_until("a connection to the guest", connected)
        connection.settimeout(LIMIT)
        return connection

    def outbound_socket(self, host: str = HOST) -> socket.socket:
        """A connection that the guest makes, and over which it sends everything back."""
        with self.namespace.inside():
            listener = socket.create_server((host, 0))
        with listener:
            listener.settimeout(LIMIT)
            self.shell.command(f"(nc {host} {listener.getsockname()[1]} -e cat &)")
            connection, _ = listener.accept()
        connection.settimeout(LIMIT)
        return connection


def unharmed(ping: Ping, guest: Guest) -> None:
    """All came to the guest, once, and so did its answers."""
    assert not ping.doubled
    assert not ping.lost or len(ping.lost) <= guest.discarded(), ping.lost


def kept(receipt: dict[str, Any], kind: str) -> dict[str, Any]:
    entry: dict[str, Any] = next(k for k in receipt["kept"] if k["kind"] == kind)
    return entry


def moved_by_kernel(guest: Guest) -> int:
    """Nanoseconds that the kernel's threads for this guest's packets have run."""
    tasks = Path(f"/proc/{guest.machine.qemu_pid}/task").iterdir()
    vhost = [task for task in tasks if (task / "comm").read_text().startswith("vhost-")]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in vhost)


@pytest.mark.parametrize("vhost", VHOST)
def test_tap_through_every_release(
    segue: Segue, place: Path, namespace: Namespace, vhost: str
) -> None:
    """Two queues: pings and connections both ways notice nothing, nor does a reboot afterwards."""
    tap = f"tap,id=n0,ifname=t0,queues=2,vhost={vhost},{scripts(place)}"
    card = "virtio-net-pci,netdev=n0,mq=on,vectors=6"
    guest = Guest(
        segue, place, namespace, linux(place, "-smp", "2", "-netdev", tap, "-device", card)
    )
    ping, streams = Ping(namespace), [guest.inbound(), guest.outbound()]
    ping.wait()
    capture = Capture(namespace, "t0")
    with namespace.inside():
        identity = {"interface": "t0", "queues": 2, "ifindex": socket.if_nametoindex("t0")}
    releases = ("10.0", "11.1", "10.0", "7.2")
    for release in releases:
        receipt = guest.machine.handed_over("--to", qemu(release))
        assert kept(receipt, "tap")["held"]
        assert kept(receipt, "tap")["identity"] == identity
        moved = moved_by_kernel(guest)
        for stream in streams:
            stream.wait()
        assert (moved_by_kernel(guest) > moved) == (vhost == "on")
    for stream in streams:
        stream.end()
    ping.wait()
    ping.end()
    unharmed(ping, guest)
    capture.end()
    assert len(capture.frames) > 1000
    assert not [frame for frame in capture.frames if frame[12:14] == RARP], "QEMU's own packets"

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


@pytest.mark.parametrize("vhost", VHOST)
def test_an_undone_upgrade_leaves_the_tap_as_it_was(
    segue: Segue, place: Path, namespace: Namespace, vhost: str
) -> None:
    """Nothing is lost when the successor is called off, or dies, even just before it may run."""
    tap = f"tap,id=n0,ifname=t0,vhost={vhost},{scripts(place)}"
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
            assert going.result(LIMIT)["result"] == "failed"
            moved = moved_by_kernel(guest)
            stream.wait()
            assert (moved_by_kernel(guest) > moved) == (vhost == "on")
    guest.machine.handed_over("--to", qemu("11.1"))
    stream.wait()
    stream.end()
    ping.wait()
    ping.end()
    unharmed(ping, guest)


def test_jumbo_frames_and_segments_that_the_network_card_is_to_cut(
    segue: Segue, place: Path, namespace: Namespace
) -> None:
    """Frames of 9000 bytes, and TCP in pieces of up to 64 KiB by offloads, over a bridge."""
    namespace.run("ip", "link", "add", "br0", "type", "bridge")
    namespace.run("ip", "address", "add", f"{HOST}/24", "dev", "br0")
    namespace.run("ip", "link", "set", "br0", "up")
    up = place / "up"
    up.write_text("#!/bin/sh\nip link set $1 mtu 9000 master br0 up && ip link set br0 mtu 9000\n")
    up.chmod(0o755)
    tap = f"tap,id=n0,ifname=t0,script={up},downscript=no,sndbuf=4M"
    card = "virtio-net-pci,netdev=n0,host_mtu=9000"
    guest = Guest(segue, place, namespace, linux(place, "-netdev", tap, "-device", card))
    guest.shell.command("ip link set eth0 mtu 9000")
    # Not more than an emulated guest can take on a busy host: its ring has few such frames.
    ping = Ping(namespace, pace=0.01, size=8000)
    streams = [
        Stream(guest.inbound_socket(), pace=0.02, chunk=1 << 16),
        Stream(guest.outbound_socket(), pace=0.02, chunk=1 << 16),
    ]
    ping.wait()
    capture = Capture(namespace, "t0")
    for release in ("10.0", "11.1"):
        guest.machine.handed_over("--to", qemu(release))
        for stream in streams:
            stream.wait(1 << 20)
    for stream in streams:
        stream.end()
    ping.wait()
    ping.end()
    capture.end()
    unharmed(ping, guest)
    assert max(map(len, capture.frames)) > 9014, "no segment was left to the card to cut"


HELPER = """#!/usr/bin/python3
import fcntl, os, socket, struct, subprocess, sys
words = dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[1:])
tap = os.open("/dev/net/tun", os.O_RDWR)
request = struct.pack("16sH22x", b"h0", 0x0002 | 0x1000 | 0x4000)
fcntl.ioctl(tap, 0x400454CA, request)
subprocess.run(["ip", "link", "set", "h0", "master", words["br"], "up"], check=True)
socket.send_fds(socket.socket(fileno=int(words["fd"])), [b"x"], [tap])
"""


def test_a_bridge_by_way_of_a_helper(segue: Segue, place: Path, namespace: Namespace) -> None:
    namespace.run("ip", "link", "add", "br7", "type", "bridge")
    namespace.run("ip", "address", "add", f"{HOST}/24", "dev", "br7")
    namespace.run("ip", "link", "set", "br7", "up")
    helper = place / "helper"
    helper.write_text(HELPER)
    helper.chmod(0o755)
    network = ("-nic", f"bridge,br=br7,helper={helper},model=virtio-net-pci")
    guest = Guest(segue, place, namespace, linux(place, *network))
    ping = Ping(namespace)
    ping.wait()
    for release in ("10.0", "7.2"):
        receipt = guest.machine.handed_over("--to", qemu(release))
        assert kept(receipt, "tap")["identity"]["interface"] == "h0"
        assert kept(receipt, "tap")["held"]
    ping.wait()
    ping.end()
    unharmed(ping, guest)


SPELLINGS = {
    "-nic tap,ifname=t0,script=no,downscript=no,model=virtio-net-pci": 1,
    "-net nic,model=e1000 -net tap,ifname=t0,script=no,downscript=no": 1,
    "-netdev tap,id=n0,ifname=t0,script=,downscript=,vnet_hdr=off -device rtl8139,netdev=n0": 1,
    "-netdev tap,id=n0,fd={0} -device virtio-net,netdev=n0": 1,
    "-netdev tap,id=n0,fds={0}:{1},vhost=off -device virtio-net,netdev=n0,mq=on": 2,
    "-nic tap,fd={0},sndbuf=0 -nic none": 1,
    '-netdev {{"type":"tap","id":"n0","fds":"{0}:{1}"}} -device virtio-net,netdev=n0,mq=on': 2,
}


@pytest.mark.parametrize("words", SPELLINGS)
def test_every_spelling(segue: Segue, place: Path, namespace: Namespace, words: str) -> None:
    flags = tun.IFF_TAP | tun.IFF_NO_PI | tun.IFF_VNET_HDR | tun.IFF_MULTI_QUEUE
    given = []
    with namespace.inside():
        if "fd" in words:
            given = [tun.open_queue("t0", flags)[0] for _ in range(2)]
        for fd in given:
            os.set_inheritable(fd, True)
        machine = segue.start(
            "tap", tiny(place, "7.2", *words.format(*given).split()), close_fds=False
        )
    for fd in given:
        os.close(fd)
    for release in ("10.0", "11.1"):
        receipt = machine.handed_over("--to", qemu(release))
        assert kept(receipt, "tap")["held"]
        identity = kept(receipt, "tap")["identity"]
        assert (identity["interface"], identity["queues"]) == ("t0", SPELLINGS[words])


def test_without_a_supervisor_the_guard_is_told_to_be_unanswered(
    segue: Segue, place: Path, namespace: Namespace
) -> None:
    with namespace.inside():
        machine = segue.start(
            "tap", tiny(place, "7.2", "-nic", "tap,ifname=t0,script=no,downscript=no")
        )
    assert "unanswered" not in segue("ls").stdout
    pid = machine.qemu_pid
    assert machine.process is not None
    machine.process.kill()
    machine.process.wait()
    assert "orphaned, guard unanswered" in segue("ls").stdout
    [entry] = json.loads(segue("ls", "--json").stdout)
    assert entry["guard_unanswered"]
    # QEMU holds the guard's listener itself: whoever takes over can have it.
    held = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    assert "anon_inode:seccomp notify" in held
    os.kill(pid, signal.SIGKILL)
    wait_until("the end of QEMU", lambda: not alive(pid))
    # Of the same name: what the dead one left is cleared away.
    again = segue.start("tap", tiny(place, "7.2"), wait=False)
    status = again.directory / "status.json"
    wait_until("the next machine", lambda: status.exists() and again.qemu_pid != pid)


def two_queues(segue: Segue, place: Path, namespace: Namespace) -> Guest:
    tap = f"tap,id=n0,ifname=t0,queues=2,{scripts(place)}"
    card = "virtio-net-pci,netdev=n0,mq=on,vectors=6"
    return Guest(
        segue, place, namespace, linux(place, "-smp", "2", "-netdev", tap, "-device", card)
    )


def works_after_a_reboot(guest: Guest) -> None:
    """The guest's driver sets its card up anew."""
    seen = len(guest.shell.data)
    guest.shell.send(b"reboot -f\n")
    guest.shell.expect(rb"# ", seen + len("reboot -f\r\n# "))
    ping = Ping(guest.namespace)
    ping.wait()
    ping.end()
    unharmed(ping, guest)


def test_a_supervisor_that_becomes_newer_code(
    segue: Segue, place: Path, namespace: Namespace
) -> None:
    guest = two_queues(segue, place, namespace)
    ping, streams = Ping(namespace), [guest.inbound(), guest.outbound()]
    ping.wait()
    for release in ("10.0", "7.2"):
        for _ in range(2):
            with namespace.inside():
                assert segue("reexec", "net").returncode == 0
            for stream in streams:
                stream.wait()
        guest.machine.handed_over("--to", qemu(release))
    for stream in streams:
        stream.end()
    ping.wait()
    ping.end()
    unharmed(ping, guest)
    works_after_a_reboot(guest)


def test_a_supervisor_that_is_killed(segue: Segue, place: Path, namespace: Namespace) -> None:
    """The guest's network goes on without one, and the guest may set its card up with the next."""
    guest = two_queues(segue, place, namespace)
    ping, stream = Ping(namespace), guest.inbound()
    ping.wait()
    for release in ("10.0", "11.1"):
        guest.machine.handed_over("--to", qemu(release))
        pid = supervisor(guest)
        kill_between_turns(pid)
        if guest.machine.process is not None and guest.machine.process.pid == pid:
            guest.machine.process.wait()
        stream.wait()
        with namespace.inside():
            assert segue("recover", "net").returncode == 0
        stream.wait()
    stream.end()
    ping.wait()
    ping.end()
    unharmed(ping, guest)
    works_after_a_reboot(guest)
    guest.machine.handed_over("--to", qemu("7.2"))
    works_after_a_reboot(guest)
    guest.machine.stop()
    wait_until("the end of the supervisor", lambda: not guest.machine.directory.exists())


@pytest.mark.parametrize("phase", ["move", "release"])
def test_a_supervisor_that_is_killed_in_an_upgrade(
    segue: Segue, place: Path, namespace: Namespace, phase: str
) -> None:
    """At `release` the guest runs on the successor, which has not been lent the queues yet."""
    tap = f"tap,id=n0,ifname=t0,{scripts(place)}"
    guest = Guest(
        segue, place, namespace, linux(place, "-netdev", tap, "-device", "virtio-net,netdev=n0")
    )
    ping, stream = Ping(namespace), guest.inbound()
    ping.wait()
    with guest.machine.qmp() as qmp:
        qmp.begin("segue-upgrade", {"to": qemu("10.0"), "x-break": [phase]})
        qmp.event(phase=phase, state="break")
        assert guest.machine.process is not None
        guest.machine.process.kill()
        guest.machine.process.wait()
    with namespace.inside():
        assert segue("recover", "net").returncode == 0
    # What the guest sent to a supervisor that was dead is lost: TCP sends that again.
    stream.wait()
    ping.wait()
    guest.machine.handed_over("--to", qemu("11.1"))
    stream.wait()
    stream.end()
    ping.wait()
    ping.end()
    assert not ping.doubled
    guest.machine.stop()
    wait_until("the end of the supervisor", lambda: not guest.machine.directory.exists())


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_hundred_upgrades(segue: Segue, place: Path, namespace: Namespace) -> None:
    tap = f"tap,id=n0,ifname=t0,{scripts(place)}"
    network = ("-netdev", tap, "-device", "virtio-net-pci,netdev=n0")
    guest = Guest(segue, place, namespace, linux(place, *network))
    ping, streams = Ping(namespace), [guest.inbound(), guest.outbound()]
    ping.wait()
    blackouts = []
    for number in range(100):
        receipt = guest.machine.handed_over("--to", qemu(("10.0", "11.1", "7.2")[number % 3]))
        blackouts.append(receipt["blackout_seconds"])
        for stream in streams:
            stream.wait()
    for stream in streams:
        stream.end()
    ping.wait()
    ping.end()
    sys.stdout.write(
        f"{len(ping.sent)} pings, {len(ping.lost)} lost, {len(ping.doubled)} doubled, slowest "
        f"{ping.slowest * 1000:.1f} ms; {sum(s.sent for s in streams)} bytes; blackouts "
        f"{min(blackouts) * 1000:.1f} to {max(blackouts) * 1000:.1f} ms"
    )
    unharmed(ping, guest)


def supervisor(guest: Guest) -> int:
    return int(guest.machine.status()["supervisor_pid"])
