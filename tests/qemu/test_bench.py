"""segue bench on real QEMU: a run of each mode, and what it must be able to tell of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.qemu.harness import Segue, processes_with, qemu


@pytest.mark.timeout(300)
def test_every_mode_is_measured_and_nothing_is_left(segue: Segue, place: Path) -> None:
    segue.environment["TMPDIR"] = str(place)
    newest = qemu("11.1")
    done = segue("bench", "--qemu", f"{newest}:{newest}", "--runs", "1", "--json", limit=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    cases = {case["way"]: case for case in result["cases"]}
    assert set(cases) == {"plain", "handover", "cpr-transfer", "cpr-exec", "migrate"}
    for case in cases.values():
        assert case["refused"] is None and case["unfinished"] == []
        (run,) = case["runs"]
        assert 0 < run["blackout"] < run["gap"] <= run["total"]
        assert run["bytes_moved"] > 0
        assert run["bytes_lost"] == 0
    moved = {way: case["runs"][0]["bytes_moved"] for way, case in cases.items()}
    assert moved["migrate"] > 10 * moved["handover"]
    memory = {way: case["runs"][0]["extra_memory"] for way, case in cases.items()}
    assert memory["migrate"] > memory["handover"]
    assert "5/5 migrate 512 MiB idle: gap" in done.stderr
    assert list(place.iterdir()) == []
    assert processes_with(f"TMPDIR={place}") == []


def test_what_a_qemu_does_not_have_is_told_in_the_table(segue: Segue, place: Path) -> None:
    segue.environment["TMPDIR"] = str(place)
    done = segue(
        *("bench", "--qemu", f"{qemu('7.2')}:{qemu('10.0')}", "--runs", "1"),
        *("--modes", "handover,cpr-exec"),
        limit=110,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("QEMU 7.2.")
    assert "cpr-exec: refused: this machine cannot be moved to" in done.stdout
    assert "resident at rest" in done.stdout


def test_qmp_round_trips_and_waits_are_measured(segue: Segue, place: Path) -> None:
    segue.environment["TMPDIR"] = str(place)
    pair = f"{qemu('7.2')}:{qemu('10.0')}"
    done = segue(
        *("bench", "qmp", "--qemu", pair, "--runs", "20", "--upgrades", "2", "--json"), limit=110
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["qemu_version"].startswith("7.2.")
    assert (found["round_trips"], found["upgrades"], found["listeners"]) == (20, 2, 49)
    assert found["alone_seconds"] < found["seconds"]["one"]
    assert found["commands_through_upgrades"] > 2
    assert found["longest_wait_seconds"] > found["seconds"]["one"]
    assert list(place.iterdir()) == []
    assert processes_with(f"TMPDIR={place}") == []


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace takes root")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_bench_that_is_broken_off_ends_its_machines(
    segue: Segue, place: Path, number: signal.Signals
) -> None:
    bench = subprocess.Popen(
        segue.command("bench", "net", "--qemu", f"{qemu('11.1')}:{qemu('11.1')}", "--runs", "100"),
        env={**segue.environment, "TMPDIR": str(place)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert bench.stderr is not None
    with bench, bench.stderr:
        # All three guests run.
        said: list[str] = []
        while not said or not said[-1].startswith("1/100 segue"):
            said.append(bench.stderr.readline())
            assert said[-1], said
        bench.send_signal(number)
        bench.stderr.read()
    assert bench.returncode == 130
    assert list(place.iterdir()) == []
    assert processes_with(f"TMPDIR={place}") == []
