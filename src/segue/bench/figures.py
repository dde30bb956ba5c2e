"""What one run gave, and what many gave."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Figures:
    """One upgrade. Times in seconds, memory in bytes; None where nobody could tell.

    gap           the longest that somebody outside waited for a beat, while the upgrade lasted
    quiet_gap     the same in the second before it, while nothing was done
    guest_gap     the longest from beat to beat by the guest's own clock, while it lasted
    blackout      QEMU's STOP to RESUME, by the time stamps of its events
    own           of that Segue's: from QEMU's last event to the sending of `cont`
    total         from asking for the upgrade to its receipt
    beats_lost    numbers that were missing or came twice, from the run before to this one
    extra_memory  private memory of all its processes at the peak, less that at rest
    others        CPUs that processes other than ours kept busy in the second before
    """

    gap: float | None
    quiet_gap: float | None
    guest_gap: float | None
    blackout: float | None
    own: float | None
    total: float
    beats_lost: int | None
    extra_memory: int | None
    others: float

    def to_json(self) -> dict[str, float | int | None]:
        return {name: _rounded(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Summary:
    """One figure of many runs: median, quartiles, extremes."""

    median: float
    low: float
    high: float
    minimum: float
    maximum: float

    def to_json(self) -> dict[str, float | int | None]:
        return {name: _rounded(value) for name, value in asdict(self).items()}


def summarise(values: Sequence[float]) -> Summary | None:
    """None for no values at all."""
    if not values:
        return None
    low, median, high = values[0], values[0], values[0]
    if len(values) > 1:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(median, low, high, min(values), max(values))


def summaries(runs: Sequence[Figures]) -> dict[str, Summary | None]:
    """By the name of each figure."""
    return {
        field.name: summarise(
            [value for run in runs if (value := getattr(run, field.name)) is not None]
        )
        for field in fields(Figures)
    }


def ratio(ours: Summary | None, theirs: Summary | None) -> float | None:
    """Of two medians."""
    if ours is None or theirs is None or not theirs.median:
        return None
    return round(ours.median / theirs.median, 3)


def to_json(all_of_them: Mapping[str, Summary | None]) -> dict[str, Any]:
    return {name: summary and summary.to_json() for name, summary in all_of_them.items()}


def _rounded(value: float | int | None) -> float | int | None:
    return round(value, 6) if isinstance(value, float) else value
