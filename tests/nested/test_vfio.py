"""A real device given to the guest: only QEMU's own modes keep it, and only on KVM.

The guest writes and verifies blocks on an nvme that it has by vfio-pci, through every upgrade.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.qemu.harness import Client, Segue, cache, qemu

NVME = "0000:00:08.0"
_WRITTEN = rb"disk /dev/nvme0n1 \d+ ok"
_BOOT = "/proc/sys/kernel/random/boot_id"


@pytest.fixture
def nvme() -> str:
    """The bed's nvme, which is nobody's yet, in the hands of vfio-pci."""
    device = Path("/sys/bus/pci/devices", NVME)
    if not (device / "driver").exists():
        (device / "driver_override").write_text("vfio-pci")
        Path("/sys/bus/pci/drivers_probe").write_text(NVME)
    assert (device / "driver").resolve().name == "vfio-pci"
    return NVME


def linux(place: Path, nvme: str, accelerator: str = "kvm") -> list[str]:
    # No heartbeat: a beat a millisecond is more than a guest in a guest of TCG can do.
    words = "console=ttyS0 quiet segue.report=/dev/hvc0 segue.disk=/dev/nvme0n1"
    folder = cache() / "linux/full"
    return [
        qemu("11.1"),
        *("-accel", accelerator, "-M", "q35", "-m", "256", "-nodefaults", "-display", "none"),
        *("-kernel", str(folder / "vmlinuz"), "-initrd", str(folder / "initrd.img")),
        *("-append", f"{words} segue.disk-rate=50"),
        *("-device", f"vfio-pci,host={nvme}"),
        *("-serial", f"unix:{place}/console,server=on,wait=off"),
        *("-chardev", f"socket,id=disk,path={place}/disk,server=on,wait=off"),
        *("-device", "virtio-serial-pci", "-device", "virtconsole,chardev=disk"),
    ]


def goes_on(disk: Client) -> None:
    """More blocks are written and verified, and none was bad."""
    for _ in range(2):
        disk.expect(_WRITTEN, len(disk.data))
    assert b"BAD" not in disk.data


def test_nvme_through_the_modes_that_keep_it(segue: Segue, place: Path, nvme: str) -> None:
    guest = segue.start("vfio", linux(place, nvme))
    shell, disk = guest.connect(place / "console"), guest.connect(place / "disk")
    shell.expect(rb"# ")
    boot = shell.command(f"cat {_BOOT}")
    disk.expect(_WRITTEN)

    pid = guest.qemu_pid
    for mode in ("auto", "handover", "migrate"):
        refused = guest.upgrade("--mode", mode, "--force", status=5)
        assert "VFIO" in refused["blockers"][0]["why"]
        assert "cpr-transfer" in refused["blockers"][0]["remedy"]
    assert guest.upgrade("--to", qemu("10.0"), status=5)["blockers"]
    assert "VFIO" in segue("suspend", "vfio", "--to", str(place / "suspended")).stderr
    assert guest.qemu_pid == pid

    guest.handed_over("--force", "--mode", "cpr-transfer")
    assert guest.qemu_pid != pid
    goes_on(disk)

    pid = guest.qemu_pid
    for mode in ("cpr-transfer", "cpr-exec"):
        refused = guest.upgrade("--mode", mode, "--rehearse", status=5)
        assert "rehearsed" in refused["error"]["what"]
    assert guest.qemu_pid == pid
    goes_on(disk)

    guest.handed_over("--force", "--mode", "cpr-exec")
    assert guest.qemu_pid == pid
    goes_on(disk)
    assert shell.command(f"cat {_BOOT}") == boot


def test_without_kvm_it_is_refused(segue: Segue, place: Path, nvme: str) -> None:
    """QEMU 11.1 would crash, and the guest be lost."""
    guest = segue.start("vfio", [*linux(place, nvme, "tcg"), "-S"])
    for mode in ("auto", "cpr-transfer", "cpr-exec"):
        blockers = guest.upgrade("--mode", mode, "--force", status=5)["blockers"]
        assert any("vfio-pci" in blocker["what"] for blocker in blockers)
    refused = guest.upgrade("--mode", "cpr-transfer", "--force", status=5)
    assert any("KVM" in blocker["why"] for blocker in refused["blockers"])
