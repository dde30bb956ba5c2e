"""Terminals, ptys and standard streams behave as QEMU's own chardevs of that spelling."""

from __future__ import annotations

import asyncio
import os
import socket
import termios
from pathlib import Path

import pytest

from segue.kept.broker import Broker
from segue.kept.channel import Descriptor
from segue.kept.telnet import GREETING
from segue.kept.terminal import Pty, PtyChannel, Stdio
from tests.unit.chardevs import Instance, arrives, bed, broker_for, run, turns, until


def test_telnet_negotiates_and_strips_commands(tmp_path: Path) -> None:
    async def main() -> None:
        async with bed(tmp_path, ",telnet=on") as at:
            breaks: list[None] = []
            at.broker.on_break = lambda: breaks.append(None)
            instance = at.instance(1)
            client = await at.client()
            instance.write(b"\xff raw")
            # 0xff is not doubled, as QEMU does not.
            await client.expect(GREETING + b"\xff raw")
            for byte in b"a\xff\xfd\x01b\xff\xffc\xff\xf3d":  # commands may be cut anywhere
                client.write(bytes([byte]))
                await turns()
            await instance.expect(b"ab\xffcd")
            assert len(breaks) == 1

    run(main)


def _pty_of(broker: Broker) -> Pty:
    assert isinstance(broker.endpoint, Pty)
    return broker.endpoint


def test_pty_keeps_its_path_while_its_slave_is_opened_again_and_again(tmp_path: Path) -> None:
    async def main() -> None:
        said: list[str] = []
        broker = broker_for(f"pty:{tmp_path}/link", out=said.append)
        await broker.start()
        path = _pty_of(broker).path
        assert said == [f"char device redirected to {path} (label serial0)"]
        assert os.readlink(tmp_path / "link") == path
        instance = Instance(broker, 1)
        instance.write(b"nobody is there")
        await turns(10)
        for number in (2, 3):
            slave = os.open(tmp_path / "link", os.O_RDWR | os.O_NOCTTY)
            await until(lambda: broker.connected)
            mode = termios.tcgetattr(slave)
            assert not mode[3] & (termios.ECHO | termios.ICANON | termios.ISIG)
            os.write(slave, b"in\r\n")
            await instance.expect(b"in\r\n")
            successor = Instance(broker, number)
            broker.hold()
            broker.take_back()
            broker.switch(number)
            instance.die()
            instance = successor
            instance.write(b"out\n")
            await arrives(slave, b"out\n")
            os.close(slave)
            await until(lambda: not broker.connected)
        # What is written by one who does not stay is read all the same.
        slave = os.open(path, os.O_RDWR | os.O_NOCTTY)
        os.write(slave, b"passing by")
        os.close(slave)
        await instance.expect(b"passing by")
        await until(lambda: not broker.connected)
        instance.die()
        broker.close()
        assert not (tmp_path / "link").is_symlink()

    run(main)


def test_a_closed_slave_costs_no_turns_of_the_loop() -> None:
    async def main() -> None:
        broker = broker_for("pty")
        await broker.start()
        instance = Instance(broker, 1)
        polled: list[object] = []
        loop = asyncio.get_running_loop()
        loop.add_reader = lambda *a: polled.append(a)  # type: ignore[method-assign]
        instance.write(b"x")
        await asyncio.sleep(0.05)
        assert polled == []
        instance.die()
        broker.close()

    run(main)


def test_output_for_a_closed_slave_is_lost_and_never_stuck() -> None:
    master, slave = os.openpty()
    os.set_blocking(master, False)
    os.close(slave)
    channel = PtyChannel(master)
    assert all(channel.send(b"x" * 4096) == 4096 for _ in range(100))
    os.close(master)


@pytest.mark.parametrize("signals", [True, False])
def test_terminal_is_raw_as_qemu_has_it_and_restored(signals: bool) -> None:
    async def main() -> None:
        master, slave = os.openpty()
        before = termios.tcgetattr(slave)
        broker = Broker("serial0", Stdio(signals, slave, slave))
        await broker.start()
        iflag, oflag, _, lflag, *_ = termios.tcgetattr(slave)
        assert not lflag & (termios.ECHO | termios.ICANON | termios.IEXTEN)
        assert bool(lflag & termios.ISIG) is signals
        assert oflag & termios.OPOST  # "\n" is still a new line
        assert not iflag & (termios.ICRNL | termios.IXON)
        assert os.get_blocking(slave)
        instance = Instance(broker, 1)
        os.write(master, b"\x01c\r")
        await instance.expect(b"\x01c\r")
        instance.write(b"hi\n")
        await arrives(master, b"hi\r\n")
        instance.die()
        broker.close()
        assert termios.tcgetattr(slave) == before
        assert os.get_blocking(slave)
        os.close(master)
        os.close(slave)

    run(main)


@pytest.mark.parametrize("kind", ["pipe", "file", "null", "socket"])
def test_stdin_that_ends_lets_output_go_on(tmp_path: Path, kind: str) -> None:
    async def main() -> None:
        (tmp_path / "in").write_bytes(b"x" * 30_000 + b"end")
        match kind:
            case "pipe":
                stdin, writer = os.pipe()
                os.write(writer, (tmp_path / "in").read_bytes())
                os.close(writer)
            case "file":
                stdin = os.open(tmp_path / "in", os.O_RDONLY)
            case "null":
                stdin = os.open("/dev/null", os.O_RDONLY)
            case _:
                ours, theirs = socket.socketpair()
                ours.sendall((tmp_path / "in").read_bytes())
                ours.close()
                stdin = theirs.detach()
        stdout = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
        broker = Broker("serial0", Stdio(True, stdin, stdout))
        changes: list[bool] = []
        broker.on_client_change = changes.append
        await broker.start()
        instance = Instance(broker, 1)
        expected = b"" if kind == "null" else (tmp_path / "in").read_bytes()
        await instance.expect(expected)
        await until(lambda: changes[-1:] == [False])
        instance.write(b"output goes on")
        await until(lambda: (tmp_path / "out").read_bytes() == b"output goes on")
        assert os.get_blocking(stdin) and os.get_blocking(stdout)
        instance.die()
        broker.close()
        os.close(stdin)
        os.close(stdout)

    run(main)


def test_output_to_a_closed_pipe_is_lost_and_nothing_else() -> None:
    async def main() -> None:
        stdin, keyboard = os.pipe()
        screen, stdout = os.pipe()
        broker = Broker("serial0", Stdio(True, stdin, stdout))
        await broker.start()
        instance = Instance(broker, 1)
        os.close(screen)
        instance.write(b"gone")
        os.write(keyboard, b"typed")
        await instance.expect(b"typed")
        instance.die()
        broker.close()
        for fd in (stdin, keyboard, stdout):
            os.close(fd)

    run(main)


def test_a_flag_that_others_share_is_taken_away_again(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    screen = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    stdout = os.open(tmp_path / "fifo", os.O_WRONLY)
    os.close(screen)  # so it cannot be opened anew
    descriptor = Descriptor(stdout, os.O_WRONLY)
    assert not os.get_blocking(stdout)
    descriptor.close()
    assert os.get_blocking(stdout)
    os.close(stdout)
