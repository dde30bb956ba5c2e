"""A Linux guest through every mode and through a directory: no beat lost, the disk verified."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.guests.linux.verify_disk import verify
from tests.qemu.harness import Machine, Segue, alive, qemu, wait_until
from tests.qemu.test_linux import _DISK, _NONCE, beats, linux


def test_linux_through_every_mode(segue: Segue, place: Path) -> None:
    image = place / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "64M"], check=True)
    # Video memory, so that there is something which only QEMU's own CPR keeps or copies.
    guest = segue.start("guest", [*linux(place, "11.1", image), "-vga", "std"])
    shell, beat = guest.connect(place / "console"), guest.connect(place / "beat")
    beat.expect(_DISK.pattern)
    for mode in ("cpr-transfer", "cpr-exec", "migrate", "handover", "cpr-exec", "cpr-transfer"):
        pid = guest.qemu_pid
        receipt = guest.handed_over("--to", qemu("11.1"), "--mode", mode, "--force")
        assert not any(kept.get("held") is False for kept in receipt["kept"])
        assert not receipt["warnings"]
        assert alive(pid) == (mode == "cpr-exec")
        beat.expect(_DISK.pattern, len(beat.data))
        assert "still-here" in shell.command("echo still-here")
    directory = place / "suspended"
    done = segue("suspend", "guest", "--to", str(directory))
    assert done.returncode == 0, done.stderr
    assert guest.wait() == 0
    beat.wait(lambda: beat.closed, "the end of the machine")
    again = _resume(segue, directory)
    shell, after = again.connect(place / "console"), again.connect(place / "beat")
    after.expect(_DISK.pattern)
    written = int(_DISK.findall(bytes(after.data))[-1])
    shell.send(b"poweroff -f\n")
    assert again.wait() == 0
    numbers = beats(beat)
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    # Nobody was connected for a moment after the resuming: what was said then is gone.
    later = beats(after)
    assert later == list(range(later[0], later[0] + len(later)))
    assert later[0] > numbers[-1]
    assert len(set(_NONCE.findall(bytes(beat.data + after.data)))) == 1
    assert b"BAD" not in beat.data + after.data
    raw = place / "disk.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)
    assert verify(raw, written).blocks >= written


def _resume(segue: Segue, directory: Path) -> Machine:
    process = subprocess.Popen(
        [sys.executable, "-m", "segue", "resume", str(directory), "--to", qemu("11.1")],
        env=segue.environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    machine = Machine(segue, "guest", process)
    segue.machines.append(machine)
    status = segue.root / "guest/status.json"
    wait_until("the resuming", lambda: status.exists() or process.poll() is not None)
    assert process.poll() is None
    return machine
