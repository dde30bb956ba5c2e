"""Whatever goes wrong before the commit point ends with the guest running on the incumbent.

One guest goes through all of it. After each fault: one QEMU whose CPU time grows, its ticks
consecutive, the same nonce, no process or descriptor more than before, and the next upgrade works.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import shutil
import signal
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError

from tests.qemu.conftest import watch
from tests.qemu.hang import main_thread_hangs
from tests.qemu.harness import alive, files, no_descriptor_leak, qemu, wait_until
from tests.qemu.survivor import PHASES, STARTED, Survivor, limits


@pytest.fixture(scope="module")
def survivor() -> Iterator[Survivor]:
    place = Path(tempfile.mkdtemp(prefix="segue-"))
    # pvpanic, so that it can panic; a pause instead of an end, so that it survives that.
    survivor = Survivor(place, "-device", "pvpanic", "-action", "panic=pause")
    try:
        yield survivor
        survivor.close()
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
        before = files(survivor.machine.directory)
        yield
        survivor.upgrade_works()
        assert files(survivor.machine.directory) in (
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


def test_out_of_time_before_the_guest_is_stopped(survivor: Survivor) -> None:
    """What the incumbent was lent for its state, and has not used, it does not keep."""
    incumbent = survivor.machine.qemu_pid
    receipt = survivor.begin("hold", timeout=2).result(60)
    survivor.check(receipt, "timed-out", incumbent)
    with pytest.raises(ExecuteError):
        survivor.qmp.command("closefd", {"fdname": "segue"})


@pytest.mark.parametrize("phase", STARTED)
def test_main_loop_of_the_successor_hangs(survivor: Survivor, phase: str) -> None:
    """Its other threads run on: at commit, the monitor's reads a `cont` that nobody obeys."""
    incumbent = survivor.machine.qemu_pid
    going = survivor.begin(phase, **limits(**{phase: 1, "move": 1}))
    with main_thread_hangs(survivor.successor()):
        survivor.go_on()
        receipt = going.result(60)
    survivor.check(receipt, "timed-out", incumbent)


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
    "a device missing": (
        'case "$*" in *defer*) n=$#; while [ $n -gt 0 ]; do a=$1; shift; n=$((n-1)); '
        'if [ "$a $1" = "-device pvpanic" ]; then shift; n=$((n-1)); else set -- "$@" "$a"; fi; '
        'done;; esac; exec {qemu} "$@"'
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
    wait_until("word of the successor", lambda: survivor.machine.qemu_pid != before)
    survivor.well()


@pytest.mark.parametrize("phase", ["plan", *PHASES])
def test_a_second_upgrade_is_refused(survivor: Survivor, phase: str) -> None:
    going = survivor.begin(phase)
    done = survivor.segue("upgrade", "survivor", "--json")
    survivor.go_on()
    assert done.returncode == 5, done
    assert going.result(60)["result"] == "done"
    survivor.well()


def test_loading_breaks(survivor: Survivor, place: Path) -> None:
    """Not starting, and not comparing: the same devices, one of which refuses the state."""
    incumbent = survivor.machine.qemu_pid
    to = script(place, f'exec {qemu("10.0")} "$@" -global hpet.timers=5')
    for rehearse in (True, False):
        receipt = survivor.begin(None, to, rehearse=rehearse).result(60)
        survivor.check(receipt, "failed", incumbent)
        assert "move" in receipt["phases"]


@pytest.mark.parametrize("phase", PHASES)
def test_guest_resets_meanwhile(survivor: Survivor, phase: str) -> None:
    """It is a reset like any other, whoever runs the guest afterwards."""
    going = survivor.begin(phase)
    start = len(survivor.console.data)
    survivor.console.witness = None
    survivor.console.send(b"r")
    if phase in ("prepare", "open", "hold"):
        # The guest runs: it has reset itself before it is stopped.
        survivor.console.expect(rb"segue guest x86", start)
    survivor.go_on()
    receipt = going.result(60)
    survivor.console.expect(rb"segue guest x86", start)
    assert receipt["result"] == "done", receipt
    survivor.console.close()
    survivor.console = watch(survivor.machine, survivor.place)


def test_guest_resets_in_the_very_moment(survivor: Survivor) -> None:
    """As it is being stopped: the upgrade is done, or undone for that reason, and never half."""
    for _ in range(5):
        going = survivor.begin("hold")
        start = len(survivor.console.data)
        survivor.console.witness = None
        survivor.console.send(b"r")
        survivor.go_on()
        receipt = going.result(60)
        survivor.console.expect(rb"segue guest x86", start)
        if receipt["result"] != "done":
            assert receipt["result"] == "failed", receipt
            assert "the guest reset itself in the very moment" in receipt["error"]["what"]
            assert receipt["error"]["hint"] == "upgrade again"
            assert receipt["guest"] == "running on the incumbent"
        survivor.console.close()
        survivor.console = watch(survivor.machine, survivor.place)


@pytest.mark.parametrize("phase", ["prepare", "open", "hold"])
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


@pytest.mark.parametrize("phase", PHASES)
def test_guest_is_paused_meanwhile(survivor: Survivor, phase: str) -> None:
    """By a client, who waits until it is clear which QEMU is to obey."""
    going = survivor.begin(phase)
    client = survivor.machine.qmp()
    stopping = client.begin("stop")
    survivor.go_on()
    assert going.result(60)["result"] == "done"
    stopping.result(60)
    assert survivor.qmp.command("query-status")["status"] == "paused"
    survivor.qmp.command("cont")
    client.close()
    survivor.well()


@pytest.mark.parametrize("phase", ["plan", *PHASES])
def test_incumbent_hangs(survivor: Survivor, phase: str) -> None:
    """Nobody waits for it in vain; it has its guest back when it answers again."""
    incumbent = survivor.machine.qemu_pid
    going = survivor.begin(phase, **limits(plan=1, prepare=1, open=1, hold=1, move=1, undo=0.5))
    os.kill(incumbent, signal.SIGSTOP)
    survivor.go_on()
    receipt = going.result(60)
    if phase == "commit":
        # It is not needed any more.
        assert receipt["result"] == "done", receipt
    elif phase == "plan":
        assert receipt["result"] == "timed-out", receipt
    else:
        assert receipt["result"] == "lost", receipt
        assert receipt["guest"] == "unknown: the incumbent does not answer"
        survivor.qmp.events.clear()
    if phase != "commit":
        os.kill(incumbent, signal.SIGCONT)
        if phase != "plan":
            survivor.qmp.event(phase="undo", state="end")
            final = wait_until("the receipt", lambda: _last(survivor, receipt["started"]))
            assert final["result"] == "timed-out", final
            assert final["guest"] == "running on the incumbent"
        assert survivor.qemus() == [incumbent]
    survivor.well()


def _last(survivor: Survivor, started: float) -> dict[str, Any] | None:
    history: list[dict[str, Any]] = survivor.other.command("segue-history")
    return history[-1] if history[-1]["started"] == started else None


@pytest.mark.parametrize("phase", ["release", "retire"])
def test_incumbent_killed_when_the_successor_runs(survivor: Survivor, phase: str) -> None:
    incumbent = survivor.machine.qemu_pid
    going = survivor.begin(phase)
    os.kill(incumbent, signal.SIGKILL)
    survivor.go_on()
    assert going.result(60)["result"] == "done"
    assert len(survivor.qemus()) == 1
    survivor.well()


def test_incumbent_killed_at_commit(survivor: Survivor) -> None:
    """All of the guest is in the successor by then."""
    incumbent = survivor.machine.qemu_pid
    going = survivor.begin("commit")
    os.kill(incumbent, signal.SIGKILL)
    survivor.go_on()
    assert going.result(60)["result"] == "done"
    assert len(survivor.qemus()) == 1
    survivor.well()


@contextlib.contextmanager
def descriptors_left(pid: int, count: int) -> Iterator[None]:
    """Within it, the process can open so many more, and then none."""
    used = {int(fd.name) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    free = (number for number in itertools.count() if number not in used)
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    limit = next(itertools.islice(free, count, None))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("phase", ["plan", *PHASES, "release", "retire"])
def test_out_of_descriptors(survivor: Survivor, phase: str) -> None:
    """From the beginning of that phase on. Done or undone, it is a whole upgrade or none."""
    assert survivor.machine.process is not None
    going = survivor.begin(phase)
    with descriptors_left(survivor.machine.process.pid, 0):
        survivor.go_on()
        receipt = going.result(60)
    done_or_undone(survivor, receipt)


def done_or_undone(survivor: Survivor, receipt: dict[str, Any]) -> None:
    if receipt["result"] == "done":
        assert survivor.qemus() == [receipt["to"]["pid"]]
        survivor.well()
    else:
        assert receipt["result"] in ("failed", "refused"), receipt
        assert "Too many open files" in receipt["error"]["what"]
        assert "prlimit --nofile" in receipt["error"]["hint"]
        survivor.check(receipt, receipt["result"], receipt["from"]["pid"])


def test_each_descriptor_that_cannot_be_had(survivor: Survivor) -> None:
    """Every place where an upgrade opens something, in turn."""
    assert survivor.machine.process is not None
    for left in itertools.count():
        with descriptors_left(survivor.machine.process.pid, left):
            receipt = survivor.begin(None).result(60)
        done_or_undone(survivor, receipt)
        survivor.upgrade_works()
        if receipt["result"] == "done":
            break
    assert left > 5
