"""suspend: the whole guest into a directory (suspended.py), to be resumed later by any QEMU.

QEMU's own cpr-reboot does the same from 8.2 on with a file; here the stream goes through a socket
to the supervisor, so that 7.2 can do it and a checksum is made on the way. The commit point is
the renaming of machine.json: before it the incumbent goes on and the directory is removed; after
it the incumbent never runs again.
"""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segue.errors import Refused
from segue.kept.files import KeptFile
from segue.kept.ram import GuestRam
from segue.qemu import migration
from segue.suspended import (
    boot_id,
    bytes_in,
    disk,
    make_directory,
    ram_in_place,
    write_copy,
    write_description,
)
from segue.upgrade import images
from segue.upgrade.handover import Handover
from segue.upgrade.phases import MOVE, Phase

_SLACK = 64 << 20
_COPYING = 3600.0
"""Seconds for the memory to be written; the guest is paused, but nothing is lost by waiting."""


@dataclass
class Suspend(Handover):
    """`machine` is what its supervisor knows of it, for machine.json."""

    to: Path = Path()
    machine: dict[str, Any] = field(default_factory=dict)
    _end: socket.socket | None = None
    _state: dict[str, Any] = field(default_factory=dict)
    _reading: asyncio.Task[None] | None = None
    _disks: list[str] = field(default_factory=list)

    def _limit(self, phase: Phase) -> float:
        return self.limits.get(phase.name, _COPYING if phase is MOVE else phase.limit)

    async def _prepare(self) -> None:
        await self._freeze()
        await self._look()
        make_directory(self.to)
        self._stack.callback(self._remove_unless_whole)
        # A supervisor that takes the guest up after us must not leave it to be resumed as well.
        self.surroundings.journal.directory = self.to.absolute()
        self._stack.callback(setattr, self.surroundings.journal, "directory", None)
        self.surroundings.journal.write("prepare", self.incumbent, None)
        free = os.statvfs(self.to)
        needed = sum(bytes_in(ram.fd) for ram in self._ram() if ram.place is None) + _SLACK
        if free.f_bavail * free.f_frsize < needed:
            raise Refused(
                f"{self.to} has no room for {needed >> 20} MiB",
                hint="make room, or name another --to DIR",
            )

    def _ram(self) -> list[GuestRam]:
        return [kept for kept in self.surroundings.kept if isinstance(kept, GuestRam)]

    async def _open(self) -> None:
        monitor = self.incumbent.monitor
        self._disks = await images.paths(monitor)
        fds = self._stack.enter_context(images.opened(self._disks))
        self._before = await migration.configure(monitor, frozenset({"x-ignore-shared", "events"}))
        self._watches = [self._watch(self.incumbent)]
        self._end, theirs = socket.socketpair()
        self._stack.callback(self._end.close)
        self._end.setblocking(False)
        with theirs:
            await monitor.execute("getfd", {"fdname": "segue"}, fds=[theirs.fileno()])
        self._reading = asyncio.ensure_future(self._read_state())
        self._stack.callback(self._reading.cancel)
        await images.write_out(fds)
        self.surroundings.journal.write("open", self.incumbent, None)

    async def _read_state(self) -> None:
        assert self._end is not None
        from hashlib import sha256  # as in suspended.py

        loop = asyncio.get_running_loop()
        digest = sha256()
        size = 0
        with (self.to / "state").open("xb") as file:
            while chunk := await loop.sock_recv(self._end, 1 << 20):
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
            file.flush()
            os.fsync(file.fileno())
        self._state = {
            "name": "state",
            "bytes": size,
            "offsets": [[0, size]],
            "sha256": digest.hexdigest(),
        }

    async def _move(self) -> None:
        assert self._reading is not None
        completed = self._watches[0].until("completed")
        await asyncio.wait((completed, self._reading), return_when=asyncio.FIRST_EXCEPTION)
        if self._reading.done():
            self._reading.result()  # a full disk is told as that, and not as a broken pipe
        await completed
        await self._reading
        if self._went_round is not None:
            await self._went_round
        self._check_guest()
        files = [kept for kept in self.surroundings.kept if isinstance(kept, KeptFile)]
        self.machine |= {
            "phase": "suspended",
            "boot_id": boot_id(),
            "qemu_pid": self.incumbent.pid,
            "qemu_start_time": self.incumbent.start_time,
            "running": self._was_running,
            "state": self._state,
            "ram": await asyncio.to_thread(self._write_ram),
            "files": [
                await asyncio.to_thread(write_copy, file.fd, self.to / f"file-{number}")
                for number, file in enumerate(files)
            ],
            "disks": [disk(path) for path in self._disks],
        }

    def _write_ram(self) -> list[dict[str, Any]]:
        return [
            self._left_in_place(ram.fd, ram.place)
            if ram.place is not None
            else write_copy(ram.fd, self.to / f"ram-{number}")
            for number, ram in enumerate(self._ram())
        ]

    def _left_in_place(self, fd: int, path: Path) -> dict[str, Any]:
        os.fsync(fd)  # it may be on a disk, and the host rebooted
        return ram_in_place(path)

    async def _commit(self) -> None:
        self.surroundings.journal.write("commit", self.incumbent, None)
        # Nothing is awaited between the two, so that nothing can call it off in between.
        try:
            write_description(self.to, self.machine)
        except OSError:
            (self.to / "machine.json").unlink(missing_ok=True)
            raise
        self.incumbent.kill_at_once()
        self.receipt.guest = f"suspended in {self.to}"

    def _remove_unless_whole(self) -> None:
        from shutil import rmtree

        if not (self.to / "machine.json").exists():
            rmtree(self.to, ignore_errors=True)

    async def _release(self) -> None:
        """Nobody is there for what was held."""

    async def _retire(self) -> None:
        self.surroundings.journal.directory = None
        await self.incumbent.wait()
        self.surroundings.journal.write("done", self.incumbent, None)
