"""What it costs to replace a supervisor in place: silence, memory, descriptors."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segue import machines
from segue.bench import host, memory
from segue.bench.cases import Case, Load
from segue.bench.figures import summarise
from segue.bench.supervised import Embedded
from segue.errors import SegueError
from segue.qemu.monitor import Monitor

_QUIET = 0.5
_AFTER = 0.3


@dataclass(frozen=True)
class Reexec:
    """Seconds. `qmp` and `console` are the longest that somebody waited for an answer of QMP's and
    for a byte of the guest's; `guest` from beat to beat by the guest's own clock, `quiet` the same
    in the half second before; `total` from asking for it to the new code's answer.
    """

    total: float
    qmp: float
    console: float | None
    guest: float | None
    quiet: float | None


@dataclass
class ReexecBench:
    """Of the Linux guest under `qemu`, `runs` times; `told` after each."""

    qemu: Path
    runs: int
    told: Callable[[int, Reexec], None]
    done: list[Reexec] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    async def run(self, place: Path) -> None:
        case = Case("handover", self.qemu, self.qemu, 512 << 20, Load.IDLE)
        subject = Embedded(case, place, 0)
        try:
            await subject.start()
            self._look(subject.pid)
            for number in range(self.runs):
                run = await self._once(subject)
                self.done.append(run)
                await asyncio.sleep(_AFTER)  # until our client of before is gone
                self._look(subject.pid)
                self.told(number + 1, run)
        finally:
            await subject.close()

    def _look(self, pid: int) -> None:
        self.resident.append(memory.resident(pid))
        self.descriptors.append(len(os.listdir(f"/proc/{pid}/fd")))

    async def _once(self, subject: Embedded) -> Reexec:
        assert subject.heartbeat is not None
        other = await _connect(subject.machine)
        waits: list[float] = []
        asking = asyncio.ensure_future(_ask_on_and_on(other, waits))
        try:
            await asyncio.sleep(_QUIET)
            waits.clear()
            begin = time.monotonic()
            await subject.monitor.execute("segue-reexec")
            end = time.monotonic()
            await asyncio.sleep(_AFTER)
        finally:
            asking.cancel()
            other.close()
        beats = subject.heartbeat.beats
        if beats.lost or beats.garbled:
            raise SegueError("a reexec has cost the guest's console something")
        return Reexec(
            end - begin,
            max(waits),
            beats.gap(begin, end),
            beats.own_gap(begin, end),
            beats.gap(begin - _QUIET, begin),
        )

    def to_json(self) -> dict[str, Any]:
        figures = {}
        for name in Reexec.__dataclass_fields__:
            values = [v for run in self.done if (v := getattr(run, name)) is not None]
            summary = summarise(values)
            figures[name] = summary and summary.to_json()
        return {
            "qemu": str(self.qemu),
            "runs": len(self.done),
            "figures": figures,
            "resident": self.resident,
            "descriptors": self.descriptors,
            "host": host.describe(),
            "load_averages": host.load(),
        }


async def _connect(machine: machines.MachineStatus) -> Monitor:
    import socket

    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(machine.directory.qmp))
    return await Monitor.connect(sock)


async def _ask_on_and_on(monitor: Monitor, waits: list[float]) -> None:
    while True:
        asked = time.monotonic()
        await monitor.execute("query-status")
        waits.append(time.monotonic() - asked)
        await asyncio.sleep(0.001)
