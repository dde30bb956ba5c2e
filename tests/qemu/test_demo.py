"""segue demo on real QEMU: it convinces, and leaves nothing behind however it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.qemu.harness import processes_with, qemu, wait_until


class Demo:
    def __init__(self, place: Path, *words: str) -> None:
        self.place = place
        self.process = subprocess.Popen(
            [sys.executable, "-m", "segue", "demo", *words],
            env={**os.environ, "TMPDIR": str(place)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def says(self, pattern: str) -> re.Match[str]:
        """Read its output up to a line that matches."""
        assert self.process.stdout is not None
        read = []
        for line in self.process.stdout:
            if match := re.search(pattern, line):
                return match
            read.append(line)
        raise AssertionError(f"no {pattern!r} in {read}, {self.process.communicate()[1]}")

    def ended(self) -> tuple[int, str, str]:
        """Exit status and what was not read yet; by then nothing is left."""
        out, err = self.process.communicate(timeout=60)
        left = [pid for pid in self.processes() if pid != self.process.pid]
        assert not left
        assert not list(self.place.iterdir())
        return self.process.returncode, out, err

    def processes(self) -> list[int]:
        return processes_with(f"TMPDIR={self.place}")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def demos(place: Path) -> Iterator[list[Demo]]:
    started: list[Demo] = []
    yield started
    for demo in started:
        demo.close()


def start(demos: list[Demo], place: Path, *words: str) -> Demo:
    demos.append(Demo(place, *words))
    return demos[-1]


def test_three_upgrades_before_ones_eyes(demos: list[Demo], place: Path) -> None:
    targets = [word for release in ("10.0", "11.1", "7.2") for word in ("--to", qemu(release))]
    demo = start(demos, place, "--qemu", qemu("7.2"), *targets)
    status, out, err = demo.ended()
    assert status == 0, err
    moves = re.findall(r"QEMU (\d+\.\d+)\S* → (\d+\.\d+)\S*, pid (\d+) → (\d+), blackout", out)
    assert [move[:2] for move in moves] == [("7.2", "10.0"), ("10.0", "11.1"), ("11.1", "7.2")]
    assert len({pid for move in moves for pid in move[2:]}) == 4
    nonce = re.findall(r"the guest drew ([0-9a-f]{8}) at boot", out)
    assert re.findall(r"every tick there, in order, and still (\w+) in its RAM", out) == nonce * 3
    assert "4 QEMU processes, one guest" in out


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
@pytest.mark.parametrize("moment", [r"\$ segue run", "the guest drew", r"\$ segue upgrade", "→"])
def test_interrupted_at_any_moment(
    demos: list[Demo], place: Path, moment: str, number: signal.Signals, status: int
) -> None:
    demo = start(demos, place, "--qemu", qemu("7.2"))
    demo.says(moment)
    demo.process.send_signal(number)
    ended, _, err = demo.ended()
    assert ended == status
    assert "Traceback" not in err


def test_a_guest_that_dies_is_noticed(demos: list[Demo], place: Path) -> None:
    demo = start(demos, place, "--qemu", qemu("7.2"))
    pid = int(demo.says(r"QEMU 7.2\S*, pid (\d+): tick")[1])
    os.kill(pid, signal.SIGKILL)
    status, _, err = demo.ended()
    assert status != 0
    assert re.search(r"^segue: .+", err, re.MULTILINE)
    assert "Traceback" not in err


def test_a_program_that_is_no_qemu(demos: list[Demo], place: Path) -> None:
    demo = start(demos, place, "--qemu", "/bin/true")
    status, _, err = demo.ended()
    assert status == 1
    what, hint = err.splitlines()
    assert what.startswith("segue: the demo's guest could not be started: ")
    assert hint == "hint: try another QEMU: segue demo --qemu BIN"


def test_an_upgrade_that_fails_ends_the_demo(demos: list[Demo], place: Path) -> None:
    demo = start(demos, place, "--qemu", qemu("7.2"), "--to", "/bin/true")
    status, _, err = demo.ended()
    assert status == 1
    assert "segue: upgrade 1 failed: " in err


def test_it_is_a_machine_like_others_meanwhile(demos: list[Demo], place: Path) -> None:
    demo = start(demos, place, "--qemu", qemu("7.2"))
    demo.says("the guest drew")
    (folder,) = place.iterdir()
    wait_until("an upgrade", lambda: (folder / "demo" / "receipts.jsonl").exists())
    listed = subprocess.run(
        [sys.executable, "-m", "segue", "ls"],
        env={**os.environ, "SEGUE_RUN_DIR": str(folder)},
        capture_output=True,
        text=True,
    )
    assert listed.stdout.splitlines()[1].split()[:3:2] == ["demo", "7.2.22"]
    assert demo.ended()[0] == 0
