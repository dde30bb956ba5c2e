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

GROUP = "239.192.0.1"


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


Peer = Callable[[], Cable]
Way = Callable[[Path, Namespace], tuple[str, Peer]]


def stream_client(place: Path, namespace: Namespace) -> tuple[str, Peer]:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"{place}/wire")
    listener.listen()

    def peer() -> Cable:
        with listener:
            return Cable(namespace, listener.accept()[0])

    return f"stream,id=n0,server=off,addr.type=unix,addr.path={place}/wire", peer


def stream_server(place: Path, namespace: Namespace) -> tuple[str, Peer]:
    def peer() -> Cable:
        return Cable(namespace, connected(socket.AF_UNIX, f"{place}/wire"))

    return f"stream,id=n0,server=on,addr.type=unix,addr.path={place}/wire", peer


def datagrams(place: Path, namespace: Namespace) -> tuple[str, Peer]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(f"{place}/there")

    def peer() -> Cable:
        return Cable(namespace, sock, f"{place}/here")

    addresses = (
        f"local.type=unix,local.path={place}/here,remote.type=unix,remote.path={place}/there"
    )
    return f"dgram,id=n0,{addresses}", peer


def old_udp(place: Path, namespace: Namespace) -> tuple[str, Peer]:
    netdev = "socket,id=n0,udp=127.0.0.1:7002,localaddr=127.0.0.1:7001"
    return netdev, udp_peer(namespace, 7001, 7002)


def udp_peer(namespace: Namespace, here: int, there: int) -> Peer:
    """At port `there`, of whom is `here`."""

    def peer() -> Cable:
        with namespace.inside():
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("127.0.0.1", there))
        return Cable(namespace, sock, ("127.0.0.1", here))

    return peer


def old_listen(place: Path, namespace: Namespace) -> tuple[str, Peer]:
    def peer() -> Cable:
        with namespace.inside():
            return Cable(namespace, connected(socket.AF_INET, ("127.0.0.1", 7003)))

    return "socket,id=n0,listen=127.0.0.1:7003", peer


def stream_inet_client(place: Path, namespace: Namespace) -> tuple[str, Peer]:
    netdev = "stream,id=n0,server=off,addr.type=inet,addr.host=127.0.0.1,addr.port=7004"
    return netdev, called(namespace, 7004)


def stream_inet_server(place: Path, namespace: Namespace) -> tuple[str, Peer]:
    def peer() -> Cable:
        with namespace.inside():
            return Cable(namespace, connected(socket.AF_INET, ("127.0.0.1", 7005)))

    return "stream,id=n0,server=on,addr.type=inet,addr.host=127.0.0.1,addr.port=7005", peer


def old_connect(place: Path, namespace: Namespace) -> tuple[str, Peer]:
    return "socket,id=n0,connect=127.0.0.1:7006", called(namespace, 7006)


def called(namespace: Namespace, port: int) -> Peer:
    """Who listens before QEMU is started."""
    with namespace.inside():
        listener = socket.create_server(("127.0.0.1", port))

    def peer() -> Cable:
        with listener:
            return Cable(namespace, listener.accept()[0])

    return peer


def stream_fd(place: Path, namespace: Namespace) -> tuple[str, Peer]:
    fd, peer = inherited(namespace, socket.SOCK_STREAM)
    return f"stream,id=n0,server=off,addr.type=fd,addr.str={fd}", peer


def old_fd(place: Path, namespace: Namespace) -> tuple[str, Peer]:
    fd, peer = inherited(namespace, socket.SOCK_STREAM)
    return f"socket,id=n0,fd={fd}", peer


def old_fd_of_datagrams(place: Path, namespace: Namespace) -> tuple[str, Peer]:
    fd, peer = inherited(namespace, socket.SOCK_DGRAM)
    return f"socket,id=n0,fd={fd}", peer


def datagrams_fd(place: Path, namespace: Namespace) -> tuple[str, Peer]:
    fd, peer = inherited(namespace, socket.SOCK_DGRAM)
    return f"dgram,id=n0,local.type=fd,local.str={fd}", peer


def inherited(namespace: Namespace, kind: socket.SocketKind) -> tuple[int, Peer]:
    """A number that `segue run` inherits, and who has the other end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    theirs.set_inheritable(True)

    def peer() -> Cable:
        theirs.close()
        return Cable(namespace, ours)

    return theirs.fileno(), peer


def datagrams_inet(place: Path, namespace: Namespace) -> tuple[str, Peer]:
    addresses = (
        "local.type=inet,local.host=127.0.0.1,local.port=7007,"
        "remote.type=inet,remote.host=127.0.0.1,remote.port=7008"
    )
    return f"dgram,id=n0,{addresses}", udp_peer(namespace, 7007, 7008)


def multicast(place: Path, namespace: Namespace) -> tuple[str, Peer]:
    addresses = (
        f"local.type=inet,local.host=127.0.0.1,remote.type=inet,remote.host={GROUP},"
        "remote.port=7009"
    )
    return f"dgram,id=n0,{addresses}", member(namespace, 7009)


def old_mcast(place: Path, namespace: Namespace) -> tuple[str, Peer]:
    return f"socket,id=n0,mcast={GROUP}:7010,localaddr=127.0.0.1", member(namespace, 7010)


def member(namespace: Namespace, port: int) -> Peer:
    """Of a multicast group; like QEMU it also hears itself."""
    namespace.run("ip", "route", "add", "224.0.0.0/4", "dev", "lo")

    def peer() -> Cable:
        with namespace.inside():
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((GROUP, port))
        lo = socket.inet_aton("127.0.0.1")
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(GROUP) + lo)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, lo)
        return Cable(namespace, sock, (GROUP, port))

    return peer


CONNECTIONS = [
    stream_client,
    stream_server,
    stream_inet_client,
    stream_inet_server,
    stream_fd,
    old_listen,
    old_connect,
    old_fd,
]
DATAGRAMS = [
    datagrams,
    datagrams_inet,
    datagrams_fd,
    multicast,
    old_udp,
    old_mcast,
    old_fd_of_datagrams,
]


@pytest.mark.parametrize("way", [*CONNECTIONS, *DATAGRAMS])
def test_no_frame_is_lost(segue: Segue, place: Path, namespace: Namespace, way: Way) -> None:
    netdev, peer = way(place, namespace)
    network = ("-netdev", netdev, "-device", "virtio-net-pci,netdev=n0")
    guest = Guest(segue, place, namespace, linux(place, *network), close_fds=False)
    cable = peer()
    first = Ping(namespace)
    first.wait(20)
    first.end()
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
    if way in CONNECTIONS:
        # A socket for datagrams holds few, and a busy host loses more.
        unharmed(ping, guest)
    cable.close()
    if way in (stream_server, stream_inet_server, old_listen):
        # Another one may come, as to QEMU.
        cable = peer()
        ping = Ping(namespace)
        ping.wait(10)
        ping.end()
        cable.close()
