"""The runs: every case in turn, again and again, so that what disturbs one disturbs all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import segue
from segue.bench import figures, host, memory
from segue.bench.cases import PLAIN, Case
from segue.bench.figures import Figures, Summary
from segue.bench.plain import Plain
from segue.bench.subject import Subject
from segue.bench.supervised import Embedded
from segue.errors import Refused

FORMAT = 1
"""Of the JSON document that `Bench.to_json` gives."""

# Beats of quiet before an upgrade (a second), and after it, so that its window has an end.
_BEFORE = 1000
_AFTER = 200
_BEAT_LIMIT = 30.0


@dataclass
class Outcome:
    """All runs of one case in one direction; `refused` says why there are none."""

    case: Case
    old: str = ""
    new: str = ""
    runs: list[Figures] = field(default_factory=list)
    refused: str | None = None

    @property
    def summaries(self) -> dict[str, Summary | None]:
        return figures.summaries(self.runs)

    def to_json(self) -> dict[str, Any]:
        return {
            **self.case.to_json(),
            "old_version": self.old,
            "new_version": self.new,
            "refused": self.refused,
            "summary": figures.to_json(self.summaries),
            "runs": [run.to_json() for run in self.runs],
        }


@dataclass
class Supervisor:
    """Bytes of one supervisor at rest: when its guest has just booted, and after all upgrades."""

    case: Case
    upgrades: int = 0
    resident: list[int] = field(default_factory=list)
    proportional: list[int] = field(default_factory=list)

    def note(self, pid: int) -> None:
        self.resident.append(memory.resident(pid))
        self.proportional.append(memory.proportional(pid))

    def to_json(self) -> dict[str, Any]:
        return {
            "way": self.case.way,
            "ram": self.case.ram,
            "upgrades": self.upgrades,
            "resident": self.resident,
            "proportional": self.proportional,
        }


Progress = Callable[[int, int, Outcome, Figures], None]


class Bench:
    """Measures `subjects`, `runs` upgrades each in each direction.

    After each upgrade from old to new the machine is taken back from new to old, which is
    measured too, as a case of its own where the two are different.
    """

    def __init__(self, subjects: Sequence[Subject], runs: int, progress: Progress) -> None:
        self._subjects = subjects
        self._runs = runs
        self._progress = progress
        self.outcomes: list[Outcome] = []
        self.supervisors: list[Supervisor] = []
        self._by_direction: dict[tuple[int, Path, Path], Outcome] = {}
        self._lost: dict[int, int] = {}
        self._began = datetime.now(UTC)
        self._load: list[list[float]] = [host.load()]

    async def run(self) -> None:
        """Raises SegueError where a machine does not start or an upgrade fails."""
        async with AsyncExitStack() as stack:
            for subject in self._subjects:
                stack.push_async_callback(subject.close)
                await subject.start()
                await self._at_rest(subject)
                await subject.rest()
            pairs = [_legs(subject.case) for subject in self._subjects]
            total = self._runs * sum(map(len, pairs))
            done = 0
            for _ in range(self._runs):
                for subject, legs in zip(self._subjects, pairs, strict=True):
                    for old, new in legs:
                        outcome = self._outcome(subject, old, new)
                        done += 1
                        if outcome.refused is None:
                            await self._once(subject, outcome, new, done, total)
            for subject in self._subjects:
                await self._at_rest(subject)
        self._load.append(host.load())

    def _outcome(self, subject: Subject, old: Path, new: Path) -> Outcome:
        key = (id(subject), old, new)
        if key not in self._by_direction:
            case = subject.case
            direction = Case(case.way, old, new, case.ram, case.load)
            self._by_direction[key] = Outcome(direction)
            self.outcomes.append(self._by_direction[key])
        return self._by_direction[key]

    async def _once(
        self, subject: Subject, outcome: Outcome, to: Path, done: int, total: int
    ) -> None:
        await subject.wake()
        try:
            measured = await self._measure(subject, outcome, to)
        except Refused as error:
            # A way that this QEMU does not have is a result as well.
            outcome.refused = error.what
            return
        finally:
            await subject.rest()
        outcome.runs.append(measured)
        self._progress(done, total, outcome, measured)

    async def _measure(self, subject: Subject, outcome: Outcome, to: Path) -> Figures:
        others = host.Others(memory.family(subject.pid) + memory.family(os.getpid()))
        quiet = time.monotonic()
        await self._beats(subject, _BEFORE)
        elsewhere = others.cpus()
        peak = memory.Peak(subject.pid)
        begin = time.monotonic()
        try:
            upgraded = await subject.upgrade(to)
        finally:
            end = time.monotonic()
            extra = peak.stop()
        await self._beats(subject, _AFTER)
        outcome.old, outcome.new = upgraded.old, upgraded.new
        beats = subject.heartbeat.beats if subject.heartbeat else None
        return Figures(
            gap=beats and beats.gap(begin, end),
            quiet_gap=beats and beats.gap(quiet + 0.1, begin),
            guest_gap=beats and beats.own_gap(begin, end),
            blackout=upgraded.blackout,
            own=upgraded.own,
            total=end - begin,
            beats_lost=self._newly_lost(subject),
            extra_memory=extra,
            others=elsewhere,
        )
