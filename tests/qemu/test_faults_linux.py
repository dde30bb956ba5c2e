"""A Linux guest that writes to a qcow2 disk goes through faults at each phase and loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

from tests.guests.linux.verify_disk import verify
from tests.qemu.harness import Segue, qemu
from tests.qemu.survivor import limits
from tests.qemu.test_linux import _DISK, _NONCE, beats, linux

FAULTS = (
    ("open", "successor", signal.SIGKILL),
    ("hold", "successor", signal.SIGSTOP),
    ("move", "successor", signal.SIGKILL),
    ("commit", "successor", signal.SIGKILL),
    ("commit", "successor", signal.SIGSTOP),
    ("hold", "incumbent", signal.SIGSTOP),
)


def test_a_disk_under_writes(segue: Segue, place: Path) -> None:
    image = place / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "64M"], check=True)
    subprocess.run(["qemu-img", "bitmap", "--add", image, "kept"], check=True)
    guest = segue.start("linux", linux(place, "7.2", image))
    shell, beat = guest.connect(place / "console"), guest.connect(place / "beat")
    beat.expect(_DISK.pattern)
    releases = ("10.0", "11.1", "7.2") * len(FAULTS)
    assert guest.process is not None
    with guest.qmp() as qmp, guest.qmp() as other:
        for (phase, whom, fault), release in zip(FAULTS, releases, strict=False):
            incumbent = guest.qemu_pid
            qmp.events.clear()
            arguments = {"to": qemu(release), "force": True, "x-break": [phase]}
            arguments |= limits(**{phase: 1, "hold": 1, "move": 1, "undo": 1})
            going = qmp.begin("segue-upgrade", arguments)
            qmp.event(phase=phase, state="break")
            pids = [p for p in segue.processes() if p != guest.process.pid]
            victim = incumbent if whom == "incumbent" else next(p for p in pids if p != incumbent)
            os.kill(victim, fault)
            other.command("x-segue-continue")
            receipt = going.result(60)
            assert receipt["result"] in ("failed", "timed-out", "lost"), receipt
            if whom == "incumbent":
                assert receipt["guest"].startswith("unknown")
                os.kill(incumbent, signal.SIGCONT)
                qmp.event(phase="undo", state="end")
            assert [p for p in segue.processes() if p != guest.process.pid] == [incumbent]
            seen = len(beat.data)
            beat.expect(_DISK.pattern, seen)
            guest.handed_over("--to", qemu(release), "--force")
        [device] = other.command("query-block")
        [bitmap] = device["inserted"]["dirty-bitmaps"]
        assert not bitmap.get("inconsistent"), bitmap
    seen = len(beat.data)
    beat.expect(_DISK.pattern, seen)
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
    info = subprocess.run(["qemu-img", "info", "--output=json", image], capture_output=True)
    [bitmap] = json.loads(info.stdout)["format-specific"]["data"]["bitmaps"]
    assert "in-use" not in bitmap["flags"]
