"""What clients changed is part of the machine, whoever has looked after it since."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tty
from pathlib import Path
from typing import Any

from tests.qemu.harness import Client, Segue, alive, kill_between_turns, qemu, wait_until
from tests.qemu.plugged import ROUND, Guest, disk


def test_newer_code_and_another_supervisor_know_of_it(segue: Segue, place: Path) -> None:
    """A disk that was plugged in is there after a reexec and an upgrade, a kill and an upgrade."""
    with Guest(segue, place, "7.2") as guest:
        guest.plug_disk(disk(place / "hot.raw"), "hot", "disk9", "port2")
        guest.disk_ready("/dev/vda")
        guest.write("as it was", "/dev/vda")

        assert segue("reexec", "linux").returncode == 0
        guest.upgrade("10.0")
        assert guest.run("head -n 1 /dev/vda") == "as it was"

        pid = int(guest.machine.status()["supervisor_pid"])
        held = guest.machine.directory / "machine.json"
        wait_until("the client in QEMU's keeping", lambda: _keeps_clients(held))
        kill_between_turns(pid)
        assert guest.machine.process is not None
        guest.machine.process.wait()
        wait_until("the supervisor's death", lambda: not alive(pid))
        recovered = segue("recover", "linux")
        assert recovered.returncode == 0, recovered
        guest.upgrade("11.1")
        assert guest.run("head -n 1 /dev/vda") == "as it was"

        guest.device_gone("disk9")
        guest.qmp.command("blockdev-del", {"node-name": "hot"})
        assert segue("reexec", "linux").returncode == 0
        guest.upgrade("7.2")
        assert guest.qmp.command("query-named-block-nodes") == []
        guest.until("! test -b /dev/vda")
        guest.machine.stop()


def _keeps_clients(machine: Path) -> bool:
    """This test's own QMP client, and what is on the consoles."""
    found = json.loads(machine.read_text())["descriptors"].items()
    clients = [each["held"] for name, each in found if "client" in name or "end.socket" in name]
    return len(clients) == 3 and all(clients)


def test_a_throttle_group(segue: Segue, place: Path) -> None:
    with Guest(segue, place, "7.2") as guest:
        do = guest.qmp.command
        do("object-add", {"qom-type": "throttle-group", "id": "slow", "limits": {"iops-total": 90}})
        file = {"driver": "file", "filename": str(disk(place / "slow.raw"))}
        below = {"driver": "raw", "file": file}
        filter = {"driver": "throttle", "throttle-group": "slow", "file": below}
        do("blockdev-add", {**filter, "node-name": "limited"})
        arguments = {"driver": "virtio-blk-pci", "id": "disk", "drive": "limited", "bus": "port1"}
        do("device_add", arguments)
        guest.disk_ready("/dev/vda")
        guest.write("through a limit", "/dev/vda")
        for release in ROUND:
            guest.upgrade(release)
            limits = do("qom-get", {"path": "/objects/slow", "property": "limits"})
            assert limits["iops-total"] == 90
            nodes = {n["node-name"]: n["drv"] for n in do("query-named-block-nodes")}
            assert nodes["limited"] == "throttle"
            guest.run("echo 3 >/proc/sys/vm/drop_caches")
            assert guest.run("head -n 1 /dev/vda") == "through a limit"
            changed = {"iops-total": 90, "bps-write": 1 << 20}
            do("qom-set", {"path": "/objects/slow", "property": "limits", "value": changed})
        limits = do("qom-get", {"path": "/objects/slow", "property": "limits"})
        assert limits["bps-write"] == 1 << 20
        guest.beats()


def test_a_mirror_takes_the_place_of_its_source(segue: Segue, place: Path) -> None:
    with Guest(segue, place, "7.2") as guest:
        do = guest.qmp.command
        guest.plug_disk(disk(place / "old.raw"), "old", "disk", "port1")
        guest.disk_ready("/dev/vda")
        guest.write("copied", "/dev/vda")
        new = disk(place / "new.qcow2", kind="qcow2")
        file = {"driver": "file", "filename": str(new)}
        do("blockdev-add", {"driver": "qcow2", "node-name": "new", "file": file})
        mirror = {"device": "old", "target": "new", "sync": "full"}
        guest.job("blockdev-mirror", {"job-id": "pivot", **mirror}, "pivot")
        for number, release in enumerate(ROUND):
            guest.upgrade(release)
            assert [b["inserted"]["node-name"] for b in do("query-block")] == ["new"]
            guest.run("echo 3 >/proc/sys/vm/drop_caches")
            before = "copied" if number == 0 else f"after {ROUND[number - 1]}"
            assert guest.run("head -n 1 /dev/vda") == before
            guest.write(f"after {release}", "/dev/vda")
        guest.device_gone("disk")
        do("blockdev-del", {"node-name": "new"})
        read = ["qemu-img", "dd", "-O", "raw", f"if={new}", f"of={place}/read", "bs=512", "count=1"]
        subprocess.run(read, check=True)
        assert (place / "read").read_bytes().startswith(b"after 7.2\n")


def test_a_port_that_leads_elsewhere(segue: Segue, place: Path) -> None:
    """`chardev-change` under a running guest: what it says goes to the new place, for good."""
    port = (
        *("-chardev", f"file,id=port,path={place}/first"),
        *("-device", "virtconsole,chardev=port,nr=5"),
    )
    with Guest(segue, place, "7.2", *port) as guest:
        guest.until("test -c /dev/hvc1")
        guest.run("echo one >/dev/hvc1")
        wait_until("the first file", lambda: (place / "first").read_bytes() == b"one\r\n")
        data = {"out": f"{place}/second"}
        change = {"id": "port", "backend": {"type": "file", "data": data}}
        guest.qmp.command("chardev-change", change)
        said = b""
        for release in ROUND:
            guest.run(f"echo before {release} >/dev/hvc1")
            guest.upgrade(release)
            guest.run(f"echo after {release} >/dev/hvc1")
            said += f"before {release}\r\nafter {release}\r\n".encode()
            expected = said
            wait_until("what was said", lambda: (place / "second").read_bytes() == expected)  # noqa: B023
        assert (place / "first").read_bytes() == b"one\r\n"


def test_a_watchdog_does_what_was_set_on_another_qemu(segue: Segue, place: Path) -> None:
    """It is armed all the while; each time it fires on a QEMU that followed."""
    with Guest(segue, place, "7.2", "-device", "i6300esb,id=dog", full=True) as guest:
        do, events = guest.qmp.command, guest.qmp.events

        def fired(action: str) -> bool:
            told = [e["data"]["action"] for e in events if e["event"] == "WATCHDOG"]
            return told[-1:] == [action]

        def arm() -> None:
            guest.until("test -c /dev/watchdog")
            # Having fired it is off, of which the guest's kernel knows nothing: off and on.
            guest.run("killall watchdog")
            guest.until("! pidof watchdog")
            guest.run("watchdog -T 600 -t 1 /dev/watchdog")

        def starve() -> None:
            guest.run("killall -9 watchdog")
            guest.until("! pidof watchdog")
            guest.shell.send(b"watchdog -T 1 -t 9999 /dev/watchdog\n")

        arm()
        do("set-action", {"watchdog": "pause"})
        guest.upgrade("10.0")
        # Between comparison and stop: no `cont` of ours takes the place of its user's.
        going = guest.qmp.begin("segue-upgrade", {"to": qemu("11.1"), "x-break": ["hold"]})
        guest.qmp.event(phase="hold", state="break")
        starve()
        with guest.machine.qmp() as other:
            wait_until("the pause", lambda: other.command("query-status")["status"] == "watchdog")
            other.command("x-segue-continue")
        receipt = going.result(60)
        assert receipt["result"] == "failed", receipt
        assert "stopped by its watchdog" in receipt["error"]["what"]
        assert receipt["guest"] == "stopped on the incumbent"
        assert do("query-status")["status"] == "watchdog"
        assert fired("pause")
        receipt = guest.machine.upgrade("--to", qemu("11.1"), status=5)
        assert "state is watchdog" in receipt["error"]["what"]
        assert "`cont`" in receipt["error"]["hint"]
        do("cont")
        arm()
        assert guest.hmp("watchdog_action none") == ""
        guest.upgrade("11.1")
        starve()
        wait_until("its firing", lambda: fired("none"))
        arm()
        do("watchdog-set-action", {"action": "reset"})
        guest.upgrade("7.2")
        booted = guest.shell.data.count(b"BusyBox v")
        starve()
        wait_until("the reboot", lambda: guest.shell.data.count(b"BusyBox v") > booted)
        assert fired("reset")
        arm()
        do("set-action", {"watchdog": "poweroff"})
        guest.upgrade("10.0")
        starve()
        assert guest.machine.wait() == 0
        assert fired("poweroff")


def test_a_port_that_is_given_other_clients(segue: Segue, place: Path) -> None:
    """`chardev-change` to a socket, a pty, a file and back, each kept: no byte is lost."""
    port = ("-chardev", "null,id=port", "-device", "virtconsole,chardev=port,nr=5")
    with Guest(segue, place, "7.2", *port) as guest:
        guest.until("test -c /dev/hvc1")
        guest.run("exec 5<>/dev/hvc1; stty raw -echo <&5")

        def change(kind: str, data: dict[str, Any]) -> dict[str, Any]:
            # Said in the last moment, and so to whoever was there before.
            guest.run(f"echo before {kind} >&5")
            backend = {"type": kind, "data": data}
            answer: dict[str, Any] = guest.qmp.command(
                "chardev-change", {"id": "port", "backend": backend}
            )
            return answer

        def filename() -> str:
            told = {c["label"]: c["filename"] for c in guest.qmp.command("query-chardev")}
            assert "segue-monitor" not in told
            return str(told["port"])

        def through(client: Client, *releases: str) -> bytes:
            """It talks and listens through upgrades; what it was told is the whole of it."""
            said = b""
            # Whoever opens a pty is noticed a little later, with QEMU too.
            client.send(b"here\n")
            assert guest.run("head -n 1 <&5") == "here"
            for release in releases:
                guest.run(f"echo from {release} >&5")
                guest.upgrade(release)
                guest.run(f"echo to {release} >&5")
                client.send(f"in {release}\n".encode())
                assert guest.run("head -n 1 <&5") == f"in {release}"
                said += f"from {release}\nto {release}\n".encode()
            client.expect(re.escape(said) + b"$")
            return said

        def socket(name: str) -> Client:
            address = {"type": "unix", "data": {"path": str(place / name)}}
            change("socket", {"addr": address})
            assert filename() == f"disconnected:unix:{place / name},server=on"
            return guest.machine.connect(place / name)

        first = socket("first")
        said = through(first, "10.0", "11.1")
        assert filename() == f"unix:{place}/first,server=on"
        path = change("pty", {})["pty"]
        assert filename() == f"pty:{path}"
        wait_until("the end of the first", lambda: first.closed)
        assert bytes(first.data) == said + b"before pty\n"
        assert not (place / "first").exists()
        with Terminal(path) as terminal:
            said = through(terminal, "7.2", "10.0")
            change("file", {"out": str(place / "file")})
            wait_until("the end of the pty", lambda: terminal.closed)
            assert bytes(terminal.data) == said + b"before file\n"
        guest.upgrade("11.1")
        second = socket("second")
        assert (place / "file").read_bytes() == b"before socket\n"
        through(second, "7.2")


class Terminal(Client):
    """A pty's user as a client."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
        tty.setraw(self._fd)
        super().__init__(self)  # type: ignore[arg-type]

    def recv(self, size: int) -> bytes:
        return os.read(self._fd, size)

    def sendall(self, data: bytes) -> None:
        os.write(self._fd, data)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
