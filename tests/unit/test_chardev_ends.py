"""Host ends behave as QEMU's own chardevs of that spelling."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from segue.errors import SegueError
from segue.kept import sockets
from segue.kept.broker import Broker
from segue.kept.chardev import KeptOutput, is_kept, make, unsupported
from segue.qemu.chardevs import Chardev, from_compat
from segue.qemu.options import Params
from tests.unit.chardevs import (
    Client,
    Instance,
    arrives,
    bed,
    broker_for,
    lending,
    run,
    turns,
    until,
)


def _refusal(text: str) -> SegueError:
    """The error of a device that cannot be opened."""
    found: list[SegueError] = []

    async def main() -> None:
        broker = broker_for(text)
        with pytest.raises(SegueError) as raised:
            await broker.start()
        found.append(raised.value)
        broker.close()

    run(main)
    return found[0]


async def _echo(instance: Instance, client: Client) -> None:
    """Both directions work."""
    client.write(b"to the guest")
    await instance.expect(b"to the guest")
    instance.write(b"to the client")
    await client.expect(b"to the client")


def _make_broker(chardev: Chardev) -> Broker:
    kept = make(chardev)
    assert isinstance(kept, Broker)
    return kept


def test_nobody_turns_in_circles_without_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever calls waits until there are some again."""
    monkeypatch.setattr(sockets, "ACCEPT_PAUSE", 0.3)
    asked = 0

    def accept(_: socket.socket) -> None:
        nonlocal asked
        asked += 1
        raise OSError(errno.EMFILE, "Too many open files")

    async def main() -> None:
        broker = broker_for(f"unix:{tmp_path}/s,server=on,wait=off")
        with monkeypatch.context() as patch:
            patch.setattr(socket.socket, "accept", accept)
            await broker.start()
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(f"{tmp_path}/s")
                await until(lambda: asked == 1)
                await turns(20)
                assert asked < 20
                patch.undo()
                await until(lambda: broker.connected)
        broker.close()

    run(main)


# -- arguments ----------------------------------------------------------------------------


def test_an_instance_inherits_both_ends_of_a_pair_of_its_own(tmp_path: Path) -> None:
    async def main() -> None:
        log = f",logfile={tmp_path}/a,,b,mux=on"
        async with bed(tmp_path, log) as at:
            first, second = at.instance(1), at.instance(2)
            assert first.argument.startswith("socket,id=serial0,fd=")
            assert first.argument.endswith(f",logfile={tmp_path}/a,,b,mux=on")
            # A second opening must not empty the log.
            assert "logappend=on" in second.argument
            assert "logappend" not in first.argument
            assert len(first.inherited) == len(second.inherited) == 2
            assert not first.inherited.keys() & second.inherited.keys()
            assert at.broker.held_by(os.getpid())

    run(main)


# -- sockets ------------------------------------------------------------------------------


def test_server_waits_for_its_first_client_and_says_so(tmp_path: Path) -> None:
    async def main() -> None:
        said: list[str] = []
        broker = broker_for(f"unix:{tmp_path}/s,server=on", err=said.append)
        starting = asyncio.create_task(broker.start())
        await until(lambda: said)
        assert said == [f"QEMU waiting for connection on: disconnected:unix:{tmp_path}/s,server=on"]
        await turns(10)
        assert not starting.done()
        client = Client.unix(tmp_path / "s")
        await starting
        instance = Instance(broker, 1)
        await _echo(instance, client)
        client.close()
        instance.die()
        broker.close()
        assert not (tmp_path / "s").exists()

    run(main)


def test_one_client_at_a_time_and_the_next_when_it_leaves(tmp_path: Path) -> None:
    async def main() -> None:
        async with bed(tmp_path) as at:
            seen: list[bool] = []
            at.broker.on_client_change = seen.append
            instance = at.instance(1)
            first = await at.client()
            second = await at.client()
            second.write(b"later")
            await _echo(instance, first)
            first.close()
            await instance.expect(b"later")
            assert seen == [True, False, True]
            await _echo(instance, second)

    run(main)


def test_server_takes_the_place_of_a_stale_socket_and_leaves_another_s_alone(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        path = tmp_path / "s"
        path.write_text("stale")
        async with bed(tmp_path):
            assert stat.S_ISSOCK(path.stat().st_mode)
            path.unlink()
            path.write_text("somebody else's")
        assert path.read_text() == "somebody else's"

    run(main)


@pytest.mark.parametrize("tight", ["on", "off"])
def test_abstract_unix_socket(tmp_path: Path, tight: str) -> None:
    async def main() -> None:
        name = f"segue-test-{os.getpid()}"
        broker = broker_for(f"unix:{name},abstract=on,tight={tight},server=on,wait=off")
        await broker.start()
        address = b"\0" + name.encode()
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(address if tight == "on" else address.ljust(108, b"\0"))
        client = Client(sock)
        instance = Instance(broker, 1)
        await until(lambda: broker.connected)
        await _echo(instance, client)
        client.close()
        instance.die()
        broker.close()

    run(main)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", ""])
def test_tcp_server_finds_a_free_port_in_its_range(host: str) -> None:
    async def main() -> None:
        taken = socket.create_server(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        said: list[str] = []
        broker = broker_for(
            f"tcp:{host}:{port},server=on,to={port + 50},ipv4=on,nodelay=on", err=said.append
        )
        starting = asyncio.create_task(broker.start())
        await until(lambda: said)
        address, _, found = said[0].removesuffix(",server=on").rpartition(":")
        assert address.endswith("disconnected:tcp:" + ("127.0.0.1" if host else "0.0.0.0"))
        assert port < int(found) <= port + 50
        client = Client(socket.create_connection(("127.0.0.1", int(found))))
        await starting
        instance = Instance(broker, 1)
        await _echo(instance, client)
        client.close()
        taken.close()
        instance.die()
        broker.close()

    run(main)


def test_what_cannot_be_opened_is_said_as_qemu_says_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = _refusal(f"tcp:127.0.0.1:{port},server=on")
    assert error.what == "Failed to find an available port: Address already in use"
    missing = _refusal(f"unix:{tmp_path}/missing")
    assert missing.what == f"Failed to connect to '{tmp_path}/missing': No such file or directory"
    long = _refusal(f"unix:{tmp_path}/{'x' * 108},server=on")
    assert long.what.startswith("UNIX socket path") and long.what.endswith("is too long")
    closed = _refusal(f"tcp:127.0.0.1:{port}")
    assert closed.what == f"Failed to connect to '127.0.0.1:{port}': Connection refused"
    both_off = _refusal("tcp:localhost:0,server=on,ipv4=off,ipv6=off")
    assert both_off.what == "Cannot disable IPv4 and IPv6 at same time"


def test_client_connects_and_is_alone_after_it_was_hung_up_on(tmp_path: Path) -> None:
    async def main() -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{tmp_path}/s")
        listener.listen()
        broker = broker_for(f"unix:{tmp_path}/s")
        await broker.start()
        instance = Instance(broker, 1)
        client = Client(listener.accept()[0])
        await _echo(instance, client)
        client.close()
        await until(lambda: not broker.connected)
        listener.close()
        instance.die()
        broker.close()

    run(main)


def test_client_reconnects_and_complains_once(tmp_path: Path) -> None:
    async def main() -> None:
        said: list[str] = []
        broker = broker_for(f"unix:{tmp_path}/s,reconnect-ms=1", err=said.append)
        await broker.start()
        instance = Instance(broker, 1)
        await until(lambda: said)
        await asyncio.sleep(0.01)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{tmp_path}/s")
        listener.listen()
        for _ in range(2):
            await until(lambda: broker.connected)
            client = Client(listener.accept()[0])
            await _echo(instance, client)
            client.close()
            await until(lambda: not broker.connected)
        listener.close()
        assert len(said) == 1
        assert said[0].startswith("Unable to connect character device serial0: Failed to connect")
        instance.die()
        broker.close()
        await turns()

    run(main)


def test_a_socket_that_the_supervisor_inherited() -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        broker = _make_broker(Chardev("c", "socket", Params.of({"fd": str(theirs.detach())})))
        await broker.start()
        instance = Instance(broker, 1)
        await _echo(instance, Client(ours))
        ours.close()
        instance.die()
        broker.close()

    run(main)


# -- telnet -------------------------------------------------------------------------------


# -- pty ----------------------------------------------------------------------------------


# -- stdio --------------------------------------------------------------------------------


# -- pipe, udp, file ----------------------------------------------------------------------


@pytest.mark.parametrize("names", [("p.in", "p.out"), ("p",)])
def test_pipe_by_two_names_or_one(tmp_path: Path, names: tuple[str, ...]) -> None:
    async def main() -> None:
        for name in names:
            os.mkfifo(tmp_path / name)
        broker = broker_for(f"pipe:{tmp_path}/p")
        await broker.start()
        instance = Instance(broker, 1)
        writer = os.open(tmp_path / names[0], os.O_WRONLY)
        os.write(writer, b"in")
        os.close(writer)
        await instance.expect(b"in")
        if len(names) == 2:
            instance.write(b"out")
            reader = os.open(tmp_path / names[1], os.O_RDONLY | os.O_NONBLOCK)
            await arrives(reader, b"out")
            os.close(reader)
        instance.die()
        broker.close()

    run(main)


def test_pipe_that_is_missing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.in")
    error = _refusal(f"pipe:{tmp_path}/p")
    assert error.what == f"Could not open '{tmp_path}/p': No such file or directory"


def test_udp_both_ways_and_an_absent_peer_is_no_error() -> None:
    async def main() -> None:
        peer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        peer.bind(("127.0.0.1", 0))
        local = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        local.bind(("127.0.0.1", 0))
        address = local.getsockname()
        local.close()
        port = peer.getsockname()[1]
        broker = broker_for(f"udp:127.0.0.1:{port}@127.0.0.1:{address[1]}")
        await broker.start()
        instance = Instance(broker, 1)
        assert not broker.connected  # QEMU never tells the guest of anyone
        peer.sendto(b"in", address)
        await instance.expect(b"in")
        instance.write(b"out")
        peer.setblocking(False)
        await until(lambda: not broker.to_client)
        await turns(10)
        assert peer.recv(100) == b"out"
        peer.close()
        instance.write(b"lost")
        await turns(10)
        back = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        back.bind(("127.0.0.1", port))
        back.sendto(b"again", address)
        await instance.expect(b"again")
        back.close()
        instance.die()
        broker.close()

    run(main)


@pytest.mark.parametrize(("append", "content"), [("off", ""), ("on", "before ")])
def test_file_is_opened_once_and_appended_to(tmp_path: Path, append: str, content: str) -> None:
    async def main() -> None:
        path = tmp_path / "log"
        path.write_text("before ")
        params = Params.of({"path": str(path), "append": append})
        kept = make(Chardev("c", "file", params))
        assert isinstance(kept, KeptOutput)
        assert path.read_text() == "before "  # nothing is opened before the start
        await kept.start()
        for number in (1, 2):
            lent = lending(number)
            (_, argument) = kept.arguments(lent)
            assert argument == f"file,id=c,path=/proc/self/fd/{lent.descriptors[0]},append=on"
            fd = os.open(f"/proc/self/fd/{lent.descriptors[0]}", os.O_WRONLY | os.O_APPEND)
            os.write(fd, f"{number} ".encode())
            os.close(fd)
        assert kept.held_by(os.getpid())
        kept.close()
        assert path.read_text() == content + "1 2 "

    run(main)


# -- the factory --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("websocket:127.0.0.1:1,server=on", "websocket"),
        ("tn3270:127.0.0.1:1,server=on", "tn3270"),
        ("tcp:127.0.0.1:1,server=on,tls-creds=t", "TLS"),
        ("/dev/ttyS0", "port of the host"),
        ("braille", "braille"),
    ],
)
def test_what_cannot_be_kept_has_a_reason(text: str, word: str) -> None:
    chardev = from_compat(text, "c")
    assert chardev is not None
    assert word in (unsupported(chardev) or "")
    assert not is_kept(chardev)


@pytest.mark.parametrize("text", ["null", "vc:80Cx24C", "msmouse"])
def test_what_lives_inside_qemu_is_left_to_it(text: str) -> None:
    chardev = from_compat(text, "c")
    assert chardev is not None
    assert unsupported(chardev) is None
    assert not is_kept(chardev)
