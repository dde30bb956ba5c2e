"""A guest that is paused stays paused, whichever QEMU has it and whatever goes wrong."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.qemu.conftest import unharmed
from tests.qemu.harness import Segue, qemu
from tests.qemu.survivor import Survivor, limits


def disk(place: Path, bitmap: bool = True) -> Path:
    image = place / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "16M"], check=True)
    if bitmap:
        subprocess.run(["qemu-img", "bitmap", "--add", image, "kept"], check=True)
    return image


@pytest.fixture
def guest(segue: Segue, place: Path) -> Survivor:
    drive = f"file={disk(place)},if=virtio,format=qcow2"
    survivor = Survivor(place, "-drive", drive, segue=segue)
    survivor.qmp.command("stop")
    return survivor


def paused(guest: Survivor, *also: str) -> None:
    assert guest.qmp.command("query-status")["status"] in ("paused", "prelaunch", *also)


def goes_on(guest: Survivor) -> None:
    guest.qmp.command("cont")
    guest.well()
    [device] = guest.qmp.command("query-block")
    [bitmap] = device["inserted"]["dirty-bitmaps"]
    assert bitmap["name"] == "kept"
    assert not bitmap.get("inconsistent")
    guest.close()


@pytest.mark.parametrize(
    "releases", [("10.0", "11.1", "7.2", "7.2", "10.0"), ("7.2", "7.2", "11.1", "11.1")]
)
def test_upgrades_in_a_row(guest: Survivor, releases: tuple[str, ...]) -> None:
    """Its disks are opened by the QEMU that has it, and not only when it goes on."""
    for release in releases:
        receipt = guest.begin(None, release).result(60)
        assert receipt["result"] == "done", receipt
        assert receipt["guest"] == "paused on the successor"
        paused(guest)
    goes_on(guest)


@pytest.mark.parametrize(
    ("release", "phase", "fault"),
    [
        ("7.2", "open", signal.SIGKILL),
        ("7.2", "move", signal.SIGKILL),
        ("7.2", "commit", signal.SIGKILL),
        ("7.2", "rehearsal", None),
        ("10.0", "commit", signal.SIGSTOP),
        ("11.1", "rehearsal", None),
    ],
)
def test_undone(guest: Survivor, release: str, phase: str, fault: signal.Signals | None) -> None:
    """It is paused on the incumbent, with its disks; QEMU cannot move it before a `cont`."""
    assert guest.begin(None, release).result(60)["result"] == "done"
    incumbent = guest.machine.qemu_pid
    if fault is None:
        receipt = guest.begin(None, release, rehearse=True).result(60)
        assert receipt["result"] == "rehearsed", receipt
    else:
        going = guest.begin(phase, release, **limits(commit=1))
        os.kill(guest.successor(), fault)
        guest.go_on()
        receipt = going.result(60)
        assert receipt["result"] in ("failed", "timed-out"), receipt
    assert receipt["guest"] == "paused on the incumbent"
    assert guest.qemus() == [incumbent]
    paused(guest, "postmigrate")
    receipt = guest.begin(None, release).result(60)
    if receipt["result"] == "refused":
        assert phase != "open"
        assert "`cont` it first" in receipt["error"]["hint"]
        assert receipt["guest"] == "paused on the incumbent"
        guest.qmp.command("cont")
        guest.qmp.command("stop")
        receipt = guest.begin(None, release).result(60)
    assert receipt["result"] == "done", receipt
    paused(guest)
    goes_on(guest)


def test_a_running_guest_that_is_paused_afterwards(guest: Survivor) -> None:
    guest.qmp.command("cont")
    assert guest.begin(None, "10.0").result(60)["result"] == "done"
    guest.qmp.command("stop")
    assert guest.begin(None, "7.2").result(60)["result"] == "done"
    paused(guest)
    assert guest.begin(None, qemu("11.1")).result(60)["result"] == "done"
    guest.qmp.command("cont")
    unharmed(guest.console)
    guest.qmp.command("stop")
    goes_on(guest)
