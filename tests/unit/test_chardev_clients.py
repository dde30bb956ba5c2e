"""What clients see beyond the bytes: monitors' prompts, further viewers, a guest's port."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from segue.errors import SegueError
from segue.kept.broker import Broker
from segue.kept.prompt import Prompt
from segue.kept.viewer import LAG
from tests.unit.chardevs import Bed, Client, Instance, bed, run, turns, until

BANNER = b"QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) "
NEWER = BANNER.replace(b"7.2.22", b"10.0.2")


# -- human monitors -----------------------------------------------------------------------


async def _upgrade(at: Bed, incumbent: Instance, banner: bytes = NEWER) -> Instance:
    successor = at.instance(incumbent.number + 1)
    successor.write(banner)
    at.broker.hold()
    at.broker.take_back()
    at.broker.switch(successor.number)
    incumbent.die()
    return successor


def test_each_client_of_a_monitor_is_greeted(tmp_path: Path) -> None:
    async def main() -> None:
        async with bed(tmp_path, monitor=True) as at:
            early = await at.client()
            instance = at.instance(1)
            instance.write(BANNER[:20])
            await turns()
            instance.write(BANNER[20:] + b"x")
            await early.expect(BANNER + b"x")
            early.close()
            await until(lambda: not at.broker.connected)
            late = await at.client()
            await late.expect(BANNER)
            instance = await _upgrade(at, instance)
            instance.write(b"(qemu) ")
            await late.expect(b"(qemu) ")  # its banner it has had
            late.close()
            await until(lambda: not at.broker.connected)
            await (await at.client()).expect(NEWER)

    run(main)


def test_a_line_that_is_being_typed_moves_to_the_successor(tmp_path: Path) -> None:
    async def main() -> None:
        async with bed(tmp_path, monitor=True) as at:
            client = await at.client()
            first = at.instance(1)
            first.write(BANNER)
            await client.expect(BANNER)
            client.write(b"help\rinfo x\x7fst")
            await first.expect(b"help\rinfo x\x7fst")
            client.write(b"at")
            await until(lambda: at.broker._prompt and at.broker._prompt.line.endswith(b"stat"))
            second = at.instance(2)
            second.write(NEWER)
            at.broker.hold()
            at.broker.take_back()  # `at` was not read
            at.broker.switch(2)
            client.write(b"us\r")
            await second.expect(b"info st" + b"at" + b"us\r")
            await client.expect(b"\r\n(qemu) ")
            # The successor never ran: the incumbent still has the line in its editor.
            at.broker.give_back()
            await first.expect(b"atus\r")

    run(main)


def test_a_line_that_a_client_left_is_erased_for_the_next(tmp_path: Path) -> None:
    async def main() -> None:
        async with bed(tmp_path, monitor=True) as at:
            client = await at.client()
            instance = at.instance(1)
            client.write(b"info\rqui")
            await instance.expect(b"info\rqui")
            client.close()
            await instance.expect(b"\x05\x7f\x7f\x7f")
            client = await at.client()
            client.write(b"info\r")
            await instance.expect(b"info\r")
            client.close()
            await until(lambda: not at.broker.connected)
            await turns(10)
            assert instance.read() == b""

    run(main)


def test_a_banner_without_a_prompt_is_shown_after_all() -> None:
    prompt = Prompt()
    assert prompt.output(b"x" * 4096) == b""
    assert prompt.output(b"y") == b"x" * 4096 + b"y"
    assert prompt.output(b"z") == b"z"


def test_a_line_edited_by_unknown_keys_is_not_typed_again() -> None:
    prompt = Prompt()
    prompt.output(BANNER)
    prompt.sent(b"\x1b[Aabc")
    successor = prompt.successor()
    assert successor.retyped == b""
    assert successor.output(NEWER) == b"\r\n(qemu) "


# -- viewers ------------------------------------------------------------------------------


def _viewer(broker: Broker) -> Client:
    ours, theirs = socket.socketpair()
    broker.attach(theirs)
    return Client(ours)


def test_viewers_see_and_type_beside_the_client(tmp_path: Path) -> None:
    async def main() -> None:
        async with bed(tmp_path) as at:
            instance = at.instance(1)
            alone = _viewer(at.broker)
            instance.write(b"1")
            await alone.expect(b"1")  # also while no client is there
            client, second = await at.client(), _viewer(at.broker)
            instance.write(b"2")
            for one in (alone, client, second):
                await one.expect(b"2")
            alone.write(b"a")
            await instance.expect(b"a")
            client.write(b"b")
            await instance.expect(b"b")
            alone.close()
            await until(lambda: len(at.broker._viewers) == 1)
            instance.write(b"3")
            await second.expect(b"3")
            await client.expect(b"3")
            second.close()

    run(main)


def test_a_viewer_that_does_not_read_holds_up_nobody(tmp_path: Path) -> None:
    async def main() -> None:
        async with bed(tmp_path) as at:
            instance = at.instance(1)
            client, lazy = await at.client(), _viewer(at.broker)
            output = os.urandom(6 * LAG)
            written = 0
            while len(client.received) < len(output):
                written += instance.write(output[written : written + 50_000])
                client.read()
                await turns(1)
            assert bytes(client.received) == output
            assert len(at.broker._viewers[0].pending) <= LAG
            instance.write(b"now")

            def newest() -> bool:
                lazy.read()
                return lazy.received.endswith(b"now")

            await until(newest)
            # The oldest was dropped, in one piece at most a time; the newest is whole.
            assert lazy.received.endswith(output[-LAG // 2 :] + b"now")
            lazy.close()

    run(main)


# -- a virtserialport's guest sees clients come and go ------------------------------------


class _Guest:
    """QEMU with a port: its backend may be replaced, and it sees a hang-up."""

    def __init__(self, at: Bed) -> None:
        self.at = at
        self.instance = at.instance(1)
        self.refusals = 0
        self.asked = 0
        at.broker.replace_backend = self.replace

    @property
    def open(self) -> bool:
        try:
            return self.instance.sock.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True

    async def replace(self, name: str, fd: int) -> None:
        self.asked += 1
        await asyncio.sleep(0)
        if self.refusals:
            self.refusals -= 1
            raise SegueError("Chardev user does not support chardev hotswap")
        self.instance.sock.close()
        self.instance.sock = socket.socket(fileno=os.dup(fd))
        self.instance.sock.setblocking(False)


def test_the_guest_sees_its_client_come_and_go(tmp_path: Path) -> None:
    async def main() -> None:
        async with bed(tmp_path, presence=True) as at:
            guest = _Guest(at)
            assert not guest.open
            assert at.broker.held_by(os.getpid()) is None
            for _ in range(3):
                client = await at.client()
                client.write(b"ping")
                await until(lambda: guest.open)
                await guest.instance.expect(b"ping")
                guest.instance.write(b"pong")
                await client.expect(b"pong")
                client.write(b"last")
                client.close()
                await guest.instance.expect(b"last")
                await until(lambda: not guest.open)

    run(main)


def test_a_client_at_the_start_is_there_for_the_guest_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with bed(tmp_path, presence=True) as at:
            client = await at.client()
            guest = _Guest(at)
            assert guest.open
            client.close()
            await until(lambda: not guest.open)
            assert guest.asked == 0

    run(main)


@pytest.mark.parametrize("commit", [True, False])
def test_nothing_is_told_to_the_guest_in_the_blackout(tmp_path: Path, commit: bool) -> None:
    async def main() -> None:
        async with bed(tmp_path, presence=True) as at:
            client = await at.client()
            guest = _Guest(at)
            successor = at.instance(2)
            at.broker.hold()
            client.close()
            await until(lambda: not at.broker.connected)
            at.broker.take_back()
            await turns(10)
            incumbent = guest.instance
            assert guest.open
            guest.instance = successor
            assert guest.open
            if commit:
                at.broker.switch(2)
                incumbent.die()
            else:
                successor.die()
                guest.instance = incumbent
                at.broker.give_back()
            await until(lambda: not guest.open)
            await at.client()
            await until(lambda: guest.open)

    run(main)


def test_a_client_that_comes_during_an_upgrade_is_told_afterwards(tmp_path: Path) -> None:
    async def main() -> None:
        async with bed(tmp_path, presence=True) as at:
            guest = _Guest(at)
            successor = at.instance(2)
            client = await at.client()
            client.write(b"early")
            at.broker.hold()
            at.broker.take_back()
            at.broker.switch(2)
            await turns(10)
            assert guest.asked == 0
            guest.instance.die()
            guest.instance = successor
            await guest_opens(guest)
            await successor.expect(b"early")
            await at.broker.quiet()

    async def guest_opens(guest: _Guest) -> None:
        await until(lambda: guest.open)

    run(main)


def test_a_refusal_is_said_once_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segue.kept.broker._RETRY", 0.001)

    async def main() -> None:
        said: list[str] = []
        async with bed(tmp_path, presence=True, err=said.append) as at:
            guest = _Guest(at)
            guest.refusals = 3
            await at.client()
            await until(lambda: guest.open)
            assert guest.asked == 4
            assert len(said) == 1
            assert "hotswap" in said[0]

    run(main)
