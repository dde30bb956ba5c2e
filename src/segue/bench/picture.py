"""A drawing of what was measured: heartbeats through time, and the gap against RAM.

Drawn by matplotlib, which is large, and imported here alone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from segue.errors import SegueError, UsageError

_KINDS = (".svg", ".png", ".pdf")


def need_picture(path: str) -> None:
    """Raises UsageError or SegueError if `draw` could not: to be known before the runs."""
    if Path(path).suffix not in _KINDS:
        raise UsageError(f"{path}: a picture ends in one of {', '.join(_KINDS)}")
    _pyplot()


def draw(result: Mapping[str, Any], path: str) -> None:
    """The JSON document of `Bench.to_json`, as a picture."""
    pyplot = _pyplot()
    cases = [case for case in result["cases"] if case["runs"]]
    figure, (beats, growth) = pyplot.subplots(
        2, 1, figsize=(9, 8), height_ratios=(3, 2), layout="constrained"
    )
    _beats(beats, cases)
    _growth(growth, cases)
    figure.savefig(path)
    pyplot.close(figure)


def draw_arrivals(result: Mapping[str, Any], path: str) -> None:
    """The JSON document of `segue bench net`: when pings were answered, around one upgrade."""
    pyplot = _pyplot()
    taps = [tap for tap in result["taps"] if tap["arrivals"]]
    figure, axes = pyplot.subplots(figsize=(9, 1 + len(taps)), layout="constrained")
    rows = [[t * 1000 for t in tap["arrivals"]] for tap in taps]
    axes.eventplot(rows, lineoffsets=range(len(rows)), linelengths=0.8, linewidths=0.5)
    axes.set_yticks(range(len(rows)), [tap["way"] for tap in taps])
    axes.invert_yaxis()
    axes.set_xlim(-500, 200)
    axes.set_xlabel("ms, from the end of the longest silence")
    axes.set_title("Answers to pings around the last upgrade of each")
    figure.savefig(path)
    pyplot.close(figure)


def _beats(axes: Any, cases: Sequence[Mapping[str, Any]]) -> None:
    """A row a case; each beat is a tick, so that a gap is what is white."""
    traced = [case for case in cases if case["trace"]]
    centres = [_end_of_gap(case["trace"]) for case in traced]
    rows = [
        [(beat - centre) * 1000 for beat in case["trace"]]
        for case, centre in zip(traced, centres, strict=True)
    ]
    axes.eventplot(rows, lineoffsets=range(len(rows)), linelengths=0.8, linewidths=0.5)
    axes.set_yticks(range(len(rows)), [_label(case) for case in traced])
    axes.invert_yaxis()
    longest = max((max(b - a for a, b in pairwise(case["trace"])) for case in traced), default=0.1)
    axes.set_xlim(-1500 * longest, 750 * longest)
    axes.set_xlabel("ms, from the end of the gap")
    axes.set_title("Heartbeats around the last upgrade of each")


def _growth(axes: Any, cases: Sequence[Mapping[str, Any]]) -> None:
    lines: dict[tuple[str, str], list[tuple[float, float, float, float]]] = {}
    for case in cases:
        if gap := case["summary"]["gap"]:
            point = (case["ram"] / 2**30, gap["median"], gap["low"], gap["high"])
            lines.setdefault((case["way"], case["load"]), []).append(point)
    for (way, load), points in lines.items():
        ram, median, low, high = zip(*sorted(points), strict=True)
        spread = [
            [(m - w) * 1000 for m, w in zip(median, low, strict=True)],
            [(w - m) * 1000 for m, w in zip(median, high, strict=True)],
        ]
        axes.errorbar(
            ram, [m * 1000 for m in median], spread, label=f"{way}, {load}", marker="o", capsize=3
        )
    axes.set_xscale("log", base=2)
    sizes = sorted({case["ram"] / 2**30 for case in cases})
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.set_xlabel("guest RAM, GiB")
    axes.set_ylabel("gap, ms (median, quartiles)")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")


def _end_of_gap(trace: Sequence[float]) -> float:
    return max(pairwise(trace), key=lambda pair: pair[1] - pair[0])[1]


def _label(case: Mapping[str, Any]) -> str:
    return f"{case['way']}\n{case['ram'] >> 20} MiB, {case['load']}"


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise SegueError(
            "pictures are drawn by matplotlib, which is not installed",
            hint=f"{sys.prefix}/bin/pip install matplotlib",
        ) from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot
