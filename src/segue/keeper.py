"""What is done beforehand, so that a machine outlives its supervisor being killed.

machine.json in the run directory says all that another process must know (checkpoint.py), and
each instance holds duplicates of the descriptors that this process has: the ends of its own
sockets, taps and the guest's memory by inheritance, all others (clients' connections, listening
sockets, pty masters) by `add-fd`, each in an fd set of its own that no client is shown. recovery.py
takes them back.

QEMU makes the open files that it is sent block (qio_channel_socket_copy_fds() in
channel-socket.c), for us too, and an instance that hangs does so at any later time. So what is
sent is never read or written without MSG_DONTWAIT, or is made not to block just before.

machine.json, format 2: {"format": 2, "machine": {...}, "descriptors": {NAME:
{"identity": [...], "held": {"INSTANCE": NUMBER THERE}}}} (sealed.py). It is replaced as a whole
whenever something is another, at most every 20 ms; while an upgrade is under way only at its
beginning and end. `clients` is 256 bytes, shared memory: the N-th is 1 while something of the N-th
QMP client's is in this process alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import mmap
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segue import checkpoint
from segue.errors import SegueError
from segue.qemu.instance import Instance
from segue.qmp.server import FDSETS, MAX_CLIENTS
from segue.saved import Identity, Named, Saver, identity
from segue.sealed import seal

if TYPE_CHECKING:
    from segue.supervisor import Supervisor

FORMAT = 2
_PAUSE = 0.02
_PATIENCE = 10.0
_RETRY = 1.0
"""Seconds for QEMU to take a descriptor."""


@dataclass(frozen=True)
class Deposit:
    """A duplicate that an instance holds for us."""

    identity: Identity
    fdset: int
    number: int


class Keeper:
    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._deposits: dict[int, dict[str, Deposit]] = {}
        self._sets = itertools.count(FDSETS)
        self._timer: asyncio.TimerHandle | None = None
        self._began = -_PAUSE
        self._again = False
        self._working: asyncio.Task[None] | None = None
        self._active = False
        self._depositing = asyncio.Lock()
        self._busy: mmap.mmap | None = None

    def busy(self) -> mmap.mmap:
        """The shared memory of the file `clients`."""
        path = self._supervisor.directory.path / "clients"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, MAX_CLIENTS)
            self._busy = mmap.mmap(fd, MAX_CLIENTS)
        finally:
            os.close(fd)
        return self._busy

    def begin(self) -> None:
        self._active = True
        # Numbers of an earlier process's sets must not come again.
        self._sets = itertools.count(FDSETS + time.monotonic_ns())
        self.write()
        self.changed()

    def save(self) -> dict[str, Any]:
        return {
            str(instance): {name: asdict(deposit) for name, deposit in deposits.items()}
            for instance, deposits in self._deposits.items()
        }

    def load(self, saved: dict[str, Any]) -> None:
        for instance, deposits in saved.items():
            self._deposits[int(instance)] = {
                name: Deposit(**deposit) for name, deposit in deposits.items()
            }

    async def quiet(self) -> None:
        """Wait until nothing is under way."""
        if self._working is not None:
            await asyncio.wait([self._working])

    def close(self) -> None:
        self._active = False
        if self._timer is not None:
            self._timer.cancel()
        if self._working is not None:
            self._working.cancel()

    def changed(self) -> None:
        """Something is another than machine.json says. Cheap, and may be called at any time.

        It is acted on as soon as the caller is done, unless something else was just before: who
        connects is lost by a kill until QEMU has been sent a duplicate.
        """
        if self._active and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(max(loop.time(), self._began + _PAUSE), self._due)

    def _due(self) -> None:
        self._timer = None
        if self._supervisor.upgrader.busy:
            return  # at its end
        if self._working is not None:
            self._again = True
            return
        self._began = asyncio.get_running_loop().time()
        self._working = asyncio.ensure_future(self._work())
        self._working.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._working = None
        if self._again:
            self._again = False
            self.changed()
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error

    async def _work(self) -> None:
        self.write()
        try:
            await self._deposit(self._supervisor.instance)
        except OSError:  # no descriptors left: there will be some again
            asyncio.get_running_loop().call_later(_RETRY, self.changed)
            return
        self.write()

    async def safeguard(self) -> None:
        """At once, for all instances. Raises SegueError where one does not answer, OSError."""
        if not self._active:
            return
        await self.quiet()
        for instance in self._supervisor.instances:
            await self._deposit(instance)
        self.write()

    def write(self) -> None:
        """Replace machine.json; a full disk costs nothing but the way back after a crash."""
        if not self._active or not self._supervisor.instance.running:
            return
        path = self._supervisor.directory.machine
        new = Path(f"{path}.new")
        saver = Saver(exact=False)
        with contextlib.suppress(OSError):
            machine = checkpoint.save(self._supervisor, saver)
            self._supervisor.store.keep(saver)
            descriptors = {name: self._describe(name, each) for name, each in saver.found.items()}
            record = {"format": FORMAT, "machine": machine, "descriptors": descriptors}
            new.write_bytes(seal(record))
            new.replace(path)

    def _describe(self, name: str, named: Named) -> dict[str, Any]:
        held = {str(instance): number for instance, number in (named.held or {}).items()}
        for instance, deposits in self._deposits.items():
            if name in deposits:
                held[str(instance)] = deposits[name].number
        return {"identity": identity("self", named.fd), "held": held}

    async def _deposit(self, instance: Instance) -> None:
        """Have the instance hold what it is to hold, and nothing else."""
        async with self._depositing:
            await self._deposit_now(instance)

    async def _deposit_now(self, instance: Instance) -> None:
        saver = Saver(exact=False)
        checkpoint.save(self._supervisor, saver)
        wanted = {name: each.fd for name, each in saver.found.items() if not each.lent}
        # What is closed meanwhile must not become another file under its number.
        copies: dict[str, int] = {}
        try:
            for name, fd in wanted.items():
                copies[name] = os.dup(fd)
        except OSError:
            for fd in copies.values():
                os.close(fd)
            raise
        known = {each.number for each in self._supervisor.instances}
        for gone in self._deposits.keys() - known:
            del self._deposits[gone]
        there = self._deposits.setdefault(instance.number, {})
        monitor = instance.monitor
        stale = {
            name: deposit
            for name, deposit in there.items()
            if name not in copies or identity("self", copies[name]) != deposit.identity
        }
        for name in stale:
            del there[name]
        try:
            for name, fd in copies.items():
                if name not in there:
                    fdset = next(self._sets)
                    answer = await monitor.execute(
                        "add-fd", {"fdset-id": fdset}, timeout=_PATIENCE, fds=[fd]
                    )
                    there[name] = Deposit(identity("self", fd), fdset, answer["fd"])
            if stale:
                # What machine.json says is held is held: it must not name what is taken out now.
                self.write()
            for deposit in stale.values():
                arguments = {"fdset-id": deposit.fdset, "fd": deposit.number}
                await monitor.execute("remove-fd", arguments, timeout=_PATIENCE)
        except (SegueError, TimeoutError):
            return  # it lives without
        finally:
            for fd in copies.values():
                os.close(fd)
