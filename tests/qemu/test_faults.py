"""Whatever goes wrong before the commit point ends with the guest running on the incumbent.

One guest goes through all of it. After each fault: one QEMU whose CPU time grows, its ticks
consecutive, the same nonce, no process or descriptor more than before, and the next upgrade works.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tests.qemu.conftest import tiny, unharmed, watch
from tests.qemu.hang import main_thread_hangs
from tests.qemu.harness import (
    Client,
    Machine,
    Qmp,
    Segue,
    alive,
    cpu_ticks,
    no_descriptor_leak,
    qemu,
    wait_until,
)

PHASES = ("prepare", "open", "hold", "move", "commit")
STARTED = ("open", "hold", "move", "commit")
"""Phases at whose beginning there is a successor."""


class Survivor:
    """The guest that every fault of this module happens to."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.segue = Segue(place / "run", {"SEGUE_TESTING": "1"})
        # pvpanic, so that it can panic; a pause instead of an end, so that it survives that.
        argv = tiny(place, "7.2", "-device", "pvpanic", "-action", "panic=pause")
        self.machine: Machine = self.segue.start("survivor", argv)
        self.console: Client = watch(self.machine, place)
        self.qmp: Qmp = self.machine.qmp()
        # One client's commands are answered in their order: another one must say `continue`.
        self.other: Qmp = self.machine.qmp()

    def begin(self, phase: str | None = None, to: str = "10.0", **more: Any) -> Future[Any]:
        """Start an upgrade that stops at the beginning of `phase`."""
        self.qmp.events.clear()
        path = to if to.startswith("/") else qemu(to)
        arguments = {"to": path, "force": True, "timeout": 20, **more}
        if phase is not None:
            arguments["x-break"] = [phase]
        going = self.qmp.begin("segue-upgrade", arguments)
        if phase is not None:
            self.qmp.event(phase=phase, state="break")
        return going

    def go_on(self) -> None:
        self.other.command("x-segue-continue")

    def successor(self) -> int:
        """The pid of the QEMU that is not the incumbent."""
        return next(p for p in self.qemus() if p != self.machine.qemu_pid)

    def qemus(self) -> list[int]:
        assert self.machine.process is not None
        return [p for p in self.segue.processes() if p != self.machine.process.pid]

    def check(self, receipt: dict[str, Any], result: str, incumbent: int) -> None:
        assert receipt["result"] == result, receipt
        assert receipt["error"]["what"]
        assert receipt["guest"] == "running on the incumbent"
        assert self.qemus() == [incumbent]
        self.well()

    def well(self) -> None:
        unharmed(self.console)
        pid = self.machine.qemu_pid
        before = cpu_ticks(pid)
        wait_until("the guest using CPU time", lambda: cpu_ticks(pid) > before)

    def upgrade_works(self) -> None:
        receipt = self.begin(to="10.0").result(60)
        assert receipt["result"] == "done", receipt
        self.well()


@pytest.fixture(scope="module")
def survivor() -> Iterator[Survivor]:
    place = Path(tempfile.mkdtemp(prefix="segue-"))
    survivor = Survivor(place)
    try:
        yield survivor
        survivor.qmp.close()
        survivor.other.close()
        survivor.machine.stop()
        assert survivor.machine.wait() == 0
        assert not survivor.segue.leftovers()
    finally:
        survivor.segue.end()
        shutil.rmtree(place)


@pytest.fixture(autouse=True)
def unchanged(survivor: Survivor) -> Iterator[None]:
    """Nothing is left of a fault, and an upgrade works right after it."""
    assert survivor.machine.process is not None
    with no_descriptor_leak(survivor.machine.process.pid):
        before = sorted(p.name for p in survivor.machine.directory.iterdir())
        yield
        survivor.upgrade_works()
        assert sorted(p.name for p in survivor.machine.directory.iterdir()) in (
            before,
            sorted([*before, "receipts.jsonl"]),
        )


@pytest.mark.parametrize("phase", STARTED)
def test_successor_killed(survivor: Survivor, phase: str) -> None:
    incumbent = survivor.machine.qemu_pid
    going = survivor.begin(phase)
    os.kill(survivor.successor(), signal.SIGKILL)
    survivor.go_on()
    survivor.check(going.result(60), "failed", incumbent)


@pytest.mark.parametrize("phase", STARTED)
def test_successor_hangs(survivor: Survivor, phase: str) -> None:
    incumbent = survivor.machine.qemu_pid
    going = survivor.begin(phase, **limits(**{phase: 1, "move": 1}))
    os.kill(survivor.successor(), signal.SIGSTOP)
    survivor.go_on()
    survivor.check(going.result(60), "timed-out", incumbent)


@pytest.mark.parametrize("phase", STARTED)
def test_main_loop_of_the_successor_hangs(survivor: Survivor, phase: str) -> None:
    """Its other threads run on: at commit, the monitor's reads a `cont` that nobody obeys."""
    incumbent = survivor.machine.qemu_pid
    going = survivor.begin(phase, **limits(**{phase: 1, "move": 1}))
    with main_thread_hangs(survivor.successor()):
        survivor.go_on()
        receipt = going.result(60)
    survivor.check(receipt, "timed-out", incumbent)


def limits(**seconds: float) -> dict[str, Any]:
    return {"x-limits": seconds}


def script(place: Path, text: str) -> str:
    path = place / "qemu-script"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


BROKEN_STARTS = {
    "exits at once": 'case "$*" in *defer*) exit 3;; esac; exec {qemu} "$@"',
    "prints an error": 'case "$*" in *defer*) echo no luck >&2; exit 1;; esac; exec {qemu} "$@"',
    "hangs": 'case "$*" in *defer*) exec sleep 1000;; esac; exec {qemu} "$@"',
    "prints garbage": "echo garbage; exit 0",
    "other RAM size": (
        'case "$*" in *defer*) n=$#; while [ $n -gt 0 ]; do a=$1; shift; n=$((n-1)); '
        'case "$a" in memory-backend-file*) a=$(echo "$a" | sed s/size=67108864/size=33554432/);; '
        'esac; set -- "$@" "$a"; done; set -- "$@" -m 32;; esac; exec {qemu} "$@"'
    ),
    "one device more": (
        'case "$*" in *defer*) set -- "$@" -device virtio-rng-pci;; esac; exec {qemu} "$@"'
    ),
}


@pytest.mark.parametrize("how", BROKEN_STARTS)
def test_successor_starts_badly(survivor: Survivor, place: Path, how: str) -> None:
    incumbent = survivor.machine.qemu_pid
    to = script(place, BROKEN_STARTS[how].format(qemu=qemu("10.0")))
    receipt = survivor.begin(None, to, **limits(prepare=3)).result(60)
    expected = {"hangs": "timed-out", "exits at once": "failed", "prints an error": "failed"}
    survivor.check(receipt, expected.get(how, "refused"), incumbent)
    if how == "prints an error":
        assert "no luck" in receipt["error"]["what"]


UNFIT: dict[str, Callable[[Path], str]] = {
    "is missing": lambda place: str(place / "nothing"),
    "is a directory": str,
    "is not executable": lambda place: unfit(place, b"#!/bin/sh\n", stat.S_IRUSR),
    "is no program": lambda place: unfit(place, b"\x00" * 64, stat.S_IRWXU),
    "is for another architecture": lambda place: qemu("10.0", "aarch64"),
}


def unfit(place: Path, data: bytes, mode: int) -> str:
    path = place / "unfit"
    path.write_bytes(data)
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize("how", UNFIT)
def test_unfit_binary(survivor: Survivor, place: Path, how: str) -> None:
    incumbent = survivor.machine.qemu_pid
    receipt = survivor.begin(None, UNFIT[how](place)).result(60)
    survivor.check(receipt, "refused", incumbent)


@pytest.mark.parametrize("phase", ["plan", *PHASES])
def test_client_of_the_upgrade_vanishes(survivor: Survivor, phase: str) -> None:
    """The upgrade goes on to its end; somebody else sees how it went."""
    before = survivor.machine.qemu_pid
    other = survivor.machine.qmp()
    arguments = {"to": qemu("10.0"), "force": True, "x-break": [phase]}
    going = other.begin("segue-upgrade", arguments)
    other.event(phase=phase, state="break")
    other.close()
    with contextlib.suppress(Exception):
        going.result(5)
    survivor.qmp.events.clear()
    survivor.go_on()
    survivor.qmp.event(phase="retire", state="end")
    wait_until("the end of the incumbent", lambda: not alive(before))
    survivor.well()


@pytest.mark.parametrize("phase", ["plan", *PHASES])
def test_a_second_upgrade_is_refused(survivor: Survivor, phase: str) -> None:
    going = survivor.begin(phase)
    done = survivor.segue("upgrade", "survivor", "--json")
    survivor.go_on()
    assert done.returncode == 5, done
    assert going.result(60)["result"] == "done"
    survivor.well()


@pytest.mark.parametrize("phase", PHASES)
def test_guest_resets_meanwhile(survivor: Survivor, phase: str) -> None:
    """It is a reset like any other, whoever runs the guest afterwards."""
    going = survivor.begin(phase)
    start = len(survivor.console.data)
    survivor.console.witness = None
    survivor.console.send(b"r")
    survivor.go_on()
    receipt = going.result(60)
    survivor.console.expect(rb"segue guest x86", start)
    assert receipt["result"] in ("done", "failed")
    survivor.console.close()
    survivor.console = watch(survivor.machine, survivor.place)


@pytest.mark.parametrize("phase", ["prepare", "open"])
def test_guest_panics_meanwhile(survivor: Survivor, phase: str) -> None:
    """With `-action panic=pause` it is paused then, on the incumbent, and can be resumed."""
    incumbent = survivor.machine.qemu_pid
    going = survivor.begin(phase)
    survivor.console.send(b"p")
    wait_until(
        "the panic",
        lambda: survivor.other.command("query-status")["status"] == "guest-panicked",
    )
    survivor.go_on()
    receipt = going.result(60)
    survivor.qmp.command("system_reset")
    survivor.qmp.command("cont")
    assert receipt["result"] in ("failed", "refused"), receipt
    assert "panicked" in receipt["error"]["what"]
    assert survivor.qemus() == [incumbent]
    survivor.console.close()
    survivor.console = watch(survivor.machine, survivor.place)


def test_out_of_descriptors(survivor: Survivor) -> None:
    import resource

    assert survivor.machine.process is not None
    pid = survivor.machine.process.pid
    incumbent = survivor.machine.qemu_pid
    used = max(int(fd.name) for fd in Path(f"/proc/{pid}/fd").iterdir())
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 3, before[1]))
    try:
        receipt = survivor.begin(None).result(60)
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    assert receipt["result"] in ("failed", "refused"), receipt
    survivor.check(receipt, receipt["result"], incumbent)
