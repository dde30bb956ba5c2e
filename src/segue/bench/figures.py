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
    brownout      from the end of the gap until beats come as evenly as in the second before
    blackout      QEMU's STOP to RESUME, by the time stamps of its events
    own           of that Segue's: from QEMU's last event to the sending of `cont`
    total         from asking for the upgrade to its receipt
    exposed       of that from `open` to `release`: something is being done to the guest
    bytes_moved   through the migration stream
    beats_lost    numbers that were missing or came twice, from the run before to this one
    bytes_lost    bytes of its console that are no beat of a guest's
    packets_lost  pings that were never answered, from the run before to this one (Load.NET)
    extra_memory  memory of all its processes at the peak, less that at rest
    others        CPUs that processes other than ours kept busy in the second before
    """

    total: float
    others: float = 0.0
    gap: float | None = None
    quiet_gap: float | None = None
    guest_gap: float | None = None
    brownout: float | None = None
    blackout: float | None = None
    own: float | None = None
    exposed: float | None = None
    bytes_moved: int | None = None
    beats_lost: int | None = None
    bytes_lost: int | None = None
    packets_lost: int | None = None
    extra_memory: int | None = None

    def to_json(self) -> dict[str, float | int | None]:
        return {name: _rounded(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Summary:
    """One figure of many runs: median, quartiles, extremes, and the sum."""

    median: float
    low: float
    high: float
    minimum: float
    maximum: float
    total: float

    def to_json(self) -> dict[str, float | int | None]:
        return {name: _rounded(value) for name, value in asdict(self).items()}


def summarise(values: Sequence[float]) -> Summary | None:
    """None for no values at all.

    >>> summarise([5, 1, 3]).median
    3.0
    """
    if not values:
        return None
    low, median, high = values[0], float(values[0]), values[0]
    if len(values) > 1:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(median, low, high, min(values), max(values), sum(values))


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
