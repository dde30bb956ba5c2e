"""The QMP server before a fake instance: what a client sees."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import EventListener, ExecuteError, QMPClient

from segue.errors import UsageError
from segue.qmp.client import Client
from segue.qmp.server import QmpServer
from tests.unit.qmpfakes import GREETING, Instance, World, path_in, run


def test_an_independent_client(tmp_path: Path) -> None:
    async def test() -> None:
        async with World() as world:
            world.server.listen_unix(path_in(tmp_path))
            client = QMPClient("test")
            await client.connect(str(path_in(tmp_path)))
            assert client.greeting is not None
            assert client.greeting._raw == GREETING
            assert await client.execute("stop") == {"by": "first", "command": "stop"}
            hello = await client.execute("segue-hello", {"name": "you", "times": 2})
            assert hello == {"hello": "you", "times": 2}
            with pytest.raises(ExecuteError) as failure:
                await client.execute("segue-refuse")
            assert str(failure.value) == "this cannot be (do that; guest is running)"
            listener = EventListener("SEGUE_UPGRADE")
            client.register_listener(listener)
            world.server.event("SEGUE_UPGRADE", {"phase": "plan", "state": "begin"})
            event: Any = await listener.get()
            assert event["data"] == {"phase": "plan", "state": "begin"}
            assert event["timestamp"].keys() == {"seconds", "microseconds"}
            await client.disconnect()

    run(test())


def test_nothing_before_negotiation_and_no_second_one() -> None:
    async def test() -> None:
        async with World() as world:
            peer = world.connect()
            assert await peer.receive() == GREETING
            world.server.event("STOP")
            reply = await peer.call({"execute": "stop", "id": 1})
            assert (reply["id"], reply["error"]["class"]) == (1, "CommandNotFound")
            assert (await peer.call({"execute": "segue-hello"}))["error"]["class"] == (
                "CommandNotFound"
            )
            assert world.instance.seen == []
            assert await peer.call({"execute": "qmp_capabilities"}) == {"return": {}}
            reply = await peer.call({"execute": "qmp_capabilities"})
            assert reply["error"]["class"] == "CommandNotFound"

    run(test())


@pytest.mark.parametrize(
    ("arguments", "desc"),
    [
        ({}, "Parameter 'name' is missing"),
        ({"name": 1}, "Invalid parameter type for 'name', expected: string"),
        ({"name": "a", "times": True}, "Invalid parameter type for 'times', expected: integer"),
        ({"name": "a", "times": 1.5}, "Invalid parameter type for 'times', expected: integer"),
        ({"name": "a", "loud": 0}, "Invalid parameter type for 'loud', expected: boolean"),
        ({"name": "a", "x": 0}, "Parameter 'x' is unexpected"),
    ],
)
def test_arguments_are_checked_in_the_words_of_qemu(arguments: dict[str, Any], desc: str) -> None:
    async def test() -> None:
        async with World() as world:
            peer = await world.client()
            reply = await peer.call({"execute": "segue-hello", "arguments": arguments})
            assert reply == {"error": {"class": "GenericError", "desc": desc}}

    run(test())


def test_a_bug_is_told_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with World() as world:
            peer = await world.client()
            reply = await peer.call({"execute": "segue-fail", "id": "a"})
            assert reply["id"] == "a"
            assert reply["error"]["desc"].startswith("segue-fail failed: ZeroDivisionError")
            assert "\n" not in reply["error"]["desc"]
        assert "Traceback" in caplog.text

    run(test())


@pytest.mark.parametrize("where", ["observer", "at once", "later"])
def test_nobody_waits_for_what_a_bug_has_broken_off(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither its client, nor an upgrade, which waits until no command is under way."""

    def break_off(*_: Any) -> Any:
        raise ZeroDivisionError("a bug")

    async def break_off_later() -> Any:
        break_off()

    async def test() -> None:
        async with World() as world:
            if where == "observer":
                world.server.observers.append(break_off)
            else:
                later = where == "later"
                world.server.carried_out["stop"] = lambda _: (
                    break_off_later() if later else break_off()
                )
            peer = await world.client()
            reply = await peer.call({"execute": "stop", "id": "a"})
            assert reply["id"] == "a"
            assert reply["error"]["desc"].startswith("stop failed: ZeroDivisionError")
            assert not world.server.gate.in_flight
            world.server.observers.clear()
            assert "return" in await peer.call({"execute": "query-status"})
        assert "Traceback" in caplog.text

    run(test())


def test_one_client_is_answered_in_order_and_others_meanwhile() -> None:
    async def test() -> None:
        async with World() as world:
            one, two = await world.client(), await world.client()
            await one.send({"execute": "slow", "id": 1}, {"execute": "fast", "id": 2})
            assert (await two.call({"execute": "fast", "id": 3}))["id"] == 3
            assert world.instance.commands == ["slow", "fast"]
            world.instance.answer()
            assert [(await one.receive())["id"] for _ in range(2)] == [1, 2]

    run(test())


def test_out_of_band_overtakes() -> None:
    async def test() -> None:
        async with World() as world:
            peer = await world.client("oob")
            await peer.send({"execute": "slow", "id": 1}, {"execute": "stop", "id": 2})
            assert (await peer.call({"exec-oob": "yank", "id": 3}))["id"] == 3
            assert world.instance.seen[1] == {"exec-oob": "yank"}
            reply = await peer.call({"exec-oob": "segue-hello", "id": 4})
            assert reply["error"]["desc"] == "The command segue-hello does not support OOB"
            # Eight wait, the ninth and what is behind it is not looked at.
            await peer.send(*({"execute": "cont", "id": n} for n in range(5, 13)))
            await peer.send({"exec-oob": "yank", "id": 13})
            other = await world.client()
            await other.call({"execute": "segue-hello", "arguments": {"name": "x"}})
            assert world.instance.commands == ["slow", "yank"]
            world.instance.answer()
            ids = [(await peer.receive())["id"] for _ in range(11)]
            assert ids[:2] == [1, 2]
            assert sorted(ids) == [1, 2, *range(5, 14)]
            assert [i for i in ids if i != 13] == [1, 2, *range(5, 13)]

    run(test())


def test_commands_wait_at_the_gate_and_go_to_the_new_instance() -> None:
    async def test() -> None:
        async with World() as world:
            one, two = await world.client(), await world.client()
            world.server.gate.read_only()
            await one.send({"execute": "device_add", "id": 1}, {"execute": "cont", "id": 2})
            assert (await two.call({"execute": "query-status"}))["return"]["by"] == "first"
            assert (await two.call({"execute": "segue-hello", "arguments": {"name": ""}}))["return"]
            world.server.gate.close()
            await two.send({"execute": "query-status", "id": 3})
            # Answered here, so that it shows that what came before was looked at.
            three = await world.client()
            await three.call({"execute": "segue-hello", "arguments": {"name": ""}})
            world.server.upstream = second = Instance("second")
            world.server.gate.open()
            replies = [await one.receive(), await one.receive(), await two.receive()]
            assert [r["id"] for r in replies] == [1, 2, 3]
            assert [r["return"]["by"] for r in replies] == ["second"] * 3
            assert world.instance.commands == ["query-status"]
            assert sorted(second.commands) == ["cont", "device_add", "query-status"]

    run(test())


def test_who_cannot_know_is_told_so() -> None:
    async def test() -> None:
        async with World() as world:
            peer = await world.client()
            await peer.send({"execute": "slow_add", "id": 7})
            await world.instance.arrived.wait()
            world.instance.die()
            reply = await peer.receive()
            assert reply["id"] == 7
            assert reply["error"]["class"] == "GenericError"
            assert "slow_add" in reply["error"]["desc"]
            assert "cannot be known" in reply["error"]["desc"]
            await world.server.gate.drain()

    run(test())


def test_events_reach_those_who_negotiated_and_ours_are_suppressed() -> None:
    async def test() -> None:
        async with World() as world:
            peers = [await world.client() for _ in range(3)]
            world.server.suppress = lambda event: event["event"] == "STOP"
            stamp = {"seconds": 1, "microseconds": 2}
            world.server.on_upstream_event({"event": "STOP", "timestamp": stamp})
            world.server.on_upstream_event({"event": "RESET", "timestamp": stamp})
            for peer in peers:
                assert await peer.receive() == {"event": "RESET", "timestamp": stamp}

    run(test())


def test_pretty() -> None:
    async def test() -> None:
        async with World() as world:
            peer = world.connect(pretty=True)
            await peer.send({"execute": "qmp_capabilities"}, {"execute": "stop", "id": 1})
            text = b""
            while b'"id": 1' not in text:
                text += await asyncio.get_running_loop().sock_recv(peer.sock, 65536)
            assert text.startswith(b'{\n    "QMP": {\n        "version"')

    run(test())


def test_what_there_is_includes_our_own() -> None:
    async def test() -> None:
        async with World() as world:
            peer = await world.client()
            commands = (await peer.call({"execute": "query-commands"}))["return"]
            names = [command["name"] for command in commands]
            assert len(names) == len(set(names))
            assert {"query-status", "segue-hello", "query-events"} < set(names)
            events = (await peer.call({"execute": "query-events", "id": 1}))["return"]
            assert {"name": "STOP"} in events
            assert {"name": "SEGUE_UPGRADE"} in events
            reply = await peer.call({"execute": "query-events", "arguments": {"a": 1}})
            assert reply["error"]["desc"] == "Parameter 'a' is unexpected"
            schema = (await peer.call({"execute": "query-qmp-schema"}))["return"]
            by_name = {entry["name"]: entry for entry in schema}
            assert len(by_name) == len(schema)
            for entry in schema:
                used = [entry.get("arg-type"), entry.get("ret-type")]
                used += [member["type"] for member in entry.get("members", [])]
                assert entry["name"] in ("query-status", "STOP") or {*used} - {None} <= {*by_name}
            hello = by_name[by_name["segue-hello"]["arg-type"]]
            assert hello["members"] == [
                {"name": "name", "type": "str"},
                {"name": "times", "type": "int", "default": None},
                {"name": "loud", "type": "bool", "default": None},
            ]

    run(test())


def test_intercepted_commands_are_answered_here() -> None:
    async def quit_(arguments: dict[str, Any], client: Client) -> Any:
        return {"quit": "by us"}

    async def test() -> None:
        async with World() as world:
            world.server.intercept["quit"] = quit_
            peer = await world.client()
            assert await peer.call({"execute": "quit"}) == {"return": {"quit": "by us"}}
            assert world.instance.seen == []

    run(test())


def test_greeted_once_there_is_an_instance() -> None:
    async def test() -> None:
        server = QmpServer({})
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        server.adopt(ours)
        theirs.send(b'{"execute": "qmp_capabilities"}')
        await asyncio.sleep(0)
        with pytest.raises(BlockingIOError):
            theirs.recv(1)
        server.upstream = Instance()
        data = b""
        while not data.endswith(b'{"return": {}}\r\n'):
            data += await asyncio.get_running_loop().sock_recv(theirs, 65536)
        server.close()
        theirs.close()

    run(test())


def pipe_inode() -> tuple[int, int]:
    read, write = os.pipe()
    os.close(write)
    return read, os.fstat(read).st_ino


def descriptors() -> set[str]:
    return {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _open(fd)}


def _open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_descriptors_go_with_their_command_and_are_not_kept() -> None:
    async def test() -> None:
        async with World() as world:
            peer = await world.client()
            pipes = [pipe_inode() for _ in range(5)]
            fds = [fd for fd, _ in pipes]
            inodes = [inode for _, inode in pipes]

            def send(data: bytes, *with_fds: int) -> None:
                socket.send_fds(peer.sock, [data], list(with_fds))

            # Held up, so that all of it is there before any of it is looked at.
            world.server.gate.close()
            send(b'{"execute": "getfd", "id": 0}', fds[0])
            send(b'{"execute": "stop", "id": 1}', fds[1])
            send(b'{"execute": "add-fd", "id": 2}\n', fds[2])
            send(b" ", fds[3])
            send(b'{"execute": "getfd", "id": 3}{"execute": "stop", "id": 4}')
            send(b'{"execute": "getfd", "id": 5}', fds[0], fds[4])
            for fd in fds:
                os.close(fd)
            world.server.gate.open()
            assert [(await peer.receive())["id"] for _ in range(6)] == [0, 1, 2, 3, 4, 5]
            assert world.instance.inodes == [inodes[0], inodes[2], inodes[3], inodes[0]]
        assert not {f"pipe:[{inode}]" for inode in inodes} & descriptors()

    run(test())


@pytest.mark.parametrize("half", [b'{"execute": "getfd"', b'{"execute": "getfd"}'])
def test_a_client_that_goes_takes_its_descriptors_with_it(half: bytes) -> None:
    async def test() -> None:
        async with World() as world:
            peer = await world.client()
            fd, inode = pipe_inode()
            world.server.gate.close()
            socket.send_fds(peer.sock, [half], [fd])
            os.close(fd)
            other = await world.client()
            await other.call({"execute": "segue-hello"})
            (gone,) = [c for c in world.server.clients if c.number == 1]
            gone.close("the test says so")
            assert f"pipe:[{inode}]" not in descriptors()
            world.server.gate.open()
            await other.call({"execute": "stop"})
            assert world.instance.commands == ["stop"]

    run(test())


def test_a_half_closed_client_gets_its_answers() -> None:
    async def test() -> None:
        async with World() as world:
            peer = await world.client()
            await peer.send({"execute": "slow", "id": 1}, {"execute": "stop", "id": 2}, b'{"half')
            peer.sock.shutdown(socket.SHUT_WR)
            await world.instance.arrived.wait()
            world.instance.answer()
            assert [(await peer.receive())["id"] for _ in range(2)] == [1, 2]
            assert await peer.receive() is None
            assert not world.server.clients

    run(test())


def test_the_socket_is_for_its_owner_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with World() as world:
            path = path_in(tmp_path)
            listener = world.server.listen_unix(path)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(path))
            await world.peer(sock).negotiate()
            await listener.first_client()
            with pytest.raises(UsageError, match="in use"):
                world.server.listen_unix(path)
        assert f"(pid {os.getpid()}, uid {os.getuid()}) connected" in caplog.text
        assert not path.exists()

    with caplog.at_level("INFO", "segue.qmp"):
        run(test())


def test_a_dead_socket_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    async def test() -> None:
        async with World() as world:
            path = path_in(tmp_path)
            dead = socket.socket(socket.AF_UNIX)
            dead.bind(str(path))
            dead.close()
            world.server.listen_unix(path)
            file = tmp_path / "file"
            file.write_text("mine")
            with pytest.raises(UsageError, match="in use"):
                world.server.listen_unix(file)
            assert file.read_text() == "mine"
            with pytest.raises(UsageError) as failure:
                world.server.listen_unix(tmp_path / ("x" * 120))
            assert failure.value.hint == "a Unix socket's path has at most 107 bytes"

    run(test())


def test_tcp() -> None:
    async def test() -> None:
        async with World() as world:
            listener = socket.create_server(("127.0.0.1", 0))
            world.server.adopt_listener(listener)
            sock = socket.create_connection(listener.getsockname())
            peer = await world.peer(sock).negotiate()
            assert (await peer.call({"execute": "stop", "id": 1}))["id"] == 1

    run(test())


def test_a_connection_can_be_taken_up_by_another_server() -> None:
    async def test() -> None:
        async with World() as world:
            peer = await world.client("oob")
            world.server.gate.close()
            await peer.send({"execute": "stop", "id": 1}, {"execute": "cont", "id": 2}, b"@")
            await peer.send(b'{"execute": "qu')
            other = await world.client()
            await other.call({"execute": "segue-hello"})
            (client,) = [c for c in world.server.clients if c.number == 1]
            state = client.state()
            sock = socket.socket(fileno=os.dup(client.sock.fileno()))
            client.close("it moves", hang_up=False)
            successor = QmpServer({})
            successor.upstream = Instance("second")
            successor.adopt(sock, state=state)
            await peer.send(b'it", "id": 3}')
            replies = [await peer.receive() for _ in range(4)]
            # The stray character's error may come first: it has no place of its own any more.
            errors = [r["error"]["desc"] for r in replies if "error" in r]
            assert errors == ["JSON parse error, stray '@'"]
            assert [r["id"] for r in replies if "id" in r] == [1, 2, 3]
            successor.close()

    run(test())
