"""A real device given to the guest: only QEMU's own modes keep it, and only on KVM.

The guest writes and verifies blocks on an nvme that it has by vfio-pci, through every upgrade.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.qemu.harness import LIMIT, Client, Machine, Segue, cache, qemu
from tests.qemu.test_linux import _DISK, _NONCE, beats

NVME = "0000:00:08.0"


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
    words = "console=ttyS0 quiet segue.heartbeat=/dev/hvc0 segue.disk=/dev/nvme0n1"
    folder = cache() / "linux/full"
    return [
        qemu("11.1"),
        *("-accel", accelerator, "-M", "q35", "-m", "256", "-nodefaults", "-display", "none"),
        *("-kernel", str(folder / "vmlinuz"), "-initrd", str(folder / "initrd.img")),
        *("-append", f"{words} segue.disk-rate=50"),
        *("-device", f"vfio-pci,host={nvme}"),
        *("-serial", f"unix:{place}/console,server=on,wait=off"),
        *("-chardev", f"socket,id=beat,path={place}/beat,server=on,wait=off"),
        *("-device", "virtio-serial-pci", "-device", "virtconsole,chardev=beat"),
    ]


def goes_on(beat: Client) -> None:
    """More blocks are written and verified, and none was bad."""
    seen = len(beat.data)
    beat.expect(_DISK.pattern, seen)
    beat.expect(_DISK.pattern, len(beat.data))
    assert b"BAD" not in beat.data


def spoil(guest: Machine, phase: str) -> None:
    """A cpr-transfer whose successor is killed at the beginning of `phase`."""
    incumbent = guest.qemu_pid
    with guest.qmp() as qmp, guest.qmp() as other:
        arguments = {"mode": "cpr-transfer", "force": True, "x-break": [phase]}
        going = qmp.begin("segue-upgrade", arguments)
        qmp.event(phase=phase, state="break")
        ours = (guest.status()["supervisor_pid"], incumbent)
        (successor,) = (pid for pid in guest.segue.processes() if pid not in ours)
        os.kill(successor, signal.SIGKILL)
        other.command("x-segue-continue")
        receipt = going.result(LIMIT)
    assert receipt["result"] == "failed", receipt
    assert receipt["guest"] == "running on the incumbent"
    assert guest.qemu_pid == incumbent


def test_nvme_through_the_modes_that_keep_it(segue: Segue, place: Path, nvme: str) -> None:
    guest = segue.start("vfio", linux(place, nvme))
    beat = guest.connect(place / "beat")
    beat.expect(_DISK.pattern)

    pid = guest.qemu_pid
    for mode in ("handover", "migrate"):
        refused = guest.upgrade("--mode", mode, "--force", status=5)
        assert "VFIO" in refused["blockers"][0]["why"]
        assert "cpr-transfer" in refused["blockers"][0]["remedy"]
    assert guest.upgrade("--to", qemu("10.0"), status=5)["blockers"]
    assert "VFIO" in segue("suspend", "vfio", "--to", str(place / "suspended")).stderr
    assert guest.qemu_pid == pid

    receipt = guest.handed_over("--force")
    assert receipt["mode"] == "cpr-transfer"
    assert guest.qemu_pid != pid
    goes_on(beat)
    print("cpr-transfer", receipt["blackout_seconds"], receipt["phases"])

    assert guest.upgrade("--rehearse")["result"] == "rehearsed"
    goes_on(beat)
    for phase in ("open", "move", "commit"):
        spoil(guest, phase)
        goes_on(beat)

    pid = guest.qemu_pid
    receipt = guest.handed_over("--force", "--mode", "cpr-exec")
    assert guest.qemu_pid == pid
    goes_on(beat)
    print("cpr-exec", receipt["blackout_seconds"], receipt["phases"])

    numbers = beats(beat)
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert len(set(_NONCE.findall(bytes(beat.data)))) == 1


def test_without_kvm_it_is_refused(segue: Segue, place: Path, nvme: str) -> None:
    """QEMU 11.1 would crash, and the guest be lost."""
    guest = segue.start("vfio", [*linux(place, nvme, "tcg"), "-S"])
    for mode in ("auto", "cpr-transfer", "cpr-exec"):
        blockers = guest.upgrade("--mode", mode, "--force", status=5)["blockers"]
        assert any("vfio-pci" in blocker["what"] for blocker in blockers)
    refused = guest.upgrade("--mode", "cpr-transfer", "--force", status=5)
    assert any("KVM" in blocker["why"] for blocker in refused["blockers"])
