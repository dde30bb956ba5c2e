"""What an upgrade leaves behind: one JSON object, the same for every outcome."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from segue.errors import Blocker, GuestLost, Refused, SegueError, TimedOut

DONE, CURRENT, REHEARSED = "done", "current", "rehearsed"
FAILED, REFUSED, TIMED_OUT, LOST = "failed", "refused", "timed-out", "lost"


@dataclass
class Side:
    """One of the two QEMUs: `pid` is None for a target that was never started."""

    path: str
    version: str
    build_id: str | None = None
    pid: int | None = None


@dataclass
class Receipt:
    """All times in seconds; `started` since the epoch, `phases` in the order they were entered.

    `clock_lag_seconds` adds up all that the guest was stopped for, also where that was undone.
    """

    machine: str
    started: float
    result: str = FAILED
    mode: str = "handover"
    source: Side | None = None
    target: Side | None = None
    blackout_seconds: float | None = None
    own_seconds: float | None = None
    clock_lag_seconds: float = 0.0
    bytes_moved: int | None = None
    phases: dict[str, float] = field(default_factory=dict)
    kept: list[dict[str, Any]] = field(default_factory=list)
    not_kept: list[dict[str, str]] = field(default_factory=list)
    blockers: list[Blocker] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    error: dict[str, str | None] | None = None
    guest: str = "running on the incumbent"
    rehearsal: dict[str, Any] | None = None

    def failed(self, error: SegueError) -> None:
        self.result = result_of(error)
        self.error = {"what": error.what, "hint": error.hint}
        if isinstance(error, Refused):
            self.blockers.extend(error.blockers)
        if error.guest is not None:
            self.guest = error.guest

    def to_json(self) -> dict[str, Any]:
        return {
            "result": self.result,
            "mode": self.mode,
            "machine": self.machine,
            "from": asdict(self.source) if self.source else None,
            "to": asdict(self.target) if self.target else None,
            "blackout_seconds": _rounded(self.blackout_seconds),
            "own_seconds": _rounded(self.own_seconds),
            "clock_lag_seconds": _rounded(self.clock_lag_seconds),
            "bytes_moved": self.bytes_moved,
            "phases": {name: _rounded(seconds) for name, seconds in self.phases.items()},
            "kept": self.kept,
            "not_kept": self.not_kept,
            "blockers": [blocker.to_json() for blocker in self.blockers],
            "warnings": self.warnings,
            "error": self.error,
            "guest": self.guest,
            "rehearsal": self.rehearsal,
            "started": self.started,
        }


def result_of(error: SegueError) -> str:
    if isinstance(error, Refused):
        return REFUSED
    if isinstance(error, TimedOut):
        return TIMED_OUT
    return LOST if isinstance(error, GuestLost) else FAILED


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
