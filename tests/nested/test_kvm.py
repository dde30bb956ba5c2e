"""What is KVM's own: the host's processor under the name `host`, and kvm-clock."""

from __future__ import annotations

import re
from pathlib import Path

from tests.qemu.harness import Client, Segue, cache, qemu

_CLOCK = "/sys/devices/system/clocksource/clocksource0/current_clocksource"


def linux(place: Path) -> list[str]:
    folder = cache() / "linux"
    return [
        qemu("7.2"),
        *("-accel", "kvm", "-cpu", "host", "-M", "q35", "-m", "256", "-nodefaults"),
        *("-display", "none", "-kernel", str(folder / "vmlinuz")),
        *("-initrd", str(folder / "initrd.img"), "-append", "console=ttyS0 quiet"),
        *("-serial", f"unix:{place}/console,server=on,wait=off"),
    ]


def cpuid(shell: Client) -> list[str]:
    dump = shell.command("guest cpuid")
    assert "cpuid end" in dump
    return [line for line in dump.splitlines() if re.match(r"cpuid \d", line)]


def test_the_hosts_processor_and_clock_through_every_release(segue: Segue, place: Path) -> None:
    guest = segue.start("kvm", linux(place))
    shell = guest.connect(place / "console")
    shell.expect(rb"# ")
    processor = cpuid(shell)
    assert processor
    assert "kvm-clock" in shell.command(f"cat {_CLOCK}")
    up = float(shell.command("cut -d' ' -f1 /proc/uptime").split()[-1])
    for release in ("10.0", "11.1"):
        guest.handed_over("--to", qemu(release))
        assert cpuid(shell) == processor
        assert "kvm-clock" in shell.command(f"cat {_CLOCK}")
        before, up = up, float(shell.command("cut -d' ' -f1 /proc/uptime").split()[-1])
        assert up > before
