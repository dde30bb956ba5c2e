"""Disks in iothreads: QEMU loses an interrupt of theirs now and then, and nobody may notice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.qemu.conftest import tiny, unharmed, watch
from tests.qemu.harness import Segue, qemu
from tests.qemu.linuxguest import Disk, Linux

DISKS = (
    Disk(
        "/dev/vda",
        "qcow2",
        "-object iothread,id=io0 -drive file={image},if=none,id=d0,format=qcow2"
        " -device virtio-blk-pci,drive=d0,iothread=io0",
    ),
    Disk(
        "/dev/sda",
        "raw",
        "-device virtio-scsi-pci,iothread=io0,id=scsi0"
        " -drive file={image},if=none,id=d1,format=raw -device scsi-hd,drive=d1,bus=scsi0.0",
    ),
)


def disks(segue: Segue, place: Path) -> Linux:
    """The Linux guest with a disk of each kind, both written without end."""
    machine = ("-M", "pc-q35-7.2", "-m", "512", "-display", "none")
    return Linux(segue, place, "10.0", *machine, disks=DISKS, rate=0)


def test_a_few_handovers_and_ways_back(segue: Segue, place: Path) -> None:
    guest = disks(segue, place)
    for release in ("11.1", "10.0", "7.2", "10.0"):
        guest.upgrade(release)
        receipt = guest.machine.upgrade("--to", qemu("11.1"), "--rehearse")
        assert receipt["result"] == "rehearsed"
        assert not receipt["warnings"]
        guest.go_on()
    guest.finish()


def test_refused_where_it_cannot_be_given_again(segue: Segue, place: Path) -> None:
    """The interrupts of an emulated IOMMU are not plain writes."""
    argv = tiny(place, "10.0", "-object", "iothread,id=io0", "-device", "intel-iommu,intremap=on")
    guest = segue.start("guest", [*argv, "-M", "kernel-irqchip=split"])
    console = watch(guest, place)
    receipt = guest.upgrade("--to", qemu("11.1"), status=5)
    assert any("iothread" in blocker["what"] for blocker in receipt["blockers"])
    unharmed(console)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_500_handovers_without_a_stall(segue: Segue, place: Path) -> None:
    """A lost interrupt shows as a disk that acknowledges no more blocks."""
    guest = disks(segue, place)
    for number in range(500):
        guest.upgrade(("11.1", "10.0")[number % 2])
    guest.finish()
