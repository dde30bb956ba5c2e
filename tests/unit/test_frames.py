"""Whole frames over whatever comes in pieces, and the relay through an upgrade."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

import pytest

from segue.kept.base import Lending
from segue.kept.frames import BUFFER, Frames, Garbled
from segue.kept.relay import Relay, StreamFar
from segue.qemu.binary import Binary
from segue.saved import Loader, Saver


def frame(number: int, size: int = 60) -> bytes:
    return size.to_bytes(4, "big") + number.to_bytes(4, "big") + bytes(size - 4)


def parsed(data: bytes) -> list[int]:
    """The numbers of the frames; the last must be whole."""
    found = []
    while data:
        size = int.from_bytes(data[:4], "big")
        assert len(data) >= 4 + size, "a frame in part"
        found.append(int.from_bytes(data[4:8], "big"))
        data = data[4 + size :]
    return found


def test_frames_come_out_as_they_came_in_whatever_the_pieces() -> None:
    draw = random.Random(4)
    stream = b"".join(frame(n, draw.randrange(14, 30000)) for n in range(200))
    frames, out, at = Frames(), bytearray(), 0
    while len(out) < len(stream):
        at += frames.add(stream[at : at + draw.randrange(1, 40000)])
        data = frames.next(draw.randrange(1, 50000))
        taken = data[: draw.randrange(len(data) + 1)]
        out += taken
        frames.passed(len(taken))
    assert out == stream
    assert frames.waiting == 0


def test_what_has_come_of_a_frame_stays_in_the_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(frame(0) + frame(1)[:10])
        assert Frames().read(ours, bytearray(BUFFER)) == 64
        theirs.send(frame(1)[10:])
        another = Frames()
        assert another.read(ours, bytearray(BUFFER)) == 64
        assert parsed(another.next(1000)) == [1]


@pytest.mark.parametrize("length", [0, 1 << 20])
def test_what_is_no_length_is_refused(length: int) -> None:
    with pytest.raises(Garbled):
        Frames().add(length.to_bytes(4, "big"))


def message(number: int) -> bytes:
    """The same frame as an instance has it."""
    return frame(number)[4:]


def messages(sock: socket.socket, most: int = 1000) -> list[int]:
    """The numbers of the frames that an instance reads."""
    found: list[int] = []
    with contextlib.suppress(BlockingIOError):
        while len(found) < most:
            data = sock.recv(1 << 17, socket.MSG_DONTWAIT)
            found.append(int.from_bytes(data[:4], "big"))
    return found


class Setting:
    """A relay, what is on its far side, and instances that read when they are told to."""

    def __init__(self) -> None:
        self.broken = asyncio.Event()
        self.relay = Relay(self.on_break)
        self.far, self.far_end = socket.socketpair()
        self.relay.join(StreamFar(self.far_end))
        self.instances: dict[int, socket.socket] = {}

    def on_break(self) -> None:
        self.broken.set()

    def lend(self, number: int) -> socket.socket:
        fd = self.relay.lend(Lending(number, cast(Binary, None)))
        sock = socket.socket(fileno=os.dup(fd))
        sock.setblocking(False)
        self.instances[number] = sock
        return sock

    def close(self) -> None:
        self.relay.close()
        self.far.close()
        for sock in self.instances.values():
            sock.close()


def run(work: Callable[[Setting], Awaitable[None]]) -> None:
    async def main() -> None:
        setting = Setting()
        try:
            await work(setting)
        finally:
            setting.close()

    asyncio.run(main())


async def turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def read(sock: socket.socket, size: int = 1 << 20) -> bytes:
    data = b""
    while len(data) < size:
        try:
            chunk = sock.recv(size - len(data), socket.MSG_DONTWAIT)
        except BlockingIOError:
            break
        if not chunk:
            break
        data += chunk
    return data


@pytest.mark.parametrize("had", range(5))
@pytest.mark.parametrize("undone", [False, True])
def test_no_frame_for_the_guest_is_lost_or_doubled(had: int, undone: bool) -> None:
    """However many the incumbent had read when it was stopped."""

    async def work(setting: Setting) -> None:
        first = setting.lend(1)
        setting.far.send(b"".join(frame(n) for n in range(4)))
        await turns()
        seen = messages(first, had)
        second = setting.lend(2)
        setting.relay.hold()
        setting.relay.take_back()
        setting.far.send(frame(4))
        await turns()
        assert messages(first) == []
        if undone:
            setting.relay.give_back()
            setting.relay.drop(2)
            await turns()
            assert seen + messages(first) == [0, 1, 2, 3, 4]
            return
        setting.relay.switch(2)
        setting.relay.drop(1)
        await turns()
        assert seen + messages(second) == [0, 1, 2, 3, 4]

    run(work)


def test_an_undo_after_the_switch_gives_the_incumbent_what_the_successor_did_not_read() -> None:
    async def work(setting: Setting) -> None:
        first = setting.lend(1)
        setting.far.send(frame(0) + frame(1))
        await turns()
        assert messages(first, 1) == [0]
        setting.lend(2)
        setting.relay.hold()
        setting.relay.take_back()
        setting.relay.switch(2)
        setting.far.send(frame(2))
        await turns()
        setting.relay.give_back()
        setting.relay.drop(2)
        await turns()
        assert messages(first) == [1, 2]

    run(work)


def test_what_the_incumbent_still_sends_goes_first() -> None:
    async def work(setting: Setting) -> None:
        first, second = setting.lend(1), setting.lend(2)
        first.send(message(0))
        await turns()
        first.send(message(1))
        setting.relay.hold()
        setting.relay.take_back()
        first.send(message(2))
        second.send(message(3))
        setting.relay.switch(2)
        setting.relay.drop(1)
        await turns()
        assert parsed(read(setting.far)) == [0, 1, 2, 3]

    run(work)


def test_a_guest_that_does_not_read_holds_the_far_side_back() -> None:
    async def work(setting: Setting) -> None:
        first = setting.lend(1)
        setting.far.setblocking(False)
        sent = taken = 0
        while True:
            try:
                setting.far.sendall(frame(sent, 1000))
            except BlockingIOError:
                break
            sent += 1
            await turns()
            assert sent < 10_000, "nothing holds it back"
        # The last one may have gone in part.
        while taken < sent:
            numbers = messages(first)
            assert numbers == list(range(taken, taken + len(numbers)))
            taken += len(numbers)
            await turns()

    run(work)


def test_another_far_side_begins_with_a_whole_frame() -> None:
    async def work(setting: Setting) -> None:
        first = setting.lend(1)
        setting.far.send(frame(0) + frame(1)[:20])
        await turns()
        setting.far.close()
        async with asyncio.timeout(10):
            await setting.broken.wait()
        first.send(message(7))
        await turns()
        setting.far, ours = socket.socketpair()
        setting.relay.join(StreamFar(ours))
        setting.far.send(frame(2))
        first.send(message(8))
        await turns()
        assert messages(first) == [0, 2]
        assert parsed(read(setting.far)) == [8]

    run(work)


def test_an_instance_holds_both_ends(tmp_path: Path) -> None:
    async def work(setting: Setting) -> None:
        lending = Lending(1, cast(Binary, None))
        setting.relay.lend(lending)
        assert len(lending.descriptors) == 2

    run(work)


@pytest.mark.parametrize("exact", [True, False])
def test_another_process_goes_on_with_whole_frames(exact: bool) -> None:
    """Killed or replaced: what waits in the sockets is whole, and what it had is taken up."""

    async def work(setting: Setting) -> None:
        first = setting.lend(1)
        setting.far.send(frame(0) + frame(1))
        first.send(message(10))
        await turns()
        assert messages(first, 1) == [0]
        if exact:
            setting.relay.hold()
            setting.far.send(frame(2))
            await turns()
        saver = Saver(exact)
        data = json.loads(json.dumps(setting.relay.save(saver)))
        loader = Loader(exact, {name: os.dup(named.fd) for name, named in saver.found.items()})
        far = socket.socket(fileno=os.dup(setting.far_end.fileno()))
        setting.relay.close()
        setting.relay = Relay(setting.on_break)
        setting.relay.load(data, loader, StreamFar(far))
        if not exact:
            setting.far.send(frame(2))
        first.send(message(11))
        await turns()
        assert messages(first) == [1, 2]
        setting.far.settimeout(10)
        assert parsed(setting.far.recv(128, socket.MSG_WAITALL)) == [10, 11]
        assert loader.found == {}

    run(work)
