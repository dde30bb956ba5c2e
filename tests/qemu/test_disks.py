"""Disk images in an upgrade: bitmaps in the image, a full file system, who reads and who writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.qemu.harness import Qmp, Segue, qemu, wait_until
from tests.qemu.linuxguest import Disk, Linux

DISK = Disk("/dev/vda", "qcow2", "-drive file={image},if=virtio,format=qcow2,discard=unmap")
MACHINE = ("-M", "q35", "-m", "256", "-display", "none")


def test_a_bitmap_in_the_image_after_an_undo_in_every_phase(segue: Segue, place: Path) -> None:
    """QEMU marks a persistent bitmap as in use while it writes; unfinished business shows."""
    guest = Linux(segue, place, "7.2", *MACHINE, disks=(DISK,))
    with guest.machine.qmp() as qmp, guest.machine.qmp() as other:
        (node,) = (block["inserted"]["node-name"] for block in qmp.command("query-block"))
        bitmap = {"node": node, "name": "backup", "persistent": True}
        qmp.command("block-dirty-bitmap-add", bitmap)
        guest.go_on()
        for release in ("11.1", "7.2"):
            for phase in ("open", "hold", "move", "commit"):
                before = dirty(qmp)
                upgrade = {"to": qemu(release), "timeout": 30, "x-break": [phase]}
                qmp.events.clear()
                going = qmp.begin("segue-upgrade", upgrade)
                qmp.event(phase=phase, state="break")
                os.kill(successor(guest), signal.SIGKILL)
                other.command("x-segue-continue")
                assert going.result(60)["result"] == "failed"
                assert dirty(qmp) >= before > 0
            guest.upgrade(release)
            assert dirty(qmp) >= before
        count = dirty(qmp)
    guest.finish()
    told = subprocess.run(
        ["qemu-img", "info", "--output=json", str(DISK.image(place))],
        capture_output=True,
        check=True,
    )
    (kept,) = json.loads(told.stdout)["format-specific"]["data"]["bitmaps"]
    assert (kept["name"], kept["flags"]) == ("backup", ["auto"])
    idle = segue.start(
        "idle", [qemu("10.0"), "-S", *MACHINE, *DISK.words.format(image=DISK.image(place)).split()]
    )
    with idle.qmp() as qmp:
        assert dirty(qmp) >= count


def dirty(qmp: Qmp) -> int:
    """How much of the disk the bitmap says was written."""
    for block in qmp.command("query-block"):
        for bitmap in block.get("inserted", {}).get("dirty-bitmaps", ()):
            assert not bitmap.get("inconsistent")
            assert bitmap["persistent"]
            return int(bitmap["count"])
    raise AssertionError("there is no bitmap")


def successor(guest: Linux) -> int:
    assert guest.machine.process is not None
    ours = (guest.machine.process.pid, guest.machine.qemu_pid)
    return next(p for p in guest.segue.processes() if p not in ours)


@pytest.fixture
def full(place: Path) -> Iterator[Path]:
    """A file system with room for half of a disk."""
    folder = place / "full"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_file_system_that_gets_full_meanwhile(full: Path, segue: Segue, place: Path) -> None:
    """QEMU has paused the guest: that is told. With room, and `cont`, it goes on, and it moves."""
    (place / "vda.qcow2").symlink_to(full / "vda.qcow2")
    guest = Linux(segue, place, "7.2", *MACHINE, disks=(DISK,), rate=0)
    with guest.machine.qmp() as qmp, guest.machine.qmp() as other:
        upgrade = {"to": qemu("10.0"), "timeout": 60, "x-break": ["open"]}
        going = qmp.begin("segue-upgrade", upgrade)
        qmp.event(phase="open", state="break")
        wait_until("the guest being paused", lambda: state(other) == "io-error")
        other.command("x-segue-continue")
        receipt = going.result(60)
        assert receipt["result"] in ("failed", "refused"), receipt
        assert state(qmp) == "io-error"
        receipt = guest.machine.upgrade("--to", qemu("10.0"), status=5)
        assert "io-error" in receipt["error"]["what"]
        subprocess.run(["mount", "-o", "remount,size=64m", str(full)], check=True)
        qmp.command("cont")
        guest.go_on()
    guest.upgrade("10.0", "11.1")
    guest.finish()


def state(qmp: Qmp) -> str:
    return str(qmp.command("query-status")["status"])


@pytest.mark.parametrize("words", ["-snapshot", "-drive file={image},if=virtio,snapshot=on"])
def test_a_temporary_overlay_is_a_blocker(segue: Segue, place: Path, words: str) -> None:
    image = DISK.image(place)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "1M"], check=True)
    more = words.format(image=image).split()
    guest = segue.start("guest", [qemu("7.2"), *MACHINE, "-S", "-nodefaults", *more])
    receipt = guest.upgrade("--to", qemu("10.0"), status=5)
    (blocker,) = receipt["blockers"]
    assert "overlay" in blocker["why"]
    assert "qemu-img create" in blocker["remedy"]
