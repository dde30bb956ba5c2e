"""Nothing that QEMU may have made block makes the supervisor wait (keeper.py says why)."""

from __future__ import annotations

import os
import pty
import socket
from collections.abc import Callable, Iterator

import pytest

from segue.kept.channel import Channel, DatagramChannel, SocketChannel
from segue.kept.frames import HEADER, Frames
from segue.kept.plug import DatagramFar
from segue.kept.relay import Far, StreamFar
from segue.kept.telnet import TelnetChannel
from segue.kept.terminal import PtyChannel, make_raw
from segue.kept.viewer import Viewer

pytestmark = pytest.mark.timeout(10)
_FRAME = (1000).to_bytes(HEADER, "big") + bytes(1000)


@pytest.fixture
def streams() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def datagrams() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    master, slave = pty.openpty()
    make_raw(slave)
    yield master, slave
    os.close(master)
    os.close(slave)


def blocks(fd: int) -> None:
    """As QEMU does it: on the open file, behind Python's back."""
    os.set_blocking(fd, True)


def never_waits(channel: Channel) -> None:
    blocks(channel.reads)
    with pytest.raises(BlockingIOError):
        channel.recv(4096)
    blocks(channel.writes)
    fill(lambda: channel.send(bytes(1000)))


def fill(send: Callable[[], int]) -> None:
    """Send until there is no more room."""
    for _ in range(100_000):
        try:
            if not send():
                return
        except BlockingIOError:
            return
    raise AssertionError("it is never full")


def test_clients(streams: tuple[socket.socket, socket.socket]) -> None:
    never_waits(SocketChannel(streams[0]))


def test_telnet(streams: tuple[socket.socket, socket.socket]) -> None:
    never_waits(TelnetChannel(streams[0], lambda: None))


def test_datagrams(datagrams: tuple[socket.socket, socket.socket]) -> None:
    never_waits(DatagramChannel(datagrams[0]))


def test_a_pty(terminal: tuple[int, int]) -> None:
    never_waits(PtyChannel(terminal[0]))


def test_a_viewer(streams: tuple[socket.socket, socket.socket]) -> None:
    viewer = Viewer(streams[0])
    blocks(viewer.fd)
    assert viewer.recv(4096) is None
    for _ in range(1000):
        viewer.feed(bytes(10_000))
        viewer.flush()
    assert viewer.pending


def test_wires(
    streams: tuple[socket.socket, socket.socket], datagrams: tuple[socket.socket, socket.socket]
) -> None:
    fars: list[tuple[Far, socket.socket]] = [
        (StreamFar(streams[0]), streams[1]),
        (DatagramFar(datagrams[0], None), datagrams[1]),
    ]
    for far, peer in fars:
        blocks(far.fileno())
        frames = Frames()
        with pytest.raises(BlockingIOError):
            far.read(frames, bytearray(1 << 17))
        peer.send(_FRAME if peer is streams[1] else _FRAME[HEADER:])
        assert far.read(frames, bytearray(1 << 17))
        assert frames.waiting == len(_FRAME)
        fill(lambda far=far: far.send(_FRAME))  # type: ignore[misc]
