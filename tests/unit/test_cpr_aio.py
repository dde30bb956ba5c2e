"""Connections, children and timers that are taken apart and put together again, bit for bit."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segue.cpr import Misuse, State, section
from segue.cpr.aio import Protocol, Server, ServerState
from tests.unit.cprkit import moved, run


@section("service", version=1)
@dataclass(frozen=True)
class Service:
    server: ServerState


def replaced(server: Server, factory: Callable[[], Protocol]) -> Server:
    """The server in "another process"; this one's is gone, as if by exec()."""
    received = moved(State(Service(server.suspend())), Service)
    server.abort()
    newer = Server.restore(received.get(Service).server, factory)
    newer.start()
    return newer


def listening() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop work until that is so."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0)


async def connect(server: Server) -> socket.socket:
    """A client's end, accepted by the server."""
    client = socket.socket()
    client.setblocking(False)
    count = len(server.connections)
    await asyncio.get_running_loop().sock_connect(client, server.listeners[0].getsockname())
    await until(lambda: len(server.connections) > count)
    return client


async def read(client: socket.socket, count: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = bytearray()
    while len(data) < count:
        more = await loop.sock_recv(client, min(1 << 16, count - len(data)))
        if not more:
            break
        data += more
    return bytes(data)


class Framed(Protocol):
    """Echoes frames: a byte that says how long, and so many bytes; counts them."""

    frames = 0

    def data_received(self) -> None:
        while self.unread and len(self.unread) > self.unread[0]:
            end = self.unread[0] + 1
            self.write(self.unread[:end])
            del self.unread[:end]
            self.frames += 1

    def save(self) -> Any:
        return {"frames": self.frames}

    def restored(self, data: Any) -> None:
        self.frames = data["frames"]


@settings(max_examples=20)
@given(
    frames=st.lists(st.binary(max_size=255), min_size=1, max_size=30),
    cuts=st.lists(st.integers(1, 200), min_size=1, max_size=8),
    moves=st.sets(st.integers(0, 12), max_size=5),
)
def test_however_it_is_cut_and_wherever_it_moves(
    frames: list[bytes], cuts: list[int], moves: set[int]
) -> None:
    stream = b"".join(bytes([len(frame)]) + frame for frame in frames)

    async def test() -> None:
        server = Server(Framed, listening())
        server.start()
        client = await connect(server)
        with client:
            position, echoed = 0, b""
            for turn in range(13):
                cut = cuts[turn % len(cuts)]
                client.sendall(stream[position : position + cut])
                position += cut
                await asyncio.sleep(0)
                if turn in moves:
                    server = replaced(server, Framed)
            client.sendall(stream[position:])
            echoed = await read(client, len(stream))
            assert echoed == stream
            [connection] = server.connections
            assert isinstance(connection, Framed)
            assert connection.frames == len(frames)
            assert not connection.unread
        server.abort()

    run(test)


class Flood(Protocol):
    SIZE = 8 << 20
    PATTERN = bytes(range(251)) * (SIZE // 251)

    def connection_made(self) -> None:
        self.write(self.PATTERN)


@pytest.mark.parametrize("end", ["open", "finish", "close"])
def test_what_a_slow_client_has_not_read_goes_on(end: str) -> None:
    async def test() -> None:
        server = Server(Flood, listening())
        server.start()
        client = await connect(server)
        with client:
            [connection] = server.connections
            await until(lambda: connection.unsent > 0)
            if end == "finish":
                connection.write_eof()
            elif end == "close":
                connection.close()
            received = b""
            for _ in range(5):
                before = server.connections[0].unsent
                server = replaced(server, Flood)
                assert server.connections[0].unsent == before > 0
                received += await read(client, 200_000)
            rest = len(Flood.PATTERN) - len(received)
            received += await read(client, rest + (end != "open"))
            assert received == Flood.PATTERN
            if end == "finish":
                [connection] = server.connections
                client.sendall(b"answer")
                await until(lambda: connection.unread == b"answer")
                with pytest.raises(Misuse):
                    connection.write(b"more")
            assert bool(server.connections) == (end != "close")
        server.abort()

    run(test)


class Patient(Protocol):
    """Goes on after the peer's last byte."""

    lost = 0
    ends = 0

    def eof_received(self) -> bool:
        self.ends += 1
        return True

    def save(self) -> Any:
        return self.ends

    def restored(self, data: Any) -> None:
        self.ends = data

    def connection_lost(self, error: OSError | None) -> None:
        self.lost += 1


def test_a_peer_that_has_sent_its_last_byte_before() -> None:
    async def test() -> None:
        server = Server(Patient, listening())
        server.start()
        client = await connect(server)
        with client:
            client.sendall(b"question")
            client.shutdown(socket.SHUT_WR)
            await until(lambda: server.connections[0]._ended)
            server = replaced(server, Patient)
            [connection] = server.connections
            assert connection.unread == b"question"
            for _ in range(5):
                await asyncio.sleep(0)
            connection.write(b"answer")
            connection.close()
            assert await read(client, 100) == b"answer"
            assert isinstance(connection, Patient)
            assert connection.ends == 1
            assert connection.lost == 1
            assert server.connections == ()
            connection.write(b"into the void")
            connection.close()
            assert connection.lost == 1
        server.abort()

    run(test)


def test_one_that_is_paused_stays_paused() -> None:
    async def test() -> None:
        server = Server(Framed, listening())
        server.start()
        client = await connect(server)
        with client:
            server.connections[0].pause_reading()
            client.sendall(b"\x01x")
            server = replaced(server, Framed)
            [connection] = server.connections
            assert connection.paused
            ready = await echo_of_another(server)
            assert ready == b"\x01y"
            assert not connection.unread
            connection.resume_reading()
            assert await read(client, 2) == b"\x01x"
        server.abort()

    async def echo_of_another(server: Server) -> bytes:
        with await connect(server) as other:
            other.sendall(b"\x01y")
            return await read(other, 2)

    run(test)


class OneByOne(Protocol):
    """Takes one byte, and then wants no more until it is told."""

    def data_received(self) -> None:
        self.write(self.unread[:1])
        del self.unread[:1]
        self.pause_reading()


def test_what_was_left_when_it_paused_is_offered_again() -> None:
    async def test() -> None:
        server = Server(OneByOne, listening())
        server.start()
        with await connect(server) as client:
            client.sendall(b"abcd")
            assert await read(client, 1) == b"a"
            server.connections[0].resume_reading()
            assert await read(client, 1) == b"b"
            server = replaced(server, OneByOne)
            assert server.connections[0].unread == b"cd"
            server.connections[0].resume_reading()
            assert await read(client, 1) == b"c"
            # Lost before it could be offered: nobody is asked any more.
            server.connections[0].resume_reading()
            server.abort()
            await asyncio.sleep(0)
            assert await read(client, 1) == b""

    run(test)


def test_suspended_and_started_again_nothing_is_lost() -> None:
    async def test() -> None:
        server = Server(Framed, listening())
        server.start()
        client = await connect(server)
        with client:
            for number in range(50):
                client.sendall(bytes([1, number]))
                server.suspend()
                with pytest.raises(Misuse, match="suspended"):
                    server.connections[0].write(b"x")
                server.start()
                server.start()
            assert await read(client, 100) == b"".join(bytes([1, n]) for n in range(50))
        server.abort()

    run(test)


class Unsavable(Framed):
    def save(self) -> Any:
        if self.frames == 1:
            raise ValueError("not now")
        return super().save()


def test_a_connection_that_cannot_be_saved_stops_nobody() -> None:
    async def test() -> None:
        server = Server(Unsavable, listening())
        server.start()
        clients = [await connect(server) for _ in range(3)]
        clients[1].sendall(b"\x01x")
        assert await read(clients[1], 2) == b"\x01x"
        with pytest.raises(ValueError, match="not now"):
            server.suspend()
        for client in clients:
            client.sendall(b"\x01y")
            assert await read(client, 2) == b"\x01y"
            client.close()
        server.abort()

    run(test)


def test_clients_that_came_meanwhile_are_served() -> None:
    async def test() -> None:
        server = Server(Framed, listening())
        server.start()
        with socket.create_connection(server.listeners[0].getsockname()) as client:
            client.setblocking(False)
            client.sendall(b"\x01x")
            server = replaced(server, Framed)
            assert await read(client, 2) == b"\x01x"
        server.abort()

    run(test)


class Faulty(Framed):
    def data_received(self) -> None:
        if self.unread.startswith(b"!"):
            raise ValueError("a mistake of the program's")
        super().data_received()


def test_a_mistake_in_the_program_costs_one_connection() -> None:
    async def test() -> None:
        told: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        server = Server(Faulty, listening())
        server.start()
        bad, good = await connect(server), await connect(server)
        with bad, good:
            bad.sendall(b"!")
            assert await read(bad, 1) == b""
            good.sendall(b"\x01x")
            assert await read(good, 2) == b"\x01x"
        assert [str(context["exception"]) for context in told] == ["a mistake of the program's"]
        server.abort()

    run(test)


def test_a_peer_that_resets() -> None:
    async def test() -> None:
        server = Server(Patient, listening())
        server.start()
        client = await connect(server)
        [connection] = server.connections
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        client.close()
        await until(lambda: not server.connections)
        assert isinstance(connection, Patient)
        assert connection.lost == 1
        with pytest.raises(Misuse):
            connection.sock.fileno()
        server.abort()

    run(test)


def test_drain_waits_for_the_peer() -> None:
    async def test() -> None:
        server = Server(Flood, listening())
        server.start()
        client = await connect(server)
        with client:
            [connection] = server.connections
            drained = asyncio.create_task(connection.drain())
            assert len(await read(client, len(Flood.PATTERN))) == len(Flood.PATTERN)
            await drained
            assert connection.unsent == 0
            connection.write(Flood.PATTERN)
            waiting = asyncio.create_task(connection.drain())
            await asyncio.sleep(0)
            connection.abort()
            await waiting
        server.abort()

    run(test)


def test_out_of_descriptors_the_listener_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segue.cpr.aio.server._RETRY", 0.02)

    async def test() -> None:
        told: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: told.append(context))
        server = Server(Framed, listening())
        server.start()
        with socket.create_connection(server.listeners[0].getsockname()) as client:
            client.setblocking(False)
            client.sendall(b"\x01x")
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            # Not less than three, or poll() is refused too.
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
            try:
                await until(lambda: len(told) == 3)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert await read(client, 2) == b"\x01x"
        assert {context["message"] for context in told} == {"server accepts nothing for 0.02 s"}
        server.abort()

    run(test)
