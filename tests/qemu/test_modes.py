"""Every mode replaces QEMU under a running guest, and has the same way back."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.qemu.conftest import tiny, unharmed, watch
from tests.qemu.hang import hangs_when_it_reads
from tests.qemu.harness import Segue, alive, files, qemu, wait_until

# Mode and target, from the one before; the first instance is 10.0.
ROUND = (
    ("cpr-transfer", "10.0"),
    ("cpr-transfer", "11.1"),
    ("migrate", "11.1"),
    ("cpr-transfer", "11.1"),
    ("handover", "10.0"),
    ("migrate", "11.1"),
    ("handover", "11.1"),
)


def test_every_mode_after_every_other(segue: Segue, place: Path) -> None:
    guest = segue.start("guest", tiny(place, "10.0"))
    console = watch(guest, place)
    client = guest.qmp()
    typed = b""
    for number, (mode, release) in enumerate(ROUND):
        before = guest.qemu_pid
        console.send(letters := bytes([ord("A") + number]) * 5)
        typed += letters
        receipt = guest.handed_over("--to", qemu(release), "--mode", mode, "--force")
        assert receipt["mode"] == mode
        assert receipt["to"]["version"].startswith(release)
        assert all(kept.get("held", True) for kept in receipt["kept"]), receipt["kept"]
        assert not receipt["warnings"]
        assert not alive(before)
        unharmed(console)
    witness = console.witness
    assert witness is not None
    console.wait(lambda: bytes(witness.heard) == typed, "the guest hearing all that was typed")
    guest.upgrade("--to", qemu("11.1"), "--mode", "migrate", "--rehearse")
    client.event(phase="undo", state="end")
    # Nobody is left with a STOP that no RESUME has followed.
    assert {event["event"] for event in client.events} == {"SEGUE_UPGRADE"}
    client.close()


def test_auto_says_which_and_why(segue: Segue, place: Path) -> None:
    segue.start("guest", tiny(place, "7.2"))
    done = segue("check", "guest", "--to", qemu("10.0"))
    assert done.returncode == 0
    assert "mode handover: possible" in done.stdout
    assert "mode cpr-transfer: QEMU 7.2" in done.stdout
    refused = segue("upgrade", "guest", "--to", qemu("10.0"), "--mode", "cpr-transfer")
    assert refused.returncode == 5
    assert "--mode handover" in refused.stderr
    assert segue("upgrade", "guest", "--mode", "teleport").returncode == 2


@pytest.mark.parametrize("mode", ["cpr-transfer", "migrate"])
@pytest.mark.parametrize("how", ["killed", "hangs", "rehearsal"])
def test_the_way_back(segue: Segue, place: Path, mode: str, how: str) -> None:
    """In every phase; the same guest, and the mode works afterwards."""
    guest = segue.start("guest", tiny(place, "11.1"))
    console = watch(guest, place)
    incumbent = guest.qemu_pid
    names = files(guest.directory)

    def well() -> None:
        assert guest.qemu_pid == incumbent
        assert sorted({*files(guest.directory)} - {"receipts.jsonl"}) == names
        unharmed(console)

    if how == "rehearsal":
        receipt = guest.upgrade("--to", qemu("11.1"), "--mode", mode, "--rehearse")
        assert receipt["result"] == "rehearsed"
        well()
    else:
        fault = signal.SIGKILL if how == "killed" else signal.SIGSTOP
        for phase in ("open", "hold", "move", "commit"):
            receipt = _spoil(guest, mode, phase, fault)
            assert receipt["result"] in ("failed", "timed-out"), receipt
            assert receipt["guest"] == "running on the incumbent"
            well()
    receipt = guest.handed_over("--to", qemu("11.1"), "--mode", mode, "--force")
    unharmed(console)


def _spoil(guest: Any, mode: str, phase: str, fault: signal.Signals) -> dict[str, Any]:
    """An upgrade whose successor meets `fault` at the beginning of `phase`; its receipt."""
    with guest.qmp() as qmp, guest.qmp() as other:
        going = qmp.begin(
            "segue-upgrade",
            {
                "mode": mode,
                "force": True,
                "x-break": [phase],
                "x-limits": {"open": 2, "hold": 1, "move": 1, "commit": 1},
            },
        )
        qmp.event(phase=phase, state="break")
        supervisor = guest.process.pid
        (successor,) = (
            pid for pid in guest.segue.processes() if pid not in (supervisor, guest.qemu_pid)
        )
        os.kill(successor, fault)
        other.command("x-segue-continue")
        receipt: dict[str, Any] = going.result(60)
        return receipt


def test_cpr_exec_keeps_the_process(segue: Segue, place: Path) -> None:
    guest = segue.start("guest", tiny(place, "11.1"))
    console = watch(guest, place)
    pid = guest.qemu_pid
    typed = b""
    for number, mode in enumerate(("cpr-exec", "cpr-exec", "handover", "cpr-exec", "cpr-transfer")):
        console.send(letters := bytes([ord("A") + number]) * 5)
        typed += letters
        receipt = guest.handed_over("--to", qemu("11.1"), "--mode", mode, "--force")
        assert (guest.qemu_pid == pid) == (mode == "cpr-exec")
        assert receipt["to"]["pid"] == guest.qemu_pid
        rehearsal = receipt["rehearsal"]["blackout_seconds"] if mode == "cpr-exec" else 0
        lag = receipt["blackout_seconds"] + rehearsal
        assert receipt["clock_lag_seconds"] == pytest.approx(lag, abs=0.00001)
        assert all(kept.get("held", True) for kept in receipt["kept"]), receipt["kept"]
        assert not receipt["warnings"]
        pid = guest.qemu_pid
        unharmed(console)
    witness = console.witness
    assert witness is not None
    console.wait(lambda: bytes(witness.heard) == typed, "the guest hearing all that was typed")


# What a new binary does when QEMU has executed it; the rehearsal before finds nothing wrong.
DYING = {
    "exits at once": "exit 3",
    "is not there any more": "rm $0; exec /nothing",
    "hangs": "exec sleep 1000",
    "refuses the state": 'exec {qemu} "$@" -machine hpet=off',
}


@pytest.mark.parametrize("how", DYING)
def test_cpr_exec_starts_the_old_binary_again(segue: Segue, place: Path, how: str) -> None:
    guest = segue.start("guest", tiny(place, "11.1"))
    console = watch(guest, place)
    new = place / "qemu-new"
    new.write_text(
        f'#!/bin/sh\n[ -z "$QEMU_CPR_EXEC_STATE" ] && exec {qemu("11.1")} "$@"\n'
        + DYING[how].format(qemu=qemu("11.1"))
        + "\n"
    )
    new.chmod(0o755)
    before = files(guest.directory)
    with guest.qmp() as qmp:
        arguments = {"mode": "cpr-exec", "to": str(new), "force": True, "x-limits": {"move": 2}}
        receipt = qmp.command("segue-upgrade", arguments)
    assert receipt["result"] in ("failed", "timed-out"), receipt
    assert receipt["rehearsal"]["result"] == "rehearsed"
    assert receipt["guest"].startswith("running on the incumbent's binary again")
    assert guest.status()["binary"] == qemu("11.1")
    assert sorted({*files(guest.directory)} - {"receipts.jsonl"}) == before
    unharmed(console)
    for mode in ("cpr-exec", "handover"):
        guest.handed_over("--to", qemu("11.1"), "--mode", mode, "--force")
        unharmed(console)


def test_cpr_exec_of_what_hangs_while_it_loads(segue: Segue, place: Path) -> None:
    """QEMU itself, at the first byte of the state that it is to load."""
    guest = segue.start("guest", tiny(place, "11.1"))
    console = watch(guest, place)
    pid = guest.qemu_pid
    with guest.qmp() as qmp, guest.qmp() as other:
        limits = {"move": 10}
        arguments = {"mode": "cpr-exec", "force": True, "x-break": ["move"], "x-limits": limits}
        going = qmp.begin("segue-upgrade", arguments)
        qmp.event(phase="move", state="break")
        with hangs_when_it_reads(pid, "/cpr-state") as hangs:
            other.command("x-segue-continue")
            receipt = going.result(60)
            assert hangs.is_set()
    assert receipt["result"] == "timed-out", receipt
    assert receipt["guest"].startswith("running on the incumbent's binary again")
    assert not alive(pid)
    unharmed(console)
    guest.handed_over("--to", qemu("11.1"), "--mode", "cpr-exec", "--force")
    unharmed(console)


def test_cpr_exec_without_a_way_back(segue: Segue, place: Path) -> None:
    """The new binary dies, and the old one is gone: that is said, and nothing stays."""
    old, new = place / "qemu-old", place / "qemu-new"
    for path, more in ((old, ""), (new, f"[ -z $QEMU_CPR_EXEC_STATE ] || {{ rm {old}; exit 0; }}")):
        path.write_text(f'#!/bin/sh\n{more}\nexec {qemu("11.1")} "$@"\n')
        path.chmod(0o755)
    guest = segue.start("guest", [str(old), *tiny(place, "11.1")[1:]])
    watch(guest, place)
    pid = guest.qemu_pid
    receipt = guest.upgrade("--to", str(new), "--mode", "cpr-exec", "--force", status=8)
    assert receipt["result"] == "lost"
    assert "could not be started again" in receipt["error"]["what"]
    assert guest.wait() == 1
    assert not alive(pid)
    wait_until("the end of all", lambda: not segue.leftovers(), 10)


def test_cpr_exec_of_what_fails_the_rehearsal(segue: Segue, place: Path) -> None:
    """Nothing is executed then."""
    guest = segue.start("guest", tiny(place, "11.1"))
    console = watch(guest, place)
    pid = guest.qemu_pid
    new = place / "qemu-new"
    new.write_text(f'#!/bin/sh\ncase "$*" in *defer*) exit 3;; esac\nexec {qemu("11.1")} "$@"\n')
    new.chmod(0o755)
    receipt = guest.upgrade("--to", str(new), "--mode", "cpr-exec", "--force", status=1)
    assert receipt["rehearsal"]["result"] == "failed"
    assert receipt["guest"] == "running on the incumbent"
    assert guest.qemu_pid == pid
    unharmed(console)


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_cpr_exec_comes_back_until_the_last_step(
    segue: Segue, place: Path, fault: signal.Signals
) -> None:
    guest = segue.start("guest", tiny(place, "11.1"))
    console = watch(guest, place)
    pid = guest.qemu_pid
    with guest.qmp() as qmp, guest.qmp() as other:
        arguments = {"mode": "cpr-exec", "force": True, "x-break": ["commit"]}
        going = qmp.begin("segue-upgrade", arguments | {"x-limits": {"commit": 1}})
        qmp.event(phase="commit", state="break")
        os.kill(pid, fault)
        other.command("x-segue-continue")
        receipt = going.result(60)
    assert receipt["result"] in ("failed", "timed-out"), receipt
    assert receipt["guest"].startswith("running on the incumbent's binary again")
    unharmed(console)
    assert guest.qemu_pid != pid
    guest.handed_over("--mode", "cpr-exec", "--force")
    unharmed(console)
