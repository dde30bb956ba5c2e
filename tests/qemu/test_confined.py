"""A QEMU that gives up its root and its user once it is built goes on as such in each release."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.qemu.harness import Segue, qemu
from tests.qemu.plugged import Guest, disk

NOBODY = "65534"


def test_disks_of_one_that_can_open_nothing(segue: Segue, place: Path) -> None:
    """Neither root nor user has any of the images: not at the switch, not while it is paused."""
    root = place / "root"
    root.mkdir()
    images = [disk(place / f"{n}.qcow2", kind="qcow2") for n in range(3)]
    more = (
        *("-run-with", f"chroot={root},user=nobody"),
        *("-drive", f"if=none,id=a,file={images[0]},format=qcow2"),
        *("-device", "virtio-blk-pci,drive=a"),
        *("-blockdev", f"qcow2,node-name=b,file.driver=file,file.filename={images[1]}"),
        *("-device", "virtio-blk-pci,drive=b"),
        *("-object", "iothread,id=io"),
        *("-drive", f"if=none,id=c,file={images[2]},format=qcow2"),
        *("-device", "virtio-blk-pci,drive=c,iothread=io"),
    )
    with Guest(segue, place, "10.0", *more) as guest:
        for number, release in enumerate(("11.1", "7.2", "10.0")):
            for name in ("vda", "vdb", "vdc"):
                guest.write(f"{name} {number}", f"/dev/{name}")
            if number == 2:
                guest.qmp.command("stop")
            receipt = guest.machine.handed_over("--to", qemu(release))
            assert receipt["warnings"] == []
            process = Path(f"/proc/{guest.machine.qemu_pid}")
            assert os.readlink(process / "root") == str(root)
            uids = (process / "status").read_text().partition("Uid:")[2].splitlines()[0].split()
            assert uids == [NOBODY] * 4
            if number == 2:
                guest.machine.handed_over("--to", qemu("7.2"))
                guest.machine.handed_over("--to", qemu("11.1"))
                guest.qmp.command("cont")
            guest.run("echo 3 >/proc/sys/vm/drop_caches")
            for name in ("vda", "vdb", "vdc"):
                assert guest.run(f"head -n 1 /dev/{name}") == f"{name} {number}"
        why = guest.machine.upgrade("--to", qemu("11.1"), "--force", "--mode", "cpr-exec", status=5)
        assert any("chroot=" in blocker["why"] for blocker in why["blockers"])
        guest.beats()


@pytest.mark.parametrize(
    ("release", "words"),
    [
        ("7.2", ("-chroot", "{root}")),
        ("10.0", ("-run-with", "chroot={root}")),
        ("11.1", ("-run-with", "user=nobody")),
    ],
)
def test_what_is_added_later(
    segue: Segue, place: Path, release: str, words: tuple[str, ...]
) -> None:
    """What a successor could not have, or would take for something else, is refused by name."""
    root = place / "root"
    root.mkdir(mode=0o777)
    inside = disk(root / "late.raw")
    outside = disk(place / "late.raw")
    own_root = not words[1].startswith("user")
    options = [word.format(root=root) for word in words]
    with Guest(segue, place, release, *options) as guest:
        do = guest.qmp.command
        do("object-add", {"qom-type": "memory-backend-ram", "id": "memory", "size": 128 << 20})
        why = guest.refused(release)
        assert any("'memory'" in each and "/proc" in each for each in why), why
        do("object-del", {"id": "memory"})
        if own_root:
            file = {"driver": "file", "filename": "/late.raw"}
            do("blockdev-add", {"driver": "raw", "node-name": "late", "file": file})
            backend = {"type": "file", "data": {"out": "/log"}}
            do("chardev-add", {"id": "log", "backend": backend})
            secret = {"qom-type": "secret", "id": "word", "file": "/late.raw"}
            do("object-add", secret)
            why = guest.refused(release)
            for what in ("disk image /late.raw", "chardev 'log'", "object 'word'"):
                assert any(each.startswith(what) and "chroot=" in each for each in why), why
            do("blockdev-del", {"node-name": "late"})
            do("chardev-remove", {"id": "log"})
            do("object-del", {"id": "word"})
        guest.machine.handed_over("--to", qemu(release), "--force")
        assert guest.run("echo ali''ve") == "alive"
    assert inside.read_bytes() == outside.read_bytes()
