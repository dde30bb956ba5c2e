"""The runs: every case in turn, again and again, so that what disturbs one disturbs all."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

import segue
from segue.bench import figures, host, memory
from segue.bench.cases import Case
from segue.bench.figures import Figures, Summary
from segue.bench.subject import Subject
from segue.errors import Refused, TimedOut

FORMAT = 1
"""Of the JSON document that `Bench.to_json` gives."""

# Beats of quiet before an upgrade (a second), and after it, so that its window has an end and a
# guest that is slow at first can be seen to recover.
_BEFORE = 1000
_AFTER = 500
_BEAT_LIMIT = 30.0
_WITHOUT_BEATS = 0.5
"""Seconds of quiet, where the guest does not beat."""

_TRACE = (0.05, 0.2)
"""Seconds before and after an upgrade of which each beat is kept, for the picture."""


@dataclass
class Outcome:
    """All runs of one case; `refused` says why there are none.

    `unfinished` tells of the runs that took too long and were undone: a guest that dirties its
    memory faster than it is copied. `trace` are the beats around the last run, in seconds from
    its beginning. `ready` are the seconds that its start took.
    """

    case: Case
    old: str = ""
    new: str = ""
    runs: list[Figures] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    not_kept: list[str] = field(default_factory=list)
    trace: list[float] = field(default_factory=list)
    refused: str | None = None
    ready: float | None = None

    @property
    def summaries(self) -> dict[str, Summary | None]:
        return figures.summaries(self.runs)

    def to_json(self) -> dict[str, Any]:
        return {
            **self.case.to_json(),
            "old_version": self.old,
            "new_version": self.new,
            "ready": self.ready,
            "refused": self.refused,
            "converged": len(self.runs),
            "unfinished": self.unfinished,
            "not_kept": self.not_kept,
            "summary": figures.to_json(self.summaries),
            "runs": [run.to_json() for run in self.runs],
            "trace": [round(beat, 6) for beat in self.trace],
        }


@dataclass
class Supervisor:
    """Bytes of one supervisor at rest: when its guest has just booted, and after all upgrades."""

    case: Case
    resident: list[int] = field(default_factory=list)
    proportional: list[int] = field(default_factory=list)

    def note(self, pid: int) -> None:
        self.resident.append(memory.resident(pid))
        self.proportional.append(memory.proportional(pid))

    def to_json(self) -> dict[str, Any]:
        return {
            "way": self.case.way,
            "ram": self.case.ram,
            "resident": self.resident,
            "proportional": self.proportional,
        }


class Watcher(Protocol):
    """Told of what goes on, to show it."""

    def starting(self, case: Case) -> None: ...

    def measured(self, done: int, total: int, outcome: Outcome) -> None: ...


class Bench:
    """Measures `subjects`, each `runs` times.

    Where old and new are two, the machine is brought back after each run, unmeasured.
    """

    def __init__(self, subjects: Sequence[Subject], runs: int, watcher: Watcher) -> None:
        self._subjects = subjects
        self._runs = runs
        self._watcher = watcher
        self.outcomes = [Outcome(subject.case) for subject in subjects]
        self.supervisors = [Supervisor(subject.case) for subject in subjects]
        self._before: dict[int, tuple[int, int, int]] = {}
        self._began = datetime.now(UTC)
        self._load = [host.load()]

    async def run(self) -> None:
        """Raises SegueError where a machine does not start or an upgrade fails.

        What was measured until then, or until it is cancelled, is in `outcomes`.
        """
        async with AsyncExitStack() as stack:
            for index, subject in enumerate(self._subjects):
                self._watcher.starting(subject.case)
                stack.push_async_callback(subject.close)
                await subject.start()
                self.outcomes[index].ready = subject.ready
                self._note_supervisor(index)
                await subject.rest()
            total = self._runs * len(self._subjects)
            for done in range(total):
                index = done % len(self._subjects)
                outcome = self.outcomes[index]
                if outcome.refused is None:
                    await self._once(index)
                self._watcher.measured(done + 1, total, outcome)
            for index in range(len(self._subjects)):
                self._note_supervisor(index)
        self._load.append(host.load())

    def _note_supervisor(self, index: int) -> None:
        pid = self._subjects[index].supervisor
        if pid is not None:
            self.supervisors[index].note(pid)

    async def _once(self, index: int) -> None:
        subject, outcome = self._subjects[index], self.outcomes[index]
        await subject.wake()
        try:
            outcome.runs.append(await self._measure(index))
        except Refused as error:
            # A way that this QEMU does not have is a result as well.
            outcome.refused = error.what
        except TimedOut as error:
            outcome.unfinished.append(error.what)
        if subject.binary != subject.case.old:
            await subject.go_back(subject.case.old)
        await subject.rest()

    async def _measure(self, index: int) -> Figures:
        subject, outcome = self._subjects[index], self.outcomes[index]
        others = host.Others({*memory.family(subject.pid), os.getpid()})
        quiet = time.monotonic()
        await self._beats(subject, _BEFORE)
        elsewhere = others.cpus()
        peak = memory.Peak(subject.pid)
        begin = time.monotonic()
        try:
            upgraded = await subject.upgrade(subject.case.new)
        finally:
            end = time.monotonic()
            extra = peak.stop()
        await self._beats(subject, _AFTER)
        outcome.old, outcome.new = upgraded.old, upgraded.new
        outcome.not_kept = upgraded.not_kept
        beats = subject.heartbeat.beats if subject.heartbeat else None
        if beats:
            seen = beats.between(begin - _TRACE[0], end + _TRACE[1])
            outcome.trace = [beat - begin for beat in seen]
        if subject.pings is not None:
            await asyncio.to_thread(subject.pings.end)
        lost, garbled, unanswered = self._newly_lost(index)
        of_beats: dict[str, Any] = {}
        if beats:
            of_beats = {
                "gap": beats.gap(begin, end),
                "quiet_gap": beats.gap(quiet + 0.1, begin),
                "guest_gap": beats.own_gap(begin, end),
                "brownout": beats.brownout(quiet + 0.1, begin, end),
                "beats_lost": lost,
                "bytes_lost": garbled,
            }
        return Figures(
            **of_beats,
            blackout=upgraded.blackout,
            own=upgraded.own,
            total=end - begin,
            exposed=upgraded.exposed,
            bytes_moved=upgraded.bytes_moved,
            packets_lost=unanswered if subject.pings else None,
            extra_memory=extra,
            others=elsewhere,
        )

    async def _beats(self, subject: Subject, count: int) -> None:
        if subject.heartbeat is None:
            await asyncio.sleep(_WITHOUT_BEATS)
        else:
            await asyncio.to_thread(subject.heartbeat.wait, count, _BEAT_LIMIT)

    def _newly_lost(self, index: int) -> tuple[int, int, int]:
        """Beats, bytes and pings lost since the last time that this was asked."""
        subject = self._subjects[index]
        beats = subject.heartbeat.beats if subject.heartbeat else None
        now = (
            beats.lost if beats else 0,
            beats.garbled if beats else 0,
            subject.pings.lost if subject.pings else 0,
        )
        before = self._before.get(index, (0, 0, 0))
        self._before[index] = now
        return now[0] - before[0], now[1] - before[1], now[2] - before[2]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "segue": segue.__version__,
            "began": self._began.isoformat(timespec="seconds"),
            "host": host.describe(),
            "load_averages": self._load,
            "runs": self._runs,
            "cases": [outcome.to_json() for outcome in self.outcomes],
            "supervisors": [one.to_json() for one in self.supervisors if one.resident],
        }
