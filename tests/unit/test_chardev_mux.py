"""The escape character does what it does in QEMU, and what it did outlives an upgrade."""

from __future__ import annotations

import random
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from segue.kept.chardev import make_mux
from segue.kept.mux import Front, Mux
from segue.qemu.chardevs import from_compat
from tests.unit.chardevs import Client, Instance, Numbered, run, turns, until

BANNER = b"QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) "
FRONTS = (Front("serial0.mon", monitor=True), Front("serial0"))


class Machine:
    """Instances of a machine with a monitor and a serial port on one socket."""

    def __init__(self, mux: Mux, path: Path) -> None:
        self.mux = mux
        self.path = path
        self.number = 0
        self.clients: list[Client] = []
        self.monitor, self.serial = self.start()

    def start(self) -> tuple[Instance, Instance]:
        self.number += 1
        monitor, serial = (Instance(broker, self.number) for broker in self.mux.brokers)
        monitor.write(BANNER)
        return monitor, serial

    async def client(self) -> Client:
        self.clients.append(Client.unix(self.path))
        await until(lambda: self.mux._channel is not None)
        return self.clients[-1]

    async def upgrade(self, *, commit: bool = True) -> None:
        new = self.start()
        self.mux.hold()
        self.mux.take_back()
        if commit:
            self.mux.switch(self.number)
            dead, (self.monitor, self.serial) = (self.monitor, self.serial), new
        else:
            dead = new
            self.mux.give_back()
        for instance in dead:
            instance.die()
        await turns()


@asynccontextmanager
async def machine(directory: Path, options: str = "", escape: int = 1) -> AsyncIterator[Machine]:
    chardev = from_compat(f"mon:unix:{directory}/s,server=on,wait=off{options}", "serial0")
    assert chardev is not None
    mux = make_mux(chardev, FRONTS, escape=escape)
    await mux.start()
    made = Machine(mux, directory / "s")
    try:
        yield made
    finally:
        for client in made.clients:
            client.close()
        made.monitor.die()
        made.serial.die()
        mux.close()


def test_the_escape_moves_between_console_and_monitor(tmp_path: Path) -> None:
    async def main() -> None:
        async with machine(tmp_path) as at:
            client = await at.client()
            at.serial.write(b"boot")
            await client.expect(b"boot")  # the console has the focus, no banner is shown
            client.write(b"ls\x01\x01")
            await at.serial.expect(b"ls\x01")
            client.write(b"\x01cinfo")
            await client.expect(BANNER)
            await at.monitor.expect(b"info")
            at.serial.write(b"more")
            await client.expect(b"more")  # the console goes on beside it
            client.write(b"\x01")
            await turns()
            client.write(b"cback")
            await client.expect(b"\r\n")
            await at.serial.expect(b"back")
            await at.monitor.expect(b"\x05" + b"\x7f" * 4)  # the line that was left is erased
            client.write(b"\x01c")
            await client.expect(b"(qemu) ")
            client.close()
            await until(lambda: at.mux._channel is None)
            client = await at.client()
            await client.expect(BANNER)  # the focus stays, and another client is greeted

    run(main)


def test_focus_and_half_an_escape_outlive_an_upgrade(tmp_path: Path) -> None:
    async def main() -> None:
        async with machine(tmp_path) as at:
            client = await at.client()
            await turns()
            client.write(b"\x01c")
            await client.expect(BANNER)
            client.write(b"x\r\x01")
            await at.monitor.expect(b"x\r")
            await at.upgrade()
            client.write(b"\x01y\r")
            await at.monitor.expect(b"\x01y\r")
            await at.upgrade(commit=False)
            client.write(b"\x01cz")
            await client.expect(b"\r\n")
            await at.serial.expect(b"z")

    run(main)


def test_numbered_streams_survive_upgrades_behind_the_mux(tmp_path: Path) -> None:
    async def main() -> None:
        chance = random.Random(4)
        async with machine(tmp_path, escape=0x1D) as at:
            client = await at.client()
            inward, outward = Numbered(chance, 300_000), Numbered(chance, 300_000)
            sent = inward.data.replace(b"\x1d", b"\x1d\x1d")
            got, written = bytearray(), 0
            for turn in range(100_000):
                written += client.write(sent[written : written + chance.randrange(1, 3000)])
                outward.push(at.serial.write)
                got += at.serial.read(chance.randrange(1, 3000))
                client.read()
                await turns(1)
                if turn % 50 == 49 and at.number < 9:
                    await at.upgrade(commit=turn % 100 == 49)
                if len(got) == len(inward.data) and len(client.received) == len(outward.data):
                    break
            assert bytes(got) == inward.data
            assert bytes(client.received) == outward.data

    run(main)


def test_the_other_escapes(tmp_path: Path) -> None:
    async def main() -> None:
        async with machine(tmp_path) as at:
            done: list[str] = []
            at.mux.on_quit = lambda: done.append("quit")
            at.mux.on_commit = lambda: done.append("commit")
            at.mux.brokers[1].on_break = lambda: done.append("break")
            client = await at.client()
            await turns()
            client.write(b"\x01h")
            await until(lambda: client.read() and client.received.endswith(b"sends C-a\n\r"))
            assert client.received.startswith(b"\n\rC-a h    print this help\n\r")
            client.received.clear()
            client.write(b"\x01s\x01b\x01x")
            await client.expect(b"QEMU: Terminated\n\r")
            assert done == ["commit", "break", "quit"]
            client.write(b"\x01t.")
            await at.serial.expect(b".")
            at.serial.write(b"a\r\nb\nc")
            await until(lambda: client.read() and client.received.endswith(b"c"))
            stamp = rb"\[00:00:\d\d\.\d{3}\] "
            assert re.fullmatch(rb"a\r\n" + stamp + rb"b\n" + stamp + b"c", client.received)
            assert at.serial.read() == b""  # nothing of it went to the guest

    run(main)


def test_help_names_another_escape_as_qemu_does(tmp_path: Path) -> None:
    async def main() -> None:
        async with machine(tmp_path, escape=0x1D) as at:
            client = await at.client()
            await turns()
            client.write(b"\x1dh")
            await until(lambda: client.read() and client.received.endswith(b"Escape-Char\n\r"))
            assert client.received.startswith(
                b"\n\rEscape-Char set to Ascii: 0x1d\n\r\n\rEscape-Char h    print this help"
            )

    run(main)


def test_one_log_for_all_is_emptied_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with machine(tmp_path, f",logfile={tmp_path}/log") as at:
            assert "logappend" not in at.monitor.argument
            assert at.serial.argument.endswith(f"logfile={tmp_path}/log,logappend=on")
            assert at.monitor.argument.startswith("socket,id=serial0.mon,fd=")

    run(main)


def test_last_words_and_viewers_of_the_console(tmp_path: Path) -> None:
    async def main() -> None:
        async with machine(tmp_path) as at:
            client = await at.client()
            ours, theirs = socket.socketpair()
            at.mux.attach(theirs)
            viewer = Client(ours)
            at.clients.append(viewer)
            words = b"x" * 150_000 + b"Power down\r\n"
            written = 0
            while written < len(words):
                written += at.serial.write(words[written:])
                await turns()
            at.serial.die()

            def all_read() -> bool:
                client.read()
                viewer.read()
                return len(client.received) == len(words) == len(viewer.received)

            await until(all_read)
            await at.mux.flush()

    run(main)
