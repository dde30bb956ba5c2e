"""Options about a machine's beginning mean what they mean under QEMU, upgrades later too."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from segue.guest import image
from tests.qemu.conftest import tiny, unharmed, watch
from tests.qemu.harness import Client, Machine, Segue, alive, qemu, wait_until

CONFIG = """
[machine]
  type = "q35"
[memory]
  size = "64M"
[chardev "c"]
  backend = "socket"
  path = "{place}/console"
  server = "on"
  wait = "off"
[device "serial"]
  driver = "isa-serial"
  chardev = "c"
"""


def test_a_configuration_file_that_is_gone(segue: Segue, place: Path) -> None:
    (place / "vm.cfg").write_text(CONFIG.format(place=place).lstrip())
    argv = [qemu("7.2"), "-readconfig", str(place / "vm.cfg"), "-nodefaults", "-display", "none"]
    guest = segue.start("guest", [*argv, "-kernel", str(image())])
    (place / "vm.cfg").unlink()
    console = watch(guest, place)
    for release in ("10.0", "11.1", "7.2"):
        guest.handed_over("--to", qemu(release))
        unharmed(console)


def test_options_that_are_called_otherwise_today(segue: Segue, place: Path) -> None:
    """libvirt gave QEMU 7.2 the first two; 10.0 knows none of them by that name."""
    guest = segue.start("guest", tiny(place, "7.2", "-no-hpet", "-no-acpi", "-async-teardown"))
    console = watch(guest, place)
    for release in ("10.0", "11.1", "7.2"):
        guest.handed_over("--to", qemu(release))
        unharmed(console)
        with guest.qmp() as qmp:
            for name in ("hpet", "acpi"):
                wanted = {"path": "/machine", "property": name}
                assert qmp.command("qom-get", wanted) == ("off" if name == "acpi" else False)


def test_names(segue: Segue, place: Path) -> None:
    argv = tiny(place, "7.2", "-name", "guest=blue,process=segue-blue")
    guest = segue.start("guest", argv)
    console = watch(guest, place)
    for release in ("10.0", "7.2"):
        assert Path(f"/proc/{guest.qemu_pid}/comm").read_text() == "segue-blue\n"
        with guest.qmp() as qmp:
            assert qmp.command("query-name") == {"name": "blue"}
        guest.handed_over("--to", qemu(release))
        unharmed(console)


def test_a_daemon_with_a_pid_file(segue: Segue, place: Path) -> None:
    """The file names the process that a signal ends the machine by, and goes with it."""
    file = place / "pid"
    argv = tiny(place, "7.2", "-daemonize", "-pidfile", str(file))
    done = segue("run", "--name", "guest", "--", *argv)
    assert done.returncode == 0, done.stderr
    guest = Machine(segue, "guest", None)
    segue.machines.append(guest)
    console = watch(guest, place)
    pid = int(file.read_text())
    for release in ("10.0", "7.2"):
        guest.handed_over("--to", qemu(release))
        unharmed(console)
        assert int(file.read_text()) == pid
    os.kill(pid, signal.SIGTERM)
    console.wait(lambda: console.closed, "the end of the console")
    wait_until("the end of the daemon", lambda: not alive(pid))
    assert not file.exists()


def test_whom_systemd_watches_does_not_leave(segue: Segue, place: Path) -> None:
    """-daemonize, in the file of a machine that `segue service` starts."""
    folder = place / "config/machines"
    folder.mkdir(parents=True)
    (folder / "guest").write_text(shlex.join(tiny(place, "7.2", "-daemonize")))
    process = subprocess.Popen(
        [sys.executable, "-m", "segue", "service", "guest"],
        env=segue.environment | {"SEGUE_CONFIG_DIR": str(folder.parent)},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    guest = Machine(segue, "guest", process)
    segue.machines.append(guest)
    status = segue.root / "guest/status.json"
    wait_until("the start", lambda: status.exists() or process.poll() is not None)
    unharmed(watch(guest, place))
    assert guest.status()["supervisor_pid"] == process.pid
    assert segue("stop", "guest", "--timeout", "1").returncode == 0
    assert process.wait(60) == 0


def test_a_guest_that_waits_for_cont_does_so_once(segue: Segue, place: Path) -> None:
    guest = segue.start("guest", tiny(place, "7.2", "-S"))
    guest.handed_over("--to", qemu("10.0"))
    with guest.qmp() as qmp:
        assert not qmp.command("query-status")["running"]
        qmp.command("cont")
    console = watch(guest, place)
    guest.handed_over("--to", qemu("11.1"))
    unharmed(console)


def test_a_snapshot_is_loaded_once(segue: Segue, place: Path) -> None:
    disk = place / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "1M"], check=True)
    argv = tiny(place, "7.2", "-drive", f"file={disk},if=virtio,format=qcow2")
    first = segue.start("first", argv)
    before = nonce(watch(first, place))
    with first.qmp() as qmp:
        qmp.command("human-monitor-command", {"command-line": "savevm s"})
    first.stop()
    first.wait()
    second = segue.start("second", [*argv, "-loadvm", "s"])
    console = watch(second, place)
    for release in ("10.0", "11.1", "7.2"):
        second.handed_over("--to", qemu(release))
        unharmed(console)
    assert nonce(console) == before


def nonce(console: Client) -> str:
    """What the guest drew when it booted."""
    witness = console.witness
    assert witness is not None
    console.wait(lambda: witness.nonce, "the nonce")
    return str(witness.nonce)


@pytest.mark.parametrize(
    ("chardev", "said"),
    [
        ("socket,id=c,host=127.0.0.1,port=0,server=on,wait=off,websocket=on", "websocket"),
        ("socket,id=c,host=127.0.0.1,port=0,server=on,wait=off,tn3270=on", "tn3270"),
        ("socket,id=c,host=127.0.0.1,port=0,server=on,wait=off,tls-creds=t", "TLS"),
    ],
)
def test_connections_that_are_not_kept_say_so(
    segue: Segue, place: Path, chardev: str, said: str
) -> None:
    (place / "keys.psk").write_text("user:00112233445566778899aabbccddeeff\n")
    tls = f"tls-creds-psk,id=t,dir={place},endpoint=server"
    argv = tiny(place, "7.2", "-object", tls, "-chardev", chardev, "-device", "virtio-serial-pci")
    guest = segue.start("guest", [*argv, "-device", "virtconsole,chardev=c"])
    receipt = guest.upgrade("--to", qemu("10.0"), status=5)
    (blocker,) = receipt["blockers"]
    assert said in blocker["why"]
    assert blocker["remedy"]


def test_a_ring_buffer_is_told_to_be_lost(segue: Segue, place: Path) -> None:
    argv = tiny(place, "7.2", "-chardev", "ringbuf,id=ring", "-device", "isa-debugcon,chardev=ring")
    guest = segue.start("guest", argv)
    receipt = guest.handed_over("--to", qemu("10.0"))
    assert [note for note in receipt["not_kept"] if "'ring'" in note["what"]]
