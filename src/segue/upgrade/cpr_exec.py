"""cpr-exec: QEMU's own way since 10.2, in which the same process executes the new binary.

QEMU alone cannot go back once it has executed. Here it can: what QEMU executes is `launcher.py`,
which first gives the supervisor a duplicate of every descriptor that QEMU has left open (the
guest's firmware and video memory is in them). With these, the state in a file and the guest's RAM
the *old* binary is started again if the new one dies, hangs or refuses the state. A rehearsal of
a handover comes first (see modes.py), so that this is for what no rehearsal shows.

A reset or power-off that the guest asks for in the very moment of the stop can be lost: QEMU saves
and executes without going round its main loop in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path

from segue.errors import GuestLost, QemuError, Refused, SegueError
from segue.kept.base import Lending
from segue.qemu import migration
from segue.qemu.instance import Instance, monitor_words
from segue.upgrade import images, launcher, wishes
from segue.upgrade.commit import switch
from segue.upgrade.handover import Handover
from segue.upgrade.phases import MOVE, PREPARE

_STATE = "cpr-state"
_LAUNCHER = "launcher.sock"
_ENVIRONMENT = "QEMU_CPR_EXEC_STATE"
_WAYS_BACK = 10.0
"""Seconds for the old binary to take over again; far more than it needs."""


@dataclass
class _Place:
    """What one QEMU is started with, and the two ends of its monitor."""

    lending: Lending
    argv: list[str]
    ours: socket.socket
    theirs: socket.socket

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


@dataclass
class CprExec(Handover):
    _place: _Place | None = None
    _program: list[str] = field(default_factory=list)
    _called: asyncio.Future[socket.socket] | None = None
    _connection: socket.socket | None = None
    _preserved: dict[int, int] = field(default_factory=dict)
    _useless: list[int] = field(default_factory=list)
    _number_of_state: str = ""

    async def _prepare(self) -> None:
        await self._freeze()
        await self._look()
        self.surroundings.journal.write("prepare", self.incumbent, None)
        self._place = self._new_place(self.surroundings.lend(False), _top(self.incumbent.pid))

    def _new_place(self, lending: Lending, first_number: int) -> _Place:
        """Raises Refused if the process may not have as many descriptors."""
        lending.first_number = first_number
        argv = self.surroundings.argv(lending)
        ours, theirs = socket.socketpair()
        argv += monitor_words(lending.inherit(theirs.fileno()))
        lending.inherit(ours.fileno())
        # Every instance has the supervisor's own limits.
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if max(lending.numbers.values()) >= most:
            raise Refused(
                f"QEMU may open {most} files only",
                hint="start the machine with a higher `ulimit -n`, or use --mode handover",
            )
        return _Place(lending, argv, ours, theirs)

    async def _open(self) -> None:
        directory = self.surroundings.directory
        for name in (_LAUNCHER, _STATE):
            self._stack.callback((directory / name).unlink, missing_ok=True)
        self._stack.callback(self._let_go)
        monitor = self.incumbent.monitor
        fds = self._stack.enter_context(images.opened(await images.paths(monitor)))
        command = [*_launcher(), str(directory / _LAUNCHER)]
        self._before = await migration.configure(
            monitor, frozenset({"events"}), mode="cpr-exec", **{"cpr-exec-command": command}
        )
        self._watches = [self._watch(self.incumbent)]
        self._called = self._listen(directory / _LAUNCHER)
        await images.write_out(fds)
        self.surroundings.journal.write("open", self.incumbent, None)

    def _listen(self, path: Path) -> asyncio.Future[socket.socket]:
        """The connection of the next launcher."""
        loop = asyncio.get_running_loop()
        called: asyncio.Future[socket.socket] = loop.create_future()
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(path))
        listener.listen(1)

        def accept() -> None:
            if not called.done():
                connection = listener.accept()[0]
                connection.settimeout(2)
                called.set_result(connection)

        def close(_: object) -> None:
            loop.remove_reader(listener.fileno())
            listener.close()

        loop.add_reader(listener.fileno(), accept)
        called.add_done_callback(close)
        self._stack.callback(called.cancel)
        return called

    async def _begin(self) -> None:
        uri = f"file:{self.surroundings.directory / _STATE}"
        await self.incumbent.monitor.execute("migrate", {"uri": uri})

    async def _go_round(self) -> None:
        """There is no later for the incumbent."""

    async def _move(self) -> None:
        assert self._called is not None
        failed = self._watches[0].until("failed")
        await asyncio.wait((self._called, failed), return_when=asyncio.FIRST_COMPLETED)
        if not self._called.done():
            failed.result()
            raise QemuError("QEMU could not execute anything", hint="see the machine's qemu.log")
        successor = self._take_over(self._called.result())
        self._order(successor)
        await self._load(successor)
        self._check_guest()

    def _take_over(self, connection: socket.socket) -> Instance:
        """The process is no QEMU any more: what it holds is held here too."""
        assert self._place is not None
        self._connection = connection
        try:
            message, fds = launcher.receive(connection)
        except (OSError, ValueError) as error:
            raise GuestLost(
                f"QEMU has executed, and what it had did not come here: {error}",
                hint="see the machine's qemu.log",
                guest="lost",
            ) from None
        self._number_of_state = message["state"]
        held = dict(zip(message["held"], fds, strict=True))
        # What it was given once is of no use to the next one, unless QEMU has put something else
        # there since.
        self._useless = [
            number
            for number, identity in self.incumbent.inherited.items()
            if number in held and _identity(held[number]) == identity
        ]
        for number in self._useless:
            os.close(held.pop(number))
        self._preserved = held
        place = self._place
        self.successor = self.incumbent.become(
            place.lending.number,
            place.argv,
            (place.ours, place.theirs),
            place.lending.numbers,
        )
        self.surroundings.adopt(self.successor)
        assert self.receipt.target is not None
        self.receipt.target.pid = self.successor.pid
        return self.successor

    def _order(self, instance: Instance) -> None:
        assert self._place is not None and self._connection is not None
        numbers = self._place.lending.numbers
        launcher.send(
            self._connection,
            {
                "argv": self._place.argv,
                "close": self._useless,
                "numbers": list(numbers.values()),
            },
            list(numbers),
        )
        self._connection.close()
        self.surroundings.journal.write("move", self.incumbent, instance)

    async def _load(self, instance: Instance) -> None:
        monitor = await instance.connect(self._limit(MOVE))
        await self._furnish(monitor)
        self._fresh = await migration.configure(monitor, frozenset({"events"}))
        watch = self._watch(instance)
        self._watches = [*self._watches[:1], watch]
        uri = f"file:{self.surroundings.directory / _STATE}"
        await monitor.execute("migrate-incoming", {"uri": uri})
        await self._until(watch.until("completed"))

    async def _bytes_moved(self) -> int:
        return (self.surroundings.directory / _STATE).stat().st_size

    async def _undo(self) -> None:
        if self._called is not None and self._migrating and self._connection is None:
            failed = self._watches[0].until("failed")
            await asyncio.wait(
                (self._called, failed),
                return_when=asyncio.FIRST_COMPLETED,
                timeout=self._limit(MOVE),
            )
            if self._called.done():
                self._take_over(self._called.result())
        if self._connection is None:
            await super()._undo()
        else:
            try:
                async with asyncio.timeout(_WAYS_BACK):
                    await self._bring_back()
            except (SegueError, OSError, TimeoutError) as error:
                assert self.successor is not None
                await self.successor.kill()
                raise GuestLost(
                    f"the old QEMU could not be started again: {_why(error)}",
                    hint="see the machine's qemu.log",
                    guest="lost",
                ) from None
            self.phase = PREPARE

    async def _bring_back(self) -> None:
        """The binary that ran before takes the guest up again, as a process of its own."""
        assert self.successor is not None
        self.surroundings.journal.write("undo", self.successor, None)
        await self.successor.kill()
        self.successor.close()
        lending = self.surroundings.lend(True)
        place = self._place = self._new_place(lending, max([*self._preserved, 2]) + 1)
        path = self.surroundings.directory / _LAUNCHER
        called = self._listen(path)
        self.successor = old = self.surroundings.launch(
            lending,
            place.argv,
            (place.ours, place.theirs),
            [*_launcher(), str(path)],
            {_ENVIRONMENT: self._number_of_state},
        )
        os.lseek(self._preserved[int(self._number_of_state)], 0, os.SEEK_SET)
        self._connection = await called
        message, fds = launcher.receive(self._connection)
        for fd in fds:
            os.close(fd)
        numbers = lending.numbers | {ours: number for number, ours in self._preserved.items()}
        launcher.send(
            self._connection,
            {"argv": place.argv, "close": message["held"], "numbers": list(numbers.values())},
            list(numbers),
        )
        self._connection.close()
        await self._load(old)
        if self.loses_interrupts:
            await self._give_again(old)
        if self._was_running and not wishes.stopped_itself(self._events):
            await old.monitor.execute("cont")
        switch(old, self.surroundings)
        await self._retire()
        self.receipt.guest = f"running on the incumbent's binary again, as process {old.pid}"

    def _let_go(self) -> None:
        for fd in self._preserved.values():
            os.close(fd)
        self._preserved.clear()


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"it took longer than {_WAYS_BACK:g} s"
    return error.what if isinstance(error, SegueError) else str(error)


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _launcher() -> list[str]:
    return [sys.executable, "-ISE", launcher.__file__]


def _top(pid: int) -> int:
    """A number above every descriptor that the process has, and will have until it is told."""
    return max(int(name) for name in os.listdir(f"/proc/{pid}/fd")) + 64
