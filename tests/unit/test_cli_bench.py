"""segue bench's command line and table; no guest is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from segue.bench import Figures
from segue.bench.cases import Case, Load
from segue.bench.qmp import Figures as QmpFigures
from segue.bench.runs import Outcome
from segue.cli import bench_qmp, bench_table, main

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--modes", "handover,teleport"], "'teleport' is none of plain, handover"),
        (["--load", "busy"], "'busy' is none of idle"),
        (["--ram", "512"], "sizes are like 512M or 8G"),
        (["--runs", "0"], "is not a number of runs above zero"),
        (["--heartbeat", "/x"], "--heartbeat is for a machine of yours"),
        (["--plot", "figures.doc"], "a picture ends in one of .svg, .png"),
        (["--qemu", "no-such-qemu"], "there is no program no-such-qemu in PATH"),
    ],
)
def test_bad_input_gets_one_line_and_a_hint(words: list[str], said: str, capfd: Capture) -> None:
    assert main(["bench", *words]) in (1, 2)
    error = capfd.readouterr().err
    assert said in error
    assert "Traceback" not in error


def outcome(way: str, **more: Any) -> dict[str, Any]:
    case = Case(way, Path("/old"), Path("/new"), 512 << 20, Load.IDLE)
    made = Outcome(case, "10.0.2 (Debian)", "11.1.3 (Debian)")
    for name, value in more.items():
        setattr(made, name, value)
    return made.to_json()


def test_the_table_shows_medians_and_all_that_was_lost(capfd: Capture) -> None:
    runs = [
        Figures(total=0.5, gap=gap, blackout=0.004, bytes_moved=331776, beats_lost=1, bytes_lost=0)
        for gap in (0.020, 0.030, 0.022)
    ]
    cases = [
        outcome("handover", runs=runs, ready=0.3),
        outcome("cpr-exec", refused="QEMU 10.0.2 does not have it"),
        outcome("migrate", unfinished=["phase open took longer than 60 s"] * 2),
    ]
    host = {"processor": "CPU", "cpus": 2, "memory": 1 << 30, "kernel": "6", "system": "Debian"}
    supervisors = [{"way": "handover", "ram": 512 << 20, "resident": [24 << 20, 25 << 20]}]
    bench_table.show(
        {
            "cases": cases,
            "supervisors": supervisors,
            "runs": 3,
            "host": host,
            "load_averages": [[0.5, 1, 1], [1, 1, 1]],
        }
    )
    head, _, row, *rest = capfd.readouterr().out.splitlines()
    assert head == "QEMU 10.0.2 → 11.1.3, 512 MiB, idle"
    assert row.split() == (
        "handover 3 22.0 ms 21.0–26.0 4.0 ms - - 500.0 ms - 324 KiB - 3 beats".split()
    )
    told = "\n".join(rest)
    assert "cpr-exec: refused: QEMU 10.0.2 does not have it" in told
    assert "migrate: 2 runs did not converge and went back: phase open took" in told
    assert "from start to a guest that runs: handover 300.0 ms" in told
    assert "24 MiB resident at rest, 25 MiB after 3 upgrades" in told


def test_the_table_of_qmp_shows_what_was_added(capfd: Capture) -> None:
    found = QmpFigures(
        version="11.1.3", alone=[0.0001], one=[0.0003], many=[0.0004], waited=[0.02], commands=9
    )
    bench_qmp.show(found.to_json())
    text = capfd.readouterr().out
    assert "beside 49 others  0.400 ms  0.300 ms" in text
    assert "9 commands through 1 upgrade: one waited for longest 20.000 ms" in text
