"""A client that floods, stalls or talks nonsense harms itself alone."""

from __future__ import annotations

import asyncio
import socket
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segue.qmp import client as client_module
from segue.qmp import framing
from segue.qmp.client import Client, Request
from segue.qmp.server import MAX_RELAYED
from tests.unit.qmpfakes import Peer, World, run


async def served(world: World) -> None:
    """Somebody else is."""
    peer = await world.client()
    reply = await peer.call({"execute": "stop", "id": "other"})
    assert reply["id"] == "other"
    peer.sock.shutdown(socket.SHUT_WR)
    assert await peer.receive() is None


@settings(max_examples=40)
@given(st.lists(st.binary(max_size=30) | st.sampled_from([b"{", b'"', b"}", b"[", b"'"])))
def test_nonsense(pieces: list[bytes]) -> None:
    async def test() -> None:
        async with World() as world:
            peer = await world.client()
            for piece in pieces:
                await peer.send(piece)
            await peer.send(b'\xff{"execute": "cont", "id": "mine"}')
            while (await peer.receive()).get("id") != "mine":
                pass
            await served(world)

    run(test())


def test_a_message_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framing, "MAX_MESSAGE", 1 << 20)

    async def test() -> None:
        async with World() as world:
            peer = await world.client()
            with pytest.raises(OSError):
                while True:
                    await peer.send(b'{"execute": "' + b"x" * 100_000)
                    await served(world)
            assert not world.server.clients

    run(test())


def test_a_message_without_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framing, "MAX_MESSAGE", 1000)

    async def test() -> None:
        async with World() as world:
            peer = await world.client()
            reply = await peer.call(b'{"execute": "' + b"x" * 1000)
            assert reply["error"]["desc"] == "JSON token size limit exceeded"
            assert await peer.receive() is None

    run(test())


async def flood(peer: Peer, data: bytes) -> int:
    """Send without reading until the other side takes no more; how much it took."""
    loop = asyncio.get_running_loop()
    taken = 0
    while True:
        try:
            taken += peer.sock.send(data)
        except BlockingIOError:
            writable = asyncio.Event()
            loop.add_writer(peer.sock.fileno(), writable.set)
            try:
                async with asyncio.timeout(0.2):
                    await writable.wait()
            except TimeoutError:
                return taken
            finally:
                loop.remove_writer(peer.sock.fileno())


@pytest.mark.parametrize(
    "data",
    [
        b'{"execute": "stop"}' * 1000,
        b"@{" * 10_000,
        b'{"execute": "big", "arguments": {"size": 100000}}' * 100,
        b'{"execute": "segue-hello", "arguments": {"name": "x"}}' * 300,
    ],
    ids=["commands", "garbage", "large answers", "our own commands"],
)
@pytest.mark.parametrize("capability", ["", "oob"])
def test_a_flood_that_does_not_read(data: bytes, capability: str) -> None:
    async def test() -> None:
        async with World() as world:
            peer = await world.client(*filter(None, [capability]))
            flooding = asyncio.create_task(flood(peer, data))
            while not flooding.done():
                await served(world)
            (client,) = world.server.clients
            state = client.state()
            assert len(state.unsent) < 1 << 20
            assert len(state.unparsed) <= client_module.READ_AHEAD + client_module.CHUNK
            await served(world)

    run(test())


def test_everybody_else_has_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with World() as world:
            peer = await world.client()
            taken = 0
            turns = []
            dispatch = world.server.dispatch

            def counting(client: Client, request: Request) -> None:
                nonlocal taken
                taken += 1
                dispatch(client, request)

            def turn() -> None:
                turns.append(taken)
                if taken < 200:
                    asyncio.get_running_loop().call_soon(turn)

            monkeypatch.setattr(world.server, "dispatch", counting)
            turn()
            await peer.send(b"[]" * 200)
            for _ in range(200):
                await peer.receive()
            assert max(b - a for a, b in pairwise(turns)) <= client_module.BURST

    run(test())


def test_who_does_not_read_its_events_is_dropped() -> None:
    async def test() -> None:
        async with World() as world:
            stalled, reading = await world.client(), await world.client()
            data = {"text": "x" * 100_000}
            for _ in range(60):
                world.server.event("SEGUE_UPGRADE", data)
                assert (await reading.receive())["data"] == data
            assert len(world.server.clients) == 1
            stalled.sock.setblocking(False)
            await served(world)

    run(test())


def test_who_reads_late_misses_nothing() -> None:
    async def test() -> None:
        async with World() as world:
            peer = await world.client()
            for number in range(2000):
                world.server.event("SEGUE_UPGRADE", {"number": number, "text": "x" * 1000})
            await peer.send({"execute": "stop", "id": "mine"})
            for number in range(2000):
                assert (await peer.receive())["data"]["number"] == number
            assert (await peer.receive())["id"] == "mine"

    run(test())


def test_long_input_is_left_alone_while_the_gate_is_closed() -> None:
    async def test() -> None:
        async with World() as world:
            peer = await world.client()
            world.server.gate.close()
            text = b"x" * 500_000
            sending = asyncio.create_task(peer.send(b'{"execute": "' + text + b'", "id": 1}'))
            other = await world.client()
            for _ in range(20):
                await other.call({"execute": "segue-hello", "arguments": {"name": "x"}})
            (client,) = [c for c in world.server.clients if c.number == 1]
            assert len(client.state().unparsed) < 300_000
            assert not client.passages
            world.server.gate.open()
            await sending
            assert (await peer.receive())["id"] == 1

    run(test())


def test_too_many_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segue.qmp.server.MAX_CLIENTS", 2)

    async def test() -> None:
        async with World() as world:
            first, _ = await world.client(), await world.client()
            ours, theirs = socket.socketpair()
            assert world.server.adopt(ours) is None
            assert theirs.recv(1) == b""
            theirs.close()
            assert (await first.call({"execute": "stop", "id": 1}))["id"] == 1

    run(test())


def test_what_qemu_would_read_for_long_is_not_passed_on() -> None:
    async def test() -> None:
        async with World() as world:
            peer = await world.client()
            long = {"execute": "stop", "arguments": {"text": "x" * MAX_RELAYED}, "id": 1}
            reply = await peer.call(long)
            assert reply["id"] == 1
            assert "more than the 262144 that are passed on" in reply["error"]["desc"]
            assert world.instance.commands == []
            name = "x" * MAX_RELAYED  # an id may have any length
            assert (await peer.call({"execute": "stop", "id": name}))["id"] == name
            assert world.instance.commands == ["stop"]

    run(test())
