"""Networks over sockets of QEMU's own through upgrades: the connection stays, no frame is lost."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.qemu.harness import Segue, qemu, wait_until
from tests.qemu.netns import Cable, Namespace, Ping
from tests.qemu.test_network import Guest, kept, linux, unharmed

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace takes root")


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    made = Namespace()
    yield made
    made.close()


def connected(family: socket.AddressFamily, where: str | tuple[str, int]) -> socket.socket:
    def attempt() -> socket.socket | None:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.connect(where)
        except OSError:
            sock.close()
            return None
        return sock

    found: socket.socket = wait_until(f"a connection to {where}", attempt)
    return found


Peer = Callable[[Namespace], Cable]


def stream_client(place: Path) -> tuple[str, Peer]:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"{place}/wire")
    listener.listen()

    def peer(namespace: Namespace) -> Cable:
        with listener:
            return Cable(namespace, listener.accept()[0])

    return f"stream,id=n0,server=off,addr.type=unix,addr.path={place}/wire", peer


def stream_server(place: Path) -> tuple[str, Peer]:
    def peer(namespace: Namespace) -> Cable:
        return Cable(namespace, connected(socket.AF_UNIX, f"{place}/wire"))

    return f"stream,id=n0,server=on,addr.type=unix,addr.path={place}/wire", peer


def datagrams(place: Path) -> tuple[str, Peer]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(f"{place}/there")

    def peer(namespace: Namespace) -> Cable:
        return Cable(namespace, sock, f"{place}/here")

    addresses = (
        f"local.type=unix,local.path={place}/here,remote.type=unix,remote.path={place}/there"
    )
    return f"dgram,id=n0,{addresses}", peer


def old_udp(place: Path) -> tuple[str, Peer]:
    def peer(namespace: Namespace) -> Cable:
        with namespace.inside():
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("127.0.0.1", 7002))
        return Cable(namespace, sock, ("127.0.0.1", 7001))

    return "socket,id=n0,udp=127.0.0.1:7002,localaddr=127.0.0.1:7001", peer


def old_listen(place: Path) -> tuple[str, Peer]:
    def peer(namespace: Namespace) -> Cable:
        with namespace.inside():
            return Cable(namespace, connected(socket.AF_INET, ("127.0.0.1", 7003)))

    return "socket,id=n0,listen=127.0.0.1:7003", peer


@pytest.mark.parametrize("way", [stream_client, stream_server, datagrams, old_udp, old_listen])
def test_no_frame_is_lost(
    segue: Segue,
    place: Path,
    namespace: Namespace,
    way: Callable[[Path], tuple[str, Peer]],
) -> None:
    netdev, peer = way(place)
    network = ("-netdev", netdev, "-device", "virtio-net-pci,netdev=n0")
    guest = Guest(segue, place, namespace, linux(place, *network))
    cable = peer(namespace)
    ping, stream = Ping(namespace), guest.inbound()
    ping.wait()
    identities = []
    for release in ("10.0", "11.1"):
        receipt = guest.machine.handed_over("--to", qemu(release))
        assert kept(receipt, "net")["held"]
        identities.append(kept(receipt, "net")["identity"])
        stream.wait()
    assert identities[0] == identities[1]
    stream.end()
    ping.wait()
    ping.end()
    if way not in (datagrams, old_udp):
        # A socket for datagrams holds few, and a busy host loses more.
        unharmed(ping, guest)
    cable.close()
    if way in (stream_server, old_listen):
        # Another one may come, as to QEMU.
        cable = peer(namespace)
        ping = Ping(namespace)
        ping.wait(10)
        ping.end()
        cable.close()
