"""Disks in iothreads: QEMU loses an interrupt of theirs now and then, and nobody may notice."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.guests.linux.verify_disk import verify
from tests.qemu.conftest import tiny, unharmed, watch
from tests.qemu.harness import Client, Machine, Segue, cache, qemu

DISKS = ("/dev/vda", "/dev/sda")
_REPORT = re.compile(rb"disk (/dev/\w+) (\d+) ok")


def linux(place: Path, release: str) -> list[str]:
    words = f"console=ttyS0 quiet segue.heartbeat=/dev/hvc0 segue.disk={','.join(DISKS)}"
    return [
        qemu(release),
        *("-M", "pc-q35-7.2", "-m", "512", "-nodefaults", "-display", "none"),
        *("-kernel", str(cache() / "linux/vmlinuz"), "-initrd", str(cache() / "linux/initrd.img")),
        *("-append", words + " segue.disk-rate=0"),
        *("-object", "iothread,id=io0"),
        *("-drive", f"file={place}/vda.qcow2,if=none,id=d0,format=qcow2"),
        *("-device", "virtio-blk-pci,drive=d0,iothread=io0"),
        *("-device", "virtio-scsi-pci,iothread=io0,id=scsi0"),
        *("-drive", f"file={place}/sda.raw,if=none,id=d1,format=raw"),
        *("-device", "scsi-hd,drive=d1,bus=scsi0.0"),
        *("-serial", f"unix:{place}/console,server=on,wait=off"),
        *("-chardev", f"socket,id=beat,path={place}/beat,server=on,wait=off"),
        *("-device", "virtio-serial-pci", "-device", "virtconsole,chardev=beat"),
    ]


class Disks:
    """The Linux guest with a disk of each kind, both written without end."""

    def __init__(self, segue: Segue, place: Path, release: str) -> None:
        self.place = place
        for name, kind in (("vda.qcow2", "qcow2"), ("sda.raw", "raw")):
            create = ["qemu-img", "create", "-q", "-f", kind, str(place / name), "64M"]
            subprocess.run(create, check=True)
        self.machine: Machine = segue.start("guest", linux(place, release))
        self.shell: Client = self.machine.connect(place / "console")
        self.beat: Client = self.machine.connect(place / "beat")
        self.go_on()

    def go_on(self) -> None:
        """Each disk acknowledges more blocks; a lost interrupt shows here as a stall."""
        for disk in DISKS:
            self.beat.expect(rb"disk %s \d+ ok" % disk.encode(), len(self.beat.data))
        assert b"BAD" not in self.beat.data

    def finish(self) -> None:
        """Power off, and read both disks back."""
        self.shell.send(b"poweroff -f\n")
        assert self.machine.wait() == 0
        written = {disk.decode(): int(n) for disk, n in _REPORT.findall(bytes(self.beat.data))}
        beats = [int(n) for n in re.findall(rb"hb (\d+) \d+\r?\n", bytes(self.beat.data))]
        assert beats == list(range(beats[0], beats[0] + len(beats)))
        raw = self.place / "vda.raw"
        convert = ["qemu-img", "convert", "-O", "raw", str(self.place / "vda.qcow2"), str(raw)]
        subprocess.run(convert, check=True)
        for disk, image in zip(DISKS, (raw, self.place / "sda.raw"), strict=True):
            assert verify(image, written[disk]).blocks >= written[disk]


def test_a_few_handovers_and_ways_back(segue: Segue, place: Path) -> None:
    disks = Disks(segue, place, "10.0")
    for release in ("11.1", "10.0", "7.2", "10.0"):
        disks.machine.handed_over("--to", qemu(release))
        disks.go_on()
        receipt = disks.machine.upgrade("--to", qemu("11.1"), "--rehearse")
        assert receipt["result"] == "rehearsed"
        assert not receipt["warnings"]
        disks.go_on()
    disks.finish()


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
    disks = Disks(segue, place, "10.0")
    for number in range(500):
        release = ("11.1", "10.0")[number % 2]
        disks.machine.handed_over("--to", qemu(release))
        disks.go_on()
    disks.finish()
