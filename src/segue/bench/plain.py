"""QEMU without Segue: what remains of an upgrade when nothing is kept and nothing is checked.

Two instances on one memory, a socket pair between them, `migrate` with `x-ignore-shared`, and
`cont` as soon as the successor has loaded. `migrate` stops the guest itself: a `stop` before it
makes the pause 1.3 ms longer. Clients, images and faults are nobody's affair here, so this is the
least that any upgrade by device state can take, and Segue's figures are told as multiples of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from segue.bench import guest
from segue.bench.cases import Case
from segue.bench.guest import Shell
from segue.bench.heartbeat import Heartbeat
from segue.bench.subject import Subject, Upgraded
from segue.bench.supervised import BOOT_LIMIT, BOOTED
from segue.errors import SegueError
from segue.qemu import migration
from segue.qemu.binary import probe
from segue.qemu.instance import Instance
from segue.qemu.migration import MigrationWatch
from segue.qemu.monitor import Event

_CAPABILITIES = frozenset({"x-ignore-shared", "events"})
_START_LIMIT = 60.0
_MOVE_LIMIT = 60.0


class Plain(Subject):
    def __init__(self, case: Case, place: Path, number: int) -> None:
        self.case = case
        self.binary = case.old
        self.heartbeat = Heartbeat()
        self._number = number
        self._place = place / f"plain-{number}"
        self._ram = -1
        self._machine = ""
        self._started = 0
        self._instance: Instance | None = None
        self._shell: Shell | None = None
        self._stack = contextlib.ExitStack()

    @property
    def pid(self) -> int:
        return os.getpid()

    async def start(self) -> None:
        assert self.heartbeat is not None
        self._place.mkdir()
        self._ram = os.memfd_create("segue-bench", os.MFD_CLOEXEC)
        self._stack.callback(os.close, self._ram)
        os.ftruncate(self._ram, self.case.ram)
        binary = await probe(self.case.old)
        q35 = binary.machine("q35")
        if q35 is None:
            raise SegueError(f"{self.case.old} does not know the machine type q35")
        self._machine = f"{q35.name},memory-backend=pc.ram"
        self._argv = guest.machine(self.case, self._place, self._number)
        began = time.monotonic()
        self._instance, shell = await self._spawn(self.case.old)
        self.ready = time.monotonic() - began
        self._shell = Shell(shell)
        await asyncio.to_thread(self.heartbeat.wait, BOOTED, BOOT_LIMIT)
        await guest.load_once(self.case, self._shell)

    async def _spawn(self, binary: Path, *more: str) -> tuple[Instance, socket.socket]:
        """An instance that answers, and our end of its shell."""
        assert self.heartbeat is not None
        self._started += 1
        beat, their_beat = socket.socketpair()
        shell, their_shell = socket.socketpair()
        memory = (
            f"memory-backend-file,id=pc.ram,size={self.case.ram},share=on,"
            f"mem-path=/proc/self/fd/{self._ram},x-use-canonical-path-for-ramblock-id=off"
        )
        argv = [
            *(str(binary), "-M", self._machine, "-object", memory, *self._argv, *more),
            *("-chardev", f"socket,id=beat,fd={their_beat.fileno()}"),
            *("-chardev", f"socket,id=shell,fd={their_shell.fileno()}"),
        ]
        with their_beat, their_shell:
            instance = Instance.spawn(
                self._started,
                argv,
                (self._ram, their_beat.fileno(), their_shell.fileno()),
                on_stderr=lambda _: None,
            )
        self._stack.callback(instance.close)
        self._stack.callback(instance.kill_at_once)
        self.heartbeat.listen(beat)
        await instance.connect(_START_LIMIT)
        return instance, shell

    @property
    def instance(self) -> Instance:
        assert self._instance is not None, "start() comes first"
        return self._instance

    async def rest(self) -> None:
        await self.instance.monitor.execute("stop")

    async def wake(self) -> None:
        assert self._shell is not None
        await self.instance.monitor.execute("cont")
        await guest.load_again(self.case, self._shell)

    async def upgrade(self, to: Path) -> Upgraded:
        incumbent = self.instance
        successor, shell = await self._spawn(to, "-incoming", "defer", "-S")
        for instance in (incumbent, successor):
            await migration.configure(instance.monitor, _CAPABILITIES)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            for instance, end in ((incumbent, ours), (successor, theirs)):
                await instance.monitor.execute("getfd", {"fdname": "bench"}, fds=[end.fileno()])
        await successor.monitor.execute("migrate-incoming", {"uri": "fd:bench"})
        begin = time.monotonic()
        async with asyncio.timeout(_MOVE_LIMIT):
            blackout, own = await self._move(incumbent, successor)
        exposed = time.monotonic() - begin
        moved = (await incumbent.monitor.execute("query-migrate"))["ram"]["transferred"]
        await incumbent.kill()
        self._instance = successor
        if self._shell is not None:
            self._shell.close()
        self._shell = Shell(shell)
        self.binary = to
        return Upgraded(incumbent.version, successor.version, blackout, own, exposed, moved)

    async def go_back(self, to: Path) -> None:
        await self.upgrade(to)

    async def _move(self, incumbent: Instance, successor: Instance) -> tuple[float, float]:
        """STOP to RESUME, and our own part of it, in seconds."""
        loop = asyncio.get_running_loop()
        stopped, resumed = loop.create_future(), loop.create_future()
        ends = [
            _at(incumbent, "STOP", stopped),
            _at(successor, "RESUME", resumed),
        ]
        watches = [MigrationWatch(incumbent), MigrationWatch(successor)]
        try:
            await incumbent.monitor.execute("migrate", {"uri": "fd:bench"})
            for watch in reversed(watches):
                await watch.until("completed")
            sent = time.time()
            await successor.monitor.execute("cont")
            blackout = await resumed - await stopped
            return blackout, sent - max(watch.reached("completed") for watch in watches)
        finally:
            for end in (*ends, *(watch.close for watch in watches)):
                end()

    async def close(self) -> None:
        assert self.heartbeat is not None
        self._stack.close()
        self.heartbeat.close()
        if self._shell is not None:
            self._shell.close()


def _at(instance: Instance, name: str, future: asyncio.Future[float]) -> Callable[[], None]:
    """Settle `future` with the time of the next event of that name; returns how to end that."""

    def listener(event: Event) -> None:
        if event["event"] == name and not future.done():
            stamp = event["timestamp"]
            future.set_result(stamp["seconds"] + stamp["microseconds"] / 1e6)

    return instance.monitor.listen(listener)
