"""What clients and the guest itself do to drives, as the next QEMU and the guest see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.qemu.harness import Segue, wait_until
from tests.qemu.plugged import ROUND, Guest, disk

CDS = ("ide", "scsi")


def test_a_guest_ejects_its_cds(segue: Segue, place: Path) -> None:
    """The tray stays open, with the medium in it or without; a client puts in another."""
    media = [place / f"cd{n}" for n in range(2)]
    for medium in media:
        medium.write_bytes(medium.name.encode().ljust(1 << 20, b"."))
    more = (
        *("-drive", f"if=none,id=d,file={media[0]},format=raw,media=cdrom,readonly=on"),
        *("-device", "ide-cd,drive=d,id=ide"),
        *("-blockdev", f"raw,node-name=n,file.driver=file,file.filename={media[0]},read-only=on"),
        *("-device", "virtio-scsi-pci", "-device", "scsi-cd,drive=n,id=scsi"),
    )
    with Guest(segue, place, "7.2", *more, full=True) as guest:
        do = guest.qmp.command
        devices = ("/dev/sr0", "/dev/sr1")
        for device in devices:
            guest.disk_ready(device)

        def found() -> set[tuple[Any, ...]]:
            """What QEMU says of each drive."""
            return {
                (drive["tray_open"], Path(drive.get("inserted", {}).get("file", "")).name)
                for drive in do("query-block")
                if any(f"{cd}" in drive["qdev"].split("/") for cd in CDS)
            }

        def guest_finds(state: str) -> None:
            for device in devices:
                guest.until(f"guest cdrom {device} | grep -q 'cdrom {state}'")

        for device in devices:
            assert guest.run(f"guest eject {device}") == ""
        told = [e["data"] for e in guest.qmp.events if e["event"] == "DEVICE_TRAY_MOVED"]
        assert {(data["id"], data["tray-open"]) for data in told} == {(cd, True) for cd in CDS}
        for release in ROUND:
            guest.upgrade(release)
            assert found() == {(True, "cd0")}
            guest_finds("open")
        for cd in CDS:
            do("blockdev-change-medium", {"id": cd, "filename": str(media[1])})
        guest.upgrade("10.0")
        assert found() == {(False, "cd1")}
        for device in devices:
            guest.until(f"dd if={device} bs=2k count=1 2>/dev/null | grep -q cd1")
            guest.run(f"guest eject {device}")
        for cd in CDS:
            do("blockdev-remove-medium", {"id": cd})
        for release in ("11.1", "7.2"):
            guest.upgrade(release)
            assert found() == {(True, "")}
            guest_finds("open")
        for cd in CDS:
            do("blockdev-close-tray", {"id": cd})
        guest.upgrade("10.0")
        assert found() == {(False, "")}
        guest_finds("empty")
        guest.beats()


@pytest.mark.parametrize("how", ["block_set_io_throttle", "throttle-group"])
def test_limits_slow_the_guest_down(segue: Segue, place: Path, how: str) -> None:
    """One read a second: of 200 that the guest began with, before 2000 of another disk, each QEMU
    leaves some undone, until the limit is lifted."""
    more = (
        *("-drive", f"if=none,id=slow,file={disk(place / 'slow')},format=raw"),
        *("-blockdev", f"raw,node-name=below,file.driver=file,file.filename={disk(place / 'b')}"),
        *("-object", "throttle-group,id=group"),
        *("-blockdev", "throttle,throttle-group=group,node-name=limited,file=below"),
        *("-device", "virtio-blk-pci,drive=slow,id=first"),
        *("-device", "virtio-blk-pci,drive=limited,id=second"),
        *("-drive", f"if=none,id=fast,file={disk(place / 'fast')},format=raw"),
        *("-device", "virtio-blk-pci,drive=fast"),
    )
    limited = {"block_set_io_throttle": "/dev/vda", "throttle-group": "/dev/vdb"}[how]
    with Guest(segue, place, "7.2", *more) as guest:

        def limit(reads: int) -> None:
            if how == "throttle-group":
                path = {"path": "/objects/group", "property": "limits"}
                guest.qmp.command("qom-set", path | {"value": {"iops-total": reads}})
            else:
                none = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops_rd", "iops_wr"), 0)
                arguments = {"device": "slow", "iops": reads} | none
                guest.qmp.command("block_set_io_throttle", arguments)

        def read(device: str, count: int) -> str:
            return f"dd if={device} of=/dev/null bs=4k count={count} 2>/dev/null"

        for device in ("/dev/vda", "/dev/vdb", "/dev/vdc"):
            guest.disk_ready(device)
        # Each block is a request of its own.
        guest.run("for q in /sys/block/vd*/queue/read_ahead_kb; do echo 0 >$q; done")
        for release in ROUND:
            limit(1)
            guest.upgrade(release)
            guest.run("echo 3 >/proc/sys/vm/drop_caches")
            guest.run(f"rm -f /tmp/done; ({read(limited, 200)}; echo >/tmp/done) & true")
            guest.run(read("/dev/vdc", 2000))
            assert guest.run("ls /tmp") == ""
            limit(0)
            guest.until("test -e /tmp/done")
        wait_until("the end", lambda: guest.run("rm /tmp/done; ls /tmp") == "")
        # One that is queued in this moment is neither lost nor done twice.
        guest.run("echo 3 >/proc/sys/vm/drop_caches")
        limit(1)
        guest.run(f"({read(limited, 200)}; echo $? >/tmp/done) & true")
        guest.upgrade("10.0")
        guest.run(read("/dev/vdc", 2000))
        assert guest.run("ls /tmp") == ""
        limit(0)
        guest.until("test -s /tmp/done")
        assert guest.run("cat /tmp/done") == "0"
        guest.beats()
