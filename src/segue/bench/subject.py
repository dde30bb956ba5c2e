"""One machine under measurement, whoever runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

from segue.bench.cases import Case
from segue.bench.heartbeat import Heartbeat
from segue.bench.pings import Pings


@dataclass(frozen=True)
class Upgraded:
    """What the one who did it says of it: the versions, seconds, bytes, and what was not kept."""

    old: str
    new: str
    blackout: float | None
    own: float | None
    exposed: float | None = None
    bytes_moved: int | None = None
    not_kept: list[str] = field(default_factory=list)


class Subject(ABC):
    """A machine, started by `start` and ended by `close`; in between it is run or rests.

    A subject that rests costs the host nothing, so that several can be measured in turn.
    `heartbeat` is None for a guest that does not beat, `pings` for one that nobody pings.
    """

    case: Case
    heartbeat: Heartbeat | None = None
    pings: Pings | None = None
    binary: Path
    """The QEMU that it runs."""
    ready: float | None = None
    """Seconds from starting it until its guest ran."""

    @property
    @abstractmethod
    def pid(self) -> int:
        """The process whose descendants are the machine, itself included."""

    @abstractmethod
    async def start(self) -> None: ...

    @abstractmethod
    async def rest(self) -> None:
        """Stop the guest."""

    @abstractmethod
    async def wake(self) -> None:
        """Let the guest run, and bring its load about."""

    @abstractmethod
    async def upgrade(self, to: Path) -> Upgraded:
        """Raises SegueError if it is not done: TimedOut, Refused, or worse."""

    @abstractmethod
    async def go_back(self, to: Path) -> None:
        """Bring it to another QEMU in whatever way works best; not measured."""

    @abstractmethod
    async def close(self) -> None:
        """End the machine, whatever state it is in."""

    @property
    def supervisor(self) -> int | None:
        """Its supervisor's process id, where it has one."""
        return None
