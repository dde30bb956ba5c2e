"""A Linux guest whose disks, heartbeat and shell are watched through whatever a test does.

Which machine it is, the test says; what holds for each of them is asserted here: no beat is
missing, the nonce is the same, each disk goes on and is read back after power-off by a reader
that shares no code with the guest.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.guests.linux.verify_disk import verify
from tests.qemu.harness import Client, Segue, cache, qemu

_BEAT = re.compile(rb"hb (\d+) \d+\r?\n")
_NONCE = re.compile(rb"nonce (\w+)\r?\n")
_CPUID = re.compile(r"^cpuid \d+ .*", re.MULTILINE)


@dataclass(frozen=True)
class Disk:
    """What the guest calls it, its image's format, and the words of a command line for it."""

    device: str
    format: str
    words: str
    """`{image}` stands for the image's path."""

    def image(self, place: Path) -> Path:
        return place / f"{self.device.rpartition('/')[2]}.{self.format}"


class Linux:
    """`ports`: pci or device, as this machine's virtio devices are called."""

    def __init__(
        self,
        segue: Segue,
        place: Path,
        release: str,
        *machine: str,
        disks: tuple[Disk, ...] = (),
        kernel: str = "linux",
        words: str = "",
        rate: int = 200,
        ports: str = "pci",
    ) -> None:
        self.segue, self.place, self.disks = segue, place, disks
        argv = [qemu(release), *machine, "-nodefaults"]
        for disk in disks:
            image = disk.image(place)
            create = ["qemu-img", "create", "-q", "-f", disk.format, str(image), "16M"]
            subprocess.run(create, check=True)
            argv += disk.words.format(image=image).split()
        devices = ",".join(disk.device for disk in disks)
        append = f"console=ttyS0 quiet segue.heartbeat=/dev/hvc0 segue.shell=/dev/ttyS0 {words}"
        if disks:
            append += f" segue.disk={devices} segue.disk-rate={rate}"
        argv += [
            *("-kernel", str(cache() / kernel / "vmlinuz"), "-append", append),
            *("-initrd", str(cache() / kernel / "initrd.img")),
            *("-serial", f"unix:{place}/console,server=on,wait=off"),
            *("-chardev", f"socket,id=beat,path={place}/beat,server=on,wait=off"),
            *("-device", f"virtio-serial-{ports}", "-device", "virtconsole,chardev=beat"),
        ]
        self.machine = segue.start("guest", argv)
        self.shell: Client = self.machine.connect(place / "console")
        self.beat: Client = self.machine.connect(place / "beat")
        self.go_on()
        self.shell.command("stty -echo; PS1=")

    def go_on(self) -> None:
        """It beats, and each disk acknowledges more blocks."""
        start = len(self.beat.data)
        self.beat.expect(rb"hb \d+ \d+\r?\n", start)
        for disk in self.disks:
            self.beat.expect(rb"disk %s \d+ ok" % disk.device.encode(), start)
        assert b"BAD" not in self.beat.data

    def upgrade(self, *releases: str) -> None:
        """One after the other; the guest goes on after each."""
        for release in releases:
            receipt = self.machine.handed_over("--to", qemu(release))
            assert not [kept for kept in receipt["kept"] if kept.get("held") is False]
            self.go_on()

    def command(self, line: str) -> str:
        return self.shell.command(line).replace("\r", "").lstrip("\n")

    def cpuid(self) -> list[str]:
        """Every leaf of each processor, as the guest reads it."""
        dump = self.command("guest cpuid")
        assert "cpuid end" in dump
        return _CPUID.findall(dump)

    def finish(self) -> None:
        """Power off; what it wrote is there."""
        self.shell.send(b"poweroff -f\n")
        assert self.machine.wait() == 0
        told = bytes(self.beat.data)
        # The disks first: lines that a host lost which hardly ran anything say nothing of them.
        assert len(set(_NONCE.findall(told))) == 1
        assert b"BAD" not in told
        for disk in self.disks:
            written = int(re.findall(rb"disk %s (\d+) ok" % disk.device.encode(), told)[-1])
            assert verify(self.raw(disk), written).newest + 1 >= written
        beats = [int(n) for n in _BEAT.findall(told)]
        gaps = [(a, b) for a, b in itertools.pairwise(beats) if b != a + 1]
        assert not gaps, gaps

    def raw(self, disk: Disk) -> Path:
        image = disk.image(self.place)
        if disk.format == "raw":
            return image
        subprocess.run(["qemu-img", "check", "-q", str(image)], check=True)
        raw = image.with_suffix(".read-back")
        subprocess.run(["qemu-img", "convert", "-O", "raw", str(image), str(raw)], check=True)
        return raw
