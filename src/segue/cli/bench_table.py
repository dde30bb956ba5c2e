"""How `segue bench` shows its figures: a table for each load and RAM, and what is to be noted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from segue.cli import output

Json = Mapping[str, Any]

_HEAD = (
    "mode",
    "n",
    "gap",
    "(quartiles)",
    "stopped",
    "own",
    "open→release",
    "in all",
    "brownout",
    "moved",
    "memory",
    "lost",
)


def show(result: Json) -> None:
    for (old, new, ram, load), cases in _groups(result["cases"]).items():
        print(f"QEMU {old} → {new}, {output.size(ram)}, {load}")
        shown = [case for case in cases if case["runs"]]
        output.print_table(_HEAD, [_row(case) for case in shown], right=" ".join(_HEAD[1:]))
        for line in _notes(cases):
            print(f"  {line}")
        print()
    ready = [f"{c['way']} {output.seconds(c['ready'])}" for c in result["cases"] if c["ready"]]
    if ready:
        print(f"from start to a guest that runs: {', '.join(ready)}")
    for one in result["supervisors"]:
        before, *_, after = one["resident"]
        print(
            f"supervisor, {one['way']}, {output.size(one['ram'])}: {output.size(before)} resident "
            f"at rest, {output.size(after)} after {output.counted(result['runs'], 'upgrade')}"
        )
    host = result["host"]
    busy = " ".join(f"{load[0]:g}" for load in result["load_averages"])
    print(
        f"{host['processor']}, {host['cpus']} CPUs, {output.size(host['memory'])}, "
        f"Linux {host['kernel']}, {host['system']}; load average {busy}"
    )


def _groups(cases: list[Json]) -> dict[tuple[str, str, int, str], list[Json]]:
    found: dict[tuple[str, str, int, str], list[Json]] = {}
    for case in cases:
        named = [one for one in cases if (one["old"], one["new"]) == (case["old"], case["new"])]
        old = next((one["old_version"] for one in named if one["old_version"]), case["old"])
        new = next((one["new_version"] for one in named if one["new_version"]), case["new"])
        key = (output.version(old), output.version(new), case["ram"], case["load"])
        found.setdefault(key, []).append(case)
    return found


def _row(case: Json) -> list[str]:
    summary = case["summary"]

    def median(name: str, shown: Callable[[Any], str] = output.seconds) -> str:
        return shown(summary[name]["median"]) if summary[name] else "-"

    gap = summary["gap"]
    spread = f"{gap['low'] * 1000:.1f}–{gap['high'] * 1000:.1f}" if gap else "-"
    return [
        case["way"],
        str(len(case["runs"])),
        median("gap"),
        spread,
        median("blackout"),
        median("own"),
        median("exposed"),
        median("total"),
        median("brownout"),
        median("bytes_moved", _bytes),
        median("extra_memory", _bytes),
        _lost(summary),
    ]


def _bytes(count: float) -> str:
    return output.size(int(count))


def _lost(summary: Json) -> str:
    """Beats, bytes and pings, of all runs together."""
    units = {"beats_lost": "beats", "bytes_lost": "bytes", "packets_lost": "packets"}
    told = {unit: int(summary[name]["total"]) for name, unit in units.items() if summary[name]}
    if not told:
        return "?"
    return ", ".join(f"{n} {unit}" for unit, n in told.items() if n) or "nothing"


def _notes(cases: list[Json]) -> Iterator[str]:
    for case in cases:
        if case["refused"]:
            yield f"{case['way']}: refused: {case['refused']}"
        if case["unfinished"]:
            number = len(case["unfinished"])
            yield (
                f"{case['way']}: {output.counted(number, 'run')} did not converge and "
                f"went back: {case['unfinished'][0]}"
            )
        for lost in case["not_kept"]:
            yield f"{case['way']}: not kept: {lost}"
