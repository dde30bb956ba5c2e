"""The main job: QEMU is replaced under a running guest, and nobody who is attached notices."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.qemu.conftest import tiny, unharmed, watch
from tests.qemu.harness import Segue, alive, qemu, wait_until

ROUND = ("10.0", "11.1", "10.0", "7.2", "11.1", "7.2")


@pytest.mark.parametrize("machine", ["q35", "pc"])
def test_every_pair_of_releases(segue: Segue, place: Path, machine: str) -> None:
    guest = segue.start("guest", tiny(place, "7.2", machine=machine))
    console = watch(guest, place)
    typed = b""
    for number, release in enumerate(ROUND):
        before = guest.qemu_pid
        console.send(letters := bytes([ord("A") + number]) * 5)
        typed += letters
        receipt = guest.handed_over("--to", qemu(release))
        assert receipt["to"]["version"].startswith(release)
        assert guest.qemu_pid != before
        assert not alive(before)
        assert 0 < receipt["blackout_seconds"] < receipt["phases"]["prepare"] + 1
        assert all(kept.get("held", True) for kept in receipt["kept"]), receipt["kept"]
        unharmed(console)
    witness = console.witness
    assert witness is not None
    console.wait(lambda: bytes(witness.heard) == typed, "the guest hearing all that was typed")
    assert guest.status()["upgrades"] == len(ROUND)


def test_current_needs_nothing(segue: Segue, place: Path) -> None:
    guest = segue.start("guest", tiny(place, "7.2"))
    console = watch(guest, place)
    before = guest.qemu_pid
    assert guest.upgrade()["result"] == "current"
    assert guest.upgrade("--to", qemu("7.2"))["result"] == "current"
    assert guest.qemu_pid == before
    assert guest.handed_over("--force")["from"]["pid"] == before
    unharmed(console)


def test_rehearsal_leaves_the_guest_where_it_was(segue: Segue, place: Path) -> None:
    guest = segue.start("guest", tiny(place, "7.2"))
    console = watch(guest, place)
    before = guest.qemu_pid
    receipt = guest.upgrade("--to", qemu("10.0"), "--rehearse")
    assert receipt["result"] == "rehearsed"
    assert receipt["guest"] == "running on the incumbent"
    assert guest.qemu_pid == before
    assert not alive(receipt["to"]["pid"])
    assert receipt["clock_lag_seconds"] == receipt["blackout_seconds"] > 0
    unharmed(console)
    guest.handed_over("--to", qemu("10.0"))
    unharmed(console)


def test_a_paused_guest_stays_paused(segue: Segue, place: Path) -> None:
    guest = segue.start("guest", tiny(place, "7.2"))
    console = watch(guest, place)
    with guest.qmp() as qmp:
        qmp.command("stop")
        for release in ("10.0", "7.2", "11.1"):
            receipt = guest.handed_over("--to", qemu(release))
            assert receipt["blackout_seconds"] is None
            assert qmp.command("query-status")["status"] in ("paused", "prelaunch")
        qmp.command("cont")
    unharmed(console)


def test_a_guest_that_ends_is_as_under_plain_qemu(segue: Segue, place: Path) -> None:
    guest = segue.start("guest", tiny(place, "7.2"))
    console = watch(guest, place)
    guest.handed_over("--to", qemu("10.0"))
    console.send(b"q")
    assert guest.wait() == 0
    wait_until("the run directory's end", lambda: not guest.directory.exists())


def test_a_reboot_is_the_guests_own_affair(segue: Segue, place: Path) -> None:
    guest = segue.start("guest", tiny(place, "7.2"))
    console = watch(guest, place)
    guest.handed_over("--to", qemu("10.0"))
    unharmed(console)
    console.send(b"r")
    start = len(console.data)
    console.expect(rb"segue guest x86", start)
    console.expect(rb"tick 00000100", start)
    pid = guest.qemu_pid
    guest.handed_over("--to", qemu("11.1"))
    assert guest.qemu_pid != pid


def test_no_reboot_ends_the_machine(segue: Segue, place: Path) -> None:
    guest = segue.start("guest", tiny(place, "7.2", "-no-reboot"))
    console = watch(guest, place)
    guest.handed_over("--to", qemu("10.0"))
    console.send(b"r")
    assert guest.wait() == 0


def arm(place: Path, release: str) -> list[str]:
    guest = Path(__file__).parents[1] / "guests/aarch64/guest.bin"
    return [
        qemu(release, "aarch64"),
        *("-M", "virt-7.2", "-cpu", "cortex-a57", "-m", "64", "-nodefaults", "-display", "none"),
        *("-kernel", str(guest), "-serial", f"unix:{place}/console,server=on,wait=off"),
    ]


def test_aarch64_and_a_state_that_does_not_load(segue: Segue, place: Path) -> None:
    """Across these releases TCG's CPU section does not load: a rehearsal must find that out."""
    guest = segue.start("guest", arm(place, "7.2"))
    console = watch(guest, place)
    before = guest.qemu_pid
    for arguments in (["--rehearse"], []):
        receipt = guest.upgrade("--to", qemu("10.0", "aarch64"), *arguments, status=1)
        assert receipt["result"] == "failed"
        assert "move" in receipt["phases"]
        assert receipt["guest"] == "running on the incumbent"
        assert guest.qemu_pid == before
        unharmed(console)
    guest.handed_over("--force")
    unharmed(console)
