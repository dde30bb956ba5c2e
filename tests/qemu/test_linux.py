"""A real Linux guest: heartbeat, shell and disk go on through every release."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.guests.linux.verify_disk import verify
from tests.qemu.harness import Client, Segue, accelerator, cache, qemu

_BEAT = re.compile(rb"hb (\d+) \d+\r?\n")
_NONCE = re.compile(rb"nonce (\w+)\r?\n")
_DISK = re.compile(rb"disk /dev/vda (\d+) ok")


def linux(place: Path, release: str, image: Path) -> list[str]:
    words = (
        "console=ttyS0 quiet segue.heartbeat=/dev/hvc0 segue.disk=/dev/vda segue.disk-rate=200"
        " segue.shell=/dev/ttyS0"
    )
    return [
        qemu(release),
        *accelerator(),
        *("-M", "q35", "-m", "512", "-nodefaults", "-display", "none"),
        *("-kernel", str(cache() / "linux/vmlinuz"), "-initrd", str(cache() / "linux/initrd.img")),
        *("-append", words),
        *("-drive", f"file={image},if=virtio,format=qcow2"),
        *("-serial", f"unix:{place}/console,server=on,wait=off"),
        *("-chardev", f"socket,id=beat,path={place}/beat,server=on,wait=off"),
        *("-device", "virtio-serial-pci", "-device", "virtconsole,chardev=beat"),
    ]


def beats(client: Client) -> list[int]:
    return [int(n) for n in _BEAT.findall(bytes(client.data))]


def test_linux_through_every_release(segue: Segue, place: Path) -> None:
    image = place / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "64M"], check=True)
    guest = segue.start("linux", linux(place, "7.2", image))
    shell, beat = guest.connect(place / "console"), guest.connect(place / "beat")
    beat.expect(_DISK.pattern)
    for release in ("10.0", "11.1", "7.2"):
        receipt = guest.handed_over("--to", qemu(release))
        assert not any(kept.get("held") is False for kept in receipt["kept"])
        seen = len(beat.data)
        beat.expect(_DISK.pattern, seen)
        assert "still-here" in shell.command("echo still-here")
    written = int(_DISK.findall(bytes(beat.data))[-1])
    shell.send(b"poweroff -f\n")
    assert guest.wait() == 0
    numbers = beats(beat)
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert len(set(_NONCE.findall(bytes(beat.data)))) == 1
    assert b"BAD" not in beat.data
    raw = place / "disk.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)
    assert verify(raw, written).blocks >= written
