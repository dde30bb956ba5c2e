"""Machines of many shapes, each with a Linux that goes through every release and back."""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path

import pytest

from tests.qemu.conftest import tiny, unharmed, watch
from tests.qemu.harness import Segue, cache, qemu
from tests.qemu.linuxguest import Disk, Linux
from tests.qemu.test_upgrade import arm
from tests.qemu.viewer import Viewer, free_display

ROUND = ("10.0", "11.1", "7.2")


def test_q35_with_memory_above_4_gib_and_disks_of_many_kinds(segue: Segue, place: Path) -> None:
    disks = (
        Disk(
            "/dev/vda",
            "qcow2",
            "-drive file={image},if=none,id=b0,format=qcow2 -device virtio-blk-pci,drive=b0",
        ),
        Disk(
            "/dev/vdb",
            "raw",
            "-blockdev driver=raw,node-name=b1,cache.direct=on,file.driver=file,"
            "file.filename={image},file.aio=native,file.cache.direct=on"
            " -device virtio-blk-pci,drive=b1",
        ),
        Disk(
            "/dev/sda",
            "raw",
            "-device virtio-scsi-pci,id=scsi -device scsi-hd,drive=b2,bus=scsi.0"
            " -drive file={image},if=none,id=b2,format=raw,cache=writethrough,aio=io_uring",
        ),
        Disk(
            "/dev/vdc",
            "qcow2",
            "-drive file={image},if=none,id=b3,format=qcow2,cache=unsafe"
            " -device virtio-blk-pci,drive=b3",
        ),
    )
    machine = ("-M", "q35", "-m", "5G,slots=2,maxmem=8G", "-smp", "2", "-display", "none")
    guest = Linux(segue, place, "7.2", *machine, disks=disks)
    before = shape(guest)
    assert int(re.findall(r"MemTotal: +(\d+)", before[0])[0]) > 4 << 20
    guest.upgrade(*ROUND)
    assert shape(guest) == before
    guest.finish()


def shape(guest: Linux) -> tuple[str, list[str]]:
    """What the guest knows of its memory and its processors."""
    return guest.command("grep MemTotal /proc/meminfo; nproc; ls /sys/devices/system/node"), (
        guest.cpuid()
    )


def test_pc_with_ide_numa_video_and_a_tablet(segue: Segue, place: Path) -> None:
    (place / "disc.iso").write_bytes(bytes(range(256)) * 4096)
    disk = Disk("/dev/sda", "qcow2", "-hda {image}")
    port = free_display()
    machine = (
        *("-M", "pc", "-m", "512", "-smp", "2", "-cpu", "Nehalem"),
        *("-object", "memory-backend-ram,id=m0,size=256M", "-numa", "node,memdev=m0,cpus=0"),
        *("-object", "memory-backend-memfd,id=m1,size=256M", "-numa", "node,memdev=m1,cpus=1"),
        *("-cdrom", str(place / "disc.iso"), "-device", "VGA", "-vnc", f"127.0.0.1:{port - 5900}"),
        *("-device", "qemu-xhci", "-device", "usb-tablet"),
    )
    guest = Linux(segue, place, "7.2", *machine, disks=(disk,), kernel="linux/full")
    before = shape(guest)
    disc = guest.command("sha256sum /dev/sr0")
    assert "node1" in before[0]
    viewer = Viewer(port)
    for release in ROUND:
        receipt = guest.machine.handed_over("--to", qemu(release))
        assert [n for n in receipt["not_kept"] if "VNC" in n["what"]]
        viewer.ended()
        viewer = Viewer(port)
        guest.go_on()
        move_the_tablet(guest)
    assert shape(guest) == before
    guest.command("echo 3 >/proc/sys/vm/drop_caches")
    assert guest.command("sha256sum /dev/sr0") == disc
    guest.finish()
    viewer.ended()


def move_the_tablet(guest: Linux) -> None:
    """The pointer moves, and the guest sees an event of its tablet."""
    shell = guest.shell
    found = guest.command("grep -A5 Tablet /proc/bus/input/devices")
    event = re.findall(r"event\d+", found)[0]
    start = len(shell.data)
    shell.send(b"head -c 24 /dev/input/%s | wc -c; echo the ''pointer\n" % event.encode())
    with guest.machine.qmp() as qmp:
        # The reader may not be there yet: moved until it says that it saw it.
        for number in itertools.cycle(range(0, 30000, 100)):
            move = {"type": "abs", "data": {"axis": "x", "value": number}}
            qmp.command("input-send-event", {"events": [move]})
            if b"the pointer" in shell.data[start:]:
                break
    shell.expect(rb"24\r?\nthe pointer", start)


def test_a_cpu_model_that_means_something_else_in_each_release(segue: Segue, place: Path) -> None:
    """7.2's `max` has a feature that QEMU dropped later: told, and the rest stays as it was."""
    machine = ("-M", "q35", "-m", "256", "-display", "none", "-cpu")
    first = segue.start("first", [qemu("7.2"), *machine, "max", "-nodefaults", "-S"])
    for release in ("10.0", "11.1"):
        receipt = first.upgrade("--to", qemu(release), status=5)
        (blocker,) = receipt["blockers"]
        assert blocker["what"] == "CPU feature pcommit"
        assert "-cpu max,pcommit=off" in blocker["remedy"]
    guest = Linux(segue, place, "7.2", *machine, "max,pcommit=off,+x2apic,-avx2")
    before = guest.cpuid()
    guest.upgrade(*ROUND)
    assert guest.cpuid() == before
    guest.finish()


def test_microvm(segue: Segue, place: Path) -> None:
    """Its firmware is given: the packages' own differ in size.

    A guest that found queues of 1024 entries on 7.2 or 10.0, as this machine's virtio devices
    have, 11.1 does not load. Without such devices it does.
    """
    bios = cache() / "qemu/7.2/root/usr/share/seabios/bios-microvm.bin"
    disk = Disk(
        "/dev/vda",
        "raw",
        "-drive file={image},if=none,id=d0,format=raw -device virtio-blk-device,drive=d0",
    )
    guest = Linux(
        segue,
        place,
        "7.2",
        *("-M", "microvm,rtc=on", "-m", "256", "-display", "none", "-bios", str(bios)),
        disks=(disk,),
        words="tsc_early_khz=2500000",
        ports="device",
    )
    guest.upgrade("10.0", "7.2")
    receipt = guest.machine.upgrade("--to", qemu("11.1"), status=1)
    assert "exceeds allocated max 256" in receipt["error"]["what"]
    assert receipt["guest"] == "running on the incumbent"
    guest.go_on()
    guest.upgrade("10.0")
    guest.finish()


def test_microvm_without_virtio(segue: Segue, place: Path) -> None:
    bios = cache() / "qemu/7.2/root/usr/share/seabios/bios-microvm.bin"
    argv = tiny(place, "7.2", "-bios", str(bios), machine="microvm")
    guest = segue.start("guest", argv)
    console = watch(guest, place)
    for release in (*ROUND, "11.1"):
        guest.handed_over("--to", qemu(release))
        unharmed(console)


@pytest.mark.parametrize("release", ["10.0", "11.1"])
def test_aarch64_within_a_release(segue: Segue, place: Path, release: str) -> None:
    guest = segue.start("guest", arm(place, release))
    console = watch(guest, place)
    for _ in range(3):
        guest.handed_over("--force")
        unharmed(console)


def test_ovmf_keeps_its_variables(segue: Segue, place: Path) -> None:
    variables = place / "vars.fd"
    shutil.copyfile("/usr/share/OVMF/OVMF_VARS_4M.fd", variables)
    machine = (
        *("-M", "q35", "-m", "256", "-display", "none"),
        *("-drive", "if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd"),
        *("-drive", f"if=pflash,format=raw,file={variables}"),
    )
    guest = Linux(segue, place, "7.2", *machine)
    where = "/sys/firmware/efi/efivars"
    guest.command(f"mount -t efivarfs efivarfs {where}")
    for number, release in enumerate(ROUND):
        name = f"{where}/Segue{number}-5e90e000-7e57-4e57-9e57-5e9ec0ffee00"
        guest.command(f"printf '\\7\\0\\0\\0value-{number}' >{name}")
        guest.upgrade(release)
        assert f"value-{number}" in guest.command(f"tail -c +5 {name}")
    guest.finish()
    stored = variables.read_bytes()
    for number in range(len(ROUND)):
        assert f"Segue{number}".encode("utf-16-le") in stored
        assert b"value-%d" % number in stored


def test_huge_pages(huge_pages: int, segue: Segue, place: Path) -> None:
    """Where the host gives some, RAM on them stays in place; else QEMU's refusal is passed on."""
    argv = tiny(place, "7.2", "-object", "memory-backend-memfd,id=ram,size=64M,hugetlb=on")
    argv += ["-machine", "memory-backend=ram"]
    if huge_pages < 32:
        guest = segue.start("guest", argv, wait=False)
        assert guest.wait() == 1
        return
    guest = segue.start("guest", argv)
    console = watch(guest, place)
    for release in ROUND:
        guest.handed_over("--to", qemu(release))
        unharmed(console)
    assert guest.process is not None
    console.send(b"q")
    assert guest.wait() == 0
