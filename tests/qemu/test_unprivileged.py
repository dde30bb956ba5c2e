"""Users without rights: what is theirs works as for root; what is not ends in a line and a hint."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from segue.guest import image
from tests.qemu.conftest import tiny, unharmed, watch
from tests.qemu.harness import no_descriptor_leak, qemu, wait_until
from tests.qemu.netns import HOST, Namespace, Ping
from tests.qemu.test_exit_codes import mistake, said
from tests.qemu.test_network import Guest, linux
from tests.qemu.unprivileged import STRANGER, USER, Users, UsersSegue, owned

IDLE = ("-display", "none", "-nodefaults", "-S")


@pytest.fixture(scope="module")
def users() -> Iterator[Users]:
    users = Users()
    for device in ("/dev/net/tun", "/dev/kvm"):
        if Path(device).exists():
            users.may_open(device)
    yield users
    users.close()


@pytest.fixture
def home(place: Path) -> Path:
    return owned(place, USER, 0o755)


@pytest.fixture
def segue(users: Users, home: Path) -> Iterator[UsersSegue]:
    """Of a user who is logged in, and has nothing but a directory for run-time files."""
    runtime = owned(home / "runtime", USER)
    segue = UsersSegue(users, USER, home, runtime / "segue", XDG_RUNTIME_DIR=str(runtime))
    segue.environment["HOME"] = "/nonexistent"
    try:
        yield segue
        for machine in segue.machines:
            machine.stop()
            machine.wait()
        left = [path for path in segue.leftovers() if path != str(segue.root)]
        assert not left, left
    finally:
        segue.end()


@pytest.fixture
def stranger(users: Users, home: Path, segue: UsersSegue) -> UsersSegue:
    """Of another such user, who looks where the first one's machines are."""
    place = owned(home / "stranger", STRANGER)
    return UsersSegue(users, STRANGER, place, segue.root, SEGUE_RUN_DIR=str(segue.root))


def test_a_whole_life(segue: UsersSegue, home: Path) -> None:
    disk = home / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "1M"], check=True)
    os.chown(disk, USER, USER)
    machine = segue.start("guest", tiny(home, "7.2", "-drive", f"file={disk},if=virtio"))
    console = watch(machine, home)
    assert owner(machine.qemu_pid) == USER
    for release in ("10.0", "11.1"):
        machine.handed_over("--to", qemu(release))
        unharmed(console)
    assert machine.upgrade("--to", qemu("7.2"), "--rehearse")["result"] == "rehearsed"
    said(segue("reexec", "guest"), 0)
    unharmed(console)
    assert machine.process is not None
    machine.process.kill()
    machine.process.wait()
    said(segue("upgrade", "guest"), 3, "segue recover guest")
    said(segue("recover", "guest"), 0)
    unharmed(console)
    assert not machine.handed_over("--to", qemu("10.0"))["warnings"]
    unharmed(console)
    assert owner(machine.qemu_pid) == USER
    said(segue("stop", "guest", "--timeout", "1"), 0)
    wait_until("the end of all", lambda: not segue.processes())


def owner(pid: int) -> int:
    return Path(f"/proc/{pid}").stat().st_uid


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    made = Namespace()
    yield made
    made.close()


def test_a_tap_that_root_has_made(segue: UsersSegue, home: Path, namespace: Namespace) -> None:
    namespace.run("ip", "tuntap", "add", "dev", "t0", "mode", "tap", "user", str(USER), "vnet_hdr")
    namespace.run("ip", "address", "add", f"{HOST}/24", "dev", "t0")
    namespace.run("ip", "link", "set", "t0", "up")
    tap = "tap,id=n0,ifname=t0,script=no,downscript=no"
    guest = Guest(segue, home, namespace, linux(home, "-nic", f"{tap},model=virtio-net-pci"))
    ping = Ping(namespace)
    for release in ("10.0", "11.1", "7.2"):
        ping.wait()
        receipt = guest.machine.handed_over("--to", qemu(release))
        assert all(kept["held"] for kept in receipt["kept"] if kept["kind"] == "tap")
    ping.wait()
    assert guest.machine.process is not None
    guest.machine.process.kill()
    guest.machine.process.wait()
    said(segue("recover", "net"), 0)
    ping.wait()
    guest.machine.handed_over("--to", qemu("10.0"))
    ping.wait()
    ping.end()
    assert not ping.doubled
    assert not ping.lost or len(ping.lost) <= guest.discarded(), ping.lost
    said(segue("stop", "net", "--timeout", "1"), 0)
    wait_until("the end of all", lambda: not segue.processes())


# What a user has no right to, and what says so: Segue, with a hint, where Segue opens it.
DENIED = "Permission denied"
BARRED: dict[str, tuple[Any, ...]] = {
    "-readconfig {home}/secret": (2, "secret", DENIED),
    "-chardev file,id=c,path={home}/closed/log -serial chardev:c": (1, "closed/log", DENIED),
    "-serial unix:{home}/closed/sock,server=on,wait=off": (1, "closed/sock", DENIED),
    "-serial pipe:{home}/secret": (1, "secret", DENIED),
    "-qmp unix:{home}/closed/sock,server=on,wait=off": (1, "closed/sock", DENIED),
    "-pidfile {home}/closed/pid": (1, "closed/pid", DENIED),
    "-netdev tap,id=n0,ifname=t0": (
        1,
        "/dev/net/tun (t0): Operation not permitted",
        "ip tuntap add",
    ),
}


@pytest.mark.parametrize("words", BARRED)
def test_what_segue_may_not_open(segue: UsersSegue, home: Path, words: str) -> None:
    bars(home)
    status, *what = BARRED[words]
    more = words.format(home=home).split()
    done = segue("run", "--name", "guest", "--", qemu("10.0"), *IDLE, *more)
    mistake(done, status, *what)
    assert not segue.processes()
    assert not (segue.root / "guest").exists()


@pytest.mark.parametrize(
    "words",
    [
        "-drive file={home}/secret,format=raw",
        "-blockdev raw,node-name=d0,file.driver=file,file.filename={home}/closed/disk",
        "-kernel {home}/secret",
    ],
)
def test_what_qemu_may_not_open(segue: UsersSegue, home: Path, words: str) -> None:
    """It says so itself; its exit status is ours, and nobody says it twice."""
    bars(home)
    more = words.format(home=home).split()
    done = segue("run", "--name", "guest", "--", qemu("10.0"), *IDLE, *more)
    said(done, 1, "Permission denied")
    its_own, ours = done.stderr.splitlines()
    assert not its_own.startswith("segue: ")
    assert ours.startswith("segue: guest: QEMU (pid ")
    assert ours.endswith("ended with exit status 1")
    mistake(segue("run", "--detach", "--", qemu("10.0"), *IDLE, *more), 1, "Permission denied")
    assert not segue.processes()
    assert os.listdir(segue.root) == []


def bars(home: Path) -> None:
    """A file and a folder of root's."""
    shutil.copy(image(), home / "secret")
    (home / "secret").chmod(0o600)
    (home / "closed").mkdir(mode=0o700)


def test_targets_that_may_not_be_run(segue: UsersSegue, home: Path) -> None:
    bars(home)
    target = home / "qemu"
    target.write_text(f'#!/bin/sh\nexec {qemu("10.0")} "$@"\n')
    target.chmod(0o744)
    mistake(segue("run", "--", str(target)), 5, str(target), "is not executable")
    mistake(segue("run", "--", f"{home}/closed/qemu"), 5, "closed/qemu")
    machine = segue.start("guest", tiny(home, "7.2"))
    console = watch(machine, home)
    for command in ("check", "upgrade"):
        for to, why in ((target, "is not executable"), (home / "closed/qemu", "you may not look")):
            said(segue(command, "guest", "--to", str(to)), 5, str(to), why)
    unharmed(console)
    target.chmod(0o755)
    machine.handed_over("--to", str(target))
    unharmed(console)


@pytest.fixture
def disk(home: Path) -> Path:
    disk = home / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    os.chown(disk, USER, USER)
    return disk


@pytest.mark.parametrize("mode", [0o644, 0o600])
def test_a_disk_that_was_taken_away(segue: UsersSegue, home: Path, disk: Path, mode: int) -> None:
    """The incumbent has it open, and could not open it again: not even to take it back."""
    machine = segue.start("guest", tiny(home, "7.2", "-drive", f"file={disk},format=raw"))
    console = watch(machine, home)
    pid = machine.qemu_pid
    assert machine.process is not None
    with no_descriptor_leak(machine.process.pid):
        os.chown(disk, 0, 0)
        disk.chmod(mode)
        for command in (("check",), ("upgrade",), ("suspend", "--to", str(home / "suspended"))):
            done = segue(command[0], "guest", *command[1:])
            assert done.returncode == 5, done
            assert f"disk image {disk}" in done.stdout + done.stderr
        assert machine.qemu_pid == pid
        unharmed(console)
    os.chown(disk, USER, USER)
    disk.chmod(0o600)
    machine.handed_over("--to", qemu("10.0"))
    unharmed(console)


@pytest.mark.parametrize(
    ("phase", "rehearse"), [("hold", False), ("commit", False), ("open", True)]
)
def test_a_disk_that_is_taken_away_meanwhile(
    segue: UsersSegue, home: Path, disk: Path, phase: str, rehearse: bool
) -> None:
    """Neither QEMU may open it. The guest is paused then, which is said, and goes on with it."""
    machine = segue.start("guest", tiny(home, "7.2", "-drive", f"file={disk},format=raw"))
    console = watch(machine, home)
    pid = machine.qemu_pid
    assert machine.process is not None
    with machine.qmp() as qmp, machine.qmp() as other:
        with no_descriptor_leak(machine.process.pid):
            arguments = {"to": qemu("10.0"), "x-break": [phase], "rehearse": rehearse}
            going = qmp.begin("segue-upgrade", arguments)
            qmp.event(phase=phase, state="break")
            os.chown(disk, 0, 0)
            other.command("x-segue-continue")
            receipt = going.result(60)
            assert receipt["result"] == "failed", receipt
            assert receipt["guest"] == "paused on the incumbent"
            assert str(disk) in receipt["error"]["what"]
            assert "segue qmp guest cont" in receipt["error"]["hint"]
            assert machine.qemu_pid == pid
            assert other.command("query-status")["status"] in ("paused", "postmigrate")
            with pytest.raises(Exception, match="Permission denied"):
                other.command("cont")
        os.chown(disk, USER, USER)
        said(segue("qmp", "guest", "cont"), 0)
    unharmed(console)
    machine.handed_over("--to", qemu("10.0"))
    unharmed(console)


def test_machines_of_others(segue: UsersSegue, stranger: UsersSegue, home: Path) -> None:
    machine = segue.start("guest", tiny(home, "10.0"))
    console = watch(machine, home)
    commands = ("show", "check", "upgrade", "stop", "history", "console", "recover", "reexec")
    # The folder of all machines is closed, and then it is not.
    for mode in (0o700, 0o755):
        segue.root.parent.chmod(mode)
        segue.root.chmod(mode)
        for command in commands if mode == 0o700 else ("show", "upgrade", "recover"):
            mistake(stranger(command, "guest"), 1, "Permission denied", "try as that user")
        mistake(stranger("qmp", "guest", "quit"), 1, "Permission denied", "try as that user")
        done = stranger("run", "--name", "guest", "--", qemu("10.0"))
        mistake(done, 1, "Permission denied", "SEGUE_RUN_DIR")
    assert stranger("ls", "--json").stdout == "[]\n"
    assert stranger("upgrade", "--all", "--to", qemu("11.1")).returncode == 0
    segue.root.chmod(0o700)
    mistake(stranger("ls"), 1, "cannot read", "Permission denied")
    unharmed(console)
    machine.handed_over("--to", qemu("11.1"))


def test_no_place_for_machines(users: Users, home: Path) -> None:
    """No login session; then one that names another user's place."""
    segue = UsersSegue(users, USER, home, home / "none")
    run = ("run", "--name", "guest", "--", qemu("10.0"))
    for command in (("ls",), ("show", "guest"), run):
        mistake(segue(*command), 2, "XDG_RUNTIME_DIR is not set", "SEGUE_RUN_DIR")
    theirs = owned(home / "theirs", STRANGER, 0o755)
    segue = UsersSegue(users, USER, home, theirs, XDG_RUNTIME_DIR=str(theirs))
    mistake(segue(*run), 1, "theirs", "Permission denied", "SEGUE_RUN_DIR")


def test_a_directory_that_others_can_write(users: Users, home: Path) -> None:
    """Who writes there owns the guest."""
    run = ("run", "--name", "guest", "--", qemu("10.0"))
    shared = home / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    segue = UsersSegue(users, USER, home, shared, SEGUE_RUN_DIR=str(shared))
    for owns, mode in ((STRANGER, 0o700), (STRANGER, 0o777), (USER, 0o770)):
        owned(shared / "guest", owns, mode)
        done = segue(*run)
        assert done.returncode in (1, 5)
        mistake(done, done.returncode, str(shared / "guest"))
    assert not segue.processes()
