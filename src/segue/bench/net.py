"""What a guest's network is through an upgrade, seen from outside: silence, and packets lost.

Three machines on a tap each, in a network namespace of the bench's own:

    segue           under `segue run`: queues lent and taken back, QEMU's ioctls answered by a guard
    no guard        two QEMUs on one tap, handed over as Segue does, with nothing in between
    cpr-transfer    QEMU's own way, with the same tap given to both (from QEMU 10.0 on)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from segue.bench import guest
from segue.bench.pings import Pings
from segue.errors import CommandFailed, SegueError
from segue.kept import tun
from segue.qemu import migration
from segue.qemu.binary import probe
from segue.qemu.instance import Instance
from segue.qemu.migration import MigrationWatch

SEGUE, BARE, CPR = "segue", "no guard", "cpr-transfer"
WAYS = (SEGUE, BARE, CPR)

_RAM = 256 << 20
_LIMIT = 120.0
# Seconds of pings before and after an upgrade.
_AROUND = 0.7

Tell = Callable[[str], None]


class Arrivals(Pings):
    """As `Pings`, and when each answer of the last stretch came."""

    patience = 3.0

    def __init__(self, to: str) -> None:
        super().__init__(to)
        self.times: list[float] = []

    def answered(self, number: int) -> None:
        super().answered(number)
        self.times.append(time.monotonic())


@dataclass
class Found:
    """What was seen of one way; `times` are the arrivals of the last run, from its upgrade on."""

    way: str
    refused: str | None = None
    silences: list[float] = field(default_factory=list)
    lost: int = 0
    sent: int = 0
    times: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "way": self.way,
            "refused": self.refused,
            "runs": len(self.silences),
            "silence_seconds": {
                "median": statistics.median(self.silences) if self.silences else None,
                "longest": max(self.silences, default=None),
            },
            "pings_sent": self.sent,
            "pings_lost": self.lost,
            "arrivals": [round(t, 6) for t in self.times],
        }


class Machine(ABC):
    """One guest on a tap. `number` gives it a name and addresses of its own."""

    def __init__(self, place: Path, number: int, binary: Path) -> None:
        self.place = place / f"net-{number}"
        self.place.mkdir()
        self.binary = binary
        self.host, self.guest = guest.addresses(number)
        self.tap = f"bench{number}"

    def argv(self, *network: str) -> list[str]:
        files = guest.files()
        words = f"console=ttyS0 quiet segue.ip={self.guest}/30"
        return [
            *("-m", f"{_RAM >> 20}", "-nodefaults", "-display", "none", "-serial", "null"),
            *("-kernel", str(files.kernel), "-initrd", str(files.initrd), "-append", words),
            *("-netdev", f"tap,id=net,{','.join(network)}"),
            *("-device", "virtio-net-pci,netdev=net"),
        ]

    def up(self) -> None:
        for words in (f"address add {self.host}/30 dev {self.tap}", f"link set {self.tap} up"):
            subprocess.run(["ip", *words.split()], check=True)  # noqa: S607

    @abstractmethod
    async def start(self) -> None: ...
    @abstractmethod
    async def upgrade(self, to: Path) -> None: ...
    @abstractmethod
    async def close(self) -> None: ...


class Ours(Machine):
    """Under a supervisor."""

    async def start(self) -> None:
        network = (f"ifname={self.tap}", "script=no", "downscript=no")
        words = ["--name", self.tap, "--detach", "--", str(self.binary), "-M", "q35"]
        await self._segue("run", *words, *self.argv(*network))
        self.up()

    async def upgrade(self, to: Path) -> None:
        await self._segue("upgrade", self.tap, "--to", str(to), "--force", "--json")

    async def close(self) -> None:
        with contextlib.suppress(SegueError):
            await self._segue("stop", self.tap, "--timeout", "0.1")

    async def _segue(self, *words: str) -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "segue", *words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, said = await process.communicate()
        if process.returncode:
            raise SegueError(f"segue {words[0]}: {said.decode(errors='replace').strip()}")


class Bare(Machine):
    """Two QEMUs on one tap, and nobody between them."""

    def __init__(self, place: Path, number: int, binary: Path) -> None:
        super().__init__(place, number, binary)
        self._queue = self._ram = -1
        self._machine = ""
        self._count = 0
        self._instance: Instance | None = None

    async def start(self) -> None:
        q35 = (await probe(self.binary)).machine("q35")
        if q35 is None:
            raise SegueError(f"{self.binary} does not know the machine type q35")
        self._machine = q35.name
        flags = tun.IFF_TAP | tun.IFF_NO_PI | tun.IFF_VNET_HDR
        self._queue, _ = tun.open_queue(self.tap, flags)
        self._ram = os.memfd_create("segue-bench", os.MFD_CLOEXEC)
        os.ftruncate(self._ram, _RAM)
        self.up()
        self._instance = self._spawn(self.binary)
        await self._instance.connect(_LIMIT)

    def memory(self) -> list[str]:
        backend = (
            f"memory-backend-file,id=pc.ram,size={_RAM},share=on,"
            f"mem-path=/proc/self/fd/{self._ram},x-use-canonical-path-for-ramblock-id=off"
        )
        return ["-M", f"{self._machine},memory-backend=pc.ram", "-object", backend]

    def _spawn(self, binary: Path, *more: str) -> Instance:
        self._count += 1
        network = self.argv(f"fd={self._queue}")
        return Instance.spawn(
            self._count,
            [str(binary), *self.memory(), *network, *more],
            (self._queue, self._ram),
            on_stderr=lambda _: None,
        )

    async def upgrade(self, to: Path) -> None:
        old = self._instance
        assert old is not None
        new = self._spawn(to, "-incoming", "defer", "-S")
        try:
            await new.connect(_LIMIT)
            await self._move(old, new)
        except BaseException:
            new.kill_at_once()
            new.close()
            raise
        await old.kill()
        old.close()
        self._instance = new

    async def _move(self, old: Instance, new: Instance) -> None:
        for instance in (old, new):
            await migration.configure(instance.monitor, frozenset({"x-ignore-shared", "events"}))
        ours, theirs = socket.socketpair()
        with ours, theirs:
            for instance, end in ((old, ours), (new, theirs)):
                await instance.monitor.execute("getfd", {"fdname": "bench"}, fds=[end.fileno()])
        await new.monitor.execute("migrate-incoming", {"uri": "fd:bench"})
        watches = [MigrationWatch(old), MigrationWatch(new)]
        try:
            async with asyncio.timeout(_LIMIT):
                await old.monitor.execute("migrate", {"uri": "fd:bench"})
                for watch in reversed(watches):
                    await watch.until("completed")
                await new.monitor.execute("cont")
        finally:
            for watch in watches:
                watch.close()

    async def close(self) -> None:
        if self._instance is not None:
            await self._instance.kill()
            self._instance.close()
        for fd in (self._queue, self._ram):
            if fd >= 0:
                os.close(fd)


class Cpr(Bare):
    """QEMU's own way: the successor takes the memory from the incumbent."""

    def memory(self) -> list[str]:
        backend = f"memory-backend-memfd,id=pc.ram,size={_RAM},share=on"
        machine = f"{self._machine},memory-backend=pc.ram,aux-ram-share=on"
        return ["-M", machine, "-object", backend]

    async def start(self) -> None:
        if (await probe(self.binary)).version < (10, 0, 0):
            raise SegueError("QEMU has cpr-transfer since 10.0")
        await super().start()

    async def upgrade(self, to: Path) -> None:
        old = self._instance
        assert old is not None
        paths = {kind: self.place / f"{kind}.sock" for kind in ("main", "cpr")}
        for path in paths.values():
            path.unlink(missing_ok=True)
        channels = [
            {
                "channel-type": kind,
                "addr": {"transport": "socket", "type": "unix", "path": str(path)},
            }
            for kind, path in paths.items()
        ]
        incoming = ["-incoming", json.dumps(channels[1]), "-incoming", "defer", "-S"]
        new = self._spawn(to, *incoming)
        try:
            events = frozenset({"events"})
            await migration.configure(old.monitor, events, mode="cpr-transfer")
            # The successor listens before anything else; it is there when the path is.
            async with asyncio.timeout(_LIMIT):
                while True:
                    try:
                        await old.monitor.execute("migrate", {"channels": channels})
                        break
                    except CommandFailed:
                        if not new.running:
                            raise await new.death() from None
                        await asyncio.sleep(0.01)
                await new.connect(_LIMIT)
                await migration.configure(new.monitor, events)
                watches = [MigrationWatch(old), MigrationWatch(new)]
                await new.monitor.execute("migrate-incoming", {"uri": f"unix:{paths['main']}"})
                for watch in reversed(watches):
                    await watch.until("completed")
                await new.monitor.execute("cont")
        except BaseException:
            new.kill_at_once()
            new.close()
            raise
        for watch in watches:
            watch.close()
        await old.kill()
        old.close()
        self._instance = new


_KINDS: dict[str, type[Machine]] = {SEGUE: Ours, BARE: Bare, CPR: Cpr}


async def silences(old: Path, new: Path, runs: int, place: Path, tell: Tell) -> list[Found]:
    """Each way, `runs` upgrades, in turn; there and back again. Takes a namespace (pings.py)."""
    found = [Found(way) for way in WAYS]
    machines: dict[str, Machine] = {}
    pings: dict[str, Arrivals] = {}
    try:
        for number, one in enumerate(found):
            tell(f"starting a guest: {one.way}")
            machines[one.way] = machine = _KINDS[one.way](place, number, old)
            try:
                await machine.start()
                pings[one.way] = Arrivals(machine.guest)
                await asyncio.to_thread(_booted, pings[one.way])
            except SegueError as error:
                one.refused = str(error)
        for run in range(runs):
            for one in found:
                if one.refused is None:
                    await _run(one, machines[one.way], pings[one.way], (new, old)[run % 2])
                    tell(f"{run + 1}/{runs} {one.way}")
    finally:
        for each in pings.values():
            each.close()
        for machine in machines.values():
            with contextlib.suppress(SegueError):
                await machine.close()
    return found


def _booted(pings: Arrivals) -> None:
    pings.begin()
    end = time.monotonic() + _LIMIT
    while len(pings.times) < 100:
        if time.monotonic() > end:
            raise SegueError("the guest does not answer")
        time.sleep(0.05)
    pings.end()
    pings.sent = pings.lost = 0


async def _run(one: Found, machine: Machine, pings: Arrivals, to: Path) -> None:
    pings.times.clear()
    lost, sent = pings.lost, pings.sent
    pings.begin()
    try:
        await asyncio.sleep(_AROUND)
        try:
            await machine.upgrade(to)
        except SegueError as error:
            one.refused = str(error)
            return
        await asyncio.sleep(_AROUND)
    finally:
        await asyncio.to_thread(pings.end)
    times = sorted(pings.times)
    longest = max(pairwise(times), key=lambda pair: pair[1] - pair[0])
    one.silences.append(longest[1] - longest[0])
    one.lost += pings.lost - lost
    one.sent += pings.sent - sent
    one.times = [t - longest[1] for t in times]
