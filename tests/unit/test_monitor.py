"""The QMP client that the supervisor speaks with: what breaks it, and what must not be lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from segue.errors import CommandFailed, MonitorClosed
from segue.qemu.instance import last_message
from segue.qemu.monitor import Monitor

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}}, "capabilities": []}}


class Far:
    """The other side of a monitor's socket: a QEMU that says what a test wants."""

    def __init__(self) -> None:
        self.near, self.sock = socket.socketpair()
        self.sock.setblocking(False)

    def say(self, *messages: Any) -> None:
        for message in messages:
            line = message if isinstance(message, bytes) else json.dumps(message).encode()
            self.sock.send(line + b"\r\n")

    async def hears(self) -> dict[str, Any]:
        line = await asyncio.get_running_loop().sock_recv(self.sock, 65536)
        message: dict[str, Any] = json.loads(line)
        return message

    async def connected(self) -> Monitor:
        connecting = asyncio.ensure_future(Monitor.connect(self.near))
        self.say(GREETING)
        self.say({"return": {}, "id": (await self.hears())["id"]})
        return await connecting


@contextlib.asynccontextmanager
async def far_side() -> AsyncIterator[Far]:
    far = Far()
    try:
        yield far
    finally:
        far.sock.close()
        far.near.close()


BROKEN = {
    "no JSON": b"hello",
    "a list": b"[1]",
    "a number": b"7",
    "a text": b'"event"',
    "null": b"null",
    "an object of nothing": b"{}",
    "an event without a name": b'{"event": 7}',
    "a greeting of nothing": b'{"QMP": null}',
    "an error without words": b'{"error": {}, "id": 2}',
    "an error that is none": b'{"error": "no", "id": 2}',
    "too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("line", BROKEN.values(), ids=BROKEN.keys())
def test_what_no_monitor_says_closes_it(line: bytes) -> None:
    async def main() -> None:
        async with far_side() as far:
            monitor = await far.connected()
            asked = asyncio.ensure_future(monitor.execute("query-status"))
            await far.hears()
            far.sock.setblocking(True)
            await asyncio.gather(asyncio.to_thread(far.say, line), _closed(asked))
            assert monitor.closed

    async def _closed(asked: asyncio.Future[Any]) -> None:
        with pytest.raises(MonitorClosed):
            await asked

    asyncio.run(main())


@pytest.mark.parametrize("first", [b"[]", b'{"QMP": 1}', b'{"return": {}}\r\n3', b"ready"])
def test_what_is_no_monitor_is_not_negotiated_with(first: bytes) -> None:
    async def main() -> None:
        async with far_side() as far:
            far.say(first)
            with pytest.raises(MonitorClosed):
                await Monitor.connect(far.near, timeout=20)

    asyncio.run(main())


@pytest.mark.parametrize("number", [None, "2", [2], 99, True])
def test_an_answer_to_nothing_is_nobodys(number: Any) -> None:
    async def main() -> None:
        async with far_side() as far:
            monitor = await far.connected()
            asked = asyncio.ensure_future(monitor.execute("query-status"))
            ours = (await far.hears())["id"]
            stray: dict[str, Any] = {"error": {"class": "GenericError", "desc": "stray"}}
            far.say(stray | ({} if number is None else {"id": number}))
            far.say({"return": "mine", "id": ours})
            assert await asked == "mine"
            monitor.close()

    asyncio.run(main())


def test_an_error_is_told_with_its_class() -> None:
    async def main() -> None:
        async with far_side() as far:
            monitor = await far.connected()
            asked = asyncio.ensure_future(monitor.execute("frobnicate"))
            number = (await far.hears())["id"]
            far.say({"error": {"class": "CommandNotFound", "desc": "no such"}, "id": number})
            with pytest.raises(CommandFailed, match="frobnicate: no such") as caught:
                await asked
            assert caught.value.error_class == "CommandNotFound"
            monitor.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], ""),
        (["Segmentation fault"], "Segmentation fault"),
        (
            ["qemu-system-x86_64: warning: a", "qemu-system-x86_64: -m: b"],
            "qemu-system-x86_64: -m: b",
        ),
        (["qemu: -drive x: lock", "Is it in use?"], "qemu: -drive x: lock Is it in use?"),
    ],
)
def test_the_last_message_has_its_advice(lines: list[str], message: str) -> None:
    assert last_message(lines) == message


def test_last_words_are_heard() -> None:
    """QEMU's end is told by its pidfd, perhaps before its socket has been read."""

    async def main() -> None:
        async with far_side() as far:
            monitor = await far.connected()
            heard: list[str] = []
            monitor.listen(lambda event: heard.append(event["event"]))
            quitting = asyncio.ensure_future(monitor.execute("quit"))
            number = (await far.hears())["id"]
            far.say({"return": {}, "id": number}, {"event": "SHUTDOWN"}, {"event": "LAST"})
            monitor.read_rest()
            assert await quitting == {}
            assert heard == ["SHUTDOWN", "LAST"]
            assert monitor.closed

    asyncio.run(main())


def test_a_listener_that_fails_harms_nobody_else() -> None:
    async def test() -> None:
        async with far_side() as far:
            monitor = await far.connected()
            failures: list[Any] = []
            asyncio.get_running_loop().set_exception_handler(lambda _, what: failures.append(what))
            heard: list[Any] = []

            def fail(event: Any) -> None:
                raise ZeroDivisionError("a bug")

            monitor.listen(fail)
            monitor.listen(heard.append)
            asking = asyncio.ensure_future(monitor.execute("query-status"))
            number = (await far.hears())["id"]
            far.say({"event": "STOP"}, {"return": "first", "id": number})
            assert await asking == "first"
            assert heard == [{"event": "STOP"}]
            assert isinstance(failures[0]["exception"], ZeroDivisionError)
            monitor.close()

    asyncio.run(test())


@pytest.mark.parametrize("by_itself", [False, True])
def test_a_qemu_that_ends_is_told_nothing_more(by_itself: bool) -> None:
    async def run() -> None:
        async with far_side() as far:
            monitor = await far.connected()
            if by_itself:
                far.say({"event": "SHUTDOWN", "data": {"guest": False, "reason": "host-signal"}})
                monitor.read_now()
            else:
                quitting = asyncio.ensure_future(monitor.execute("quit"))
                far.say({"return": {}, "id": (await far.hears())["id"]})
                await quitting
            with pytest.raises(MonitorClosed, match="ending"):
                await monitor.execute("query-status", timeout=5)
            with pytest.raises(BlockingIOError):
                far.sock.recv(1)
            monitor.close()

    asyncio.run(run())


def test_descriptors_wait_until_those_before_have_been_taken() -> None:
    async def scenario() -> None:
        async with far_side() as far:
            monitor = await far.connected()
            one, two = (monitor.relay({"execute": "getfd"}, [far.sock.fileno()]) for _ in range(2))
            last = monitor.relay({"execute": "stop"})
            first = await far.hears()
            with pytest.raises(BlockingIOError):
                far.sock.recv(1)
            far.say({"return": {}, "id": first["id"]})
            assert await one == {"return": {}}
            lines = (await asyncio.get_running_loop().sock_recv(far.sock, 65536)).splitlines()
            assert [json.loads(line)["execute"] for line in lines[:1]] == ["getfd"]
            far.say({"return": {}, "id": json.loads(lines[0])["id"]})
            await two
            if len(lines) == 1:
                lines += (await asyncio.get_running_loop().sock_recv(far.sock, 65536)).splitlines()
            far.say({"return": {}, "id": json.loads(lines[1])["id"]})
            await last
            assert monitor.idle
            monitor.close()

    asyncio.run(scenario())
