"""Run directories: who owns a name, what is left when an owner dies, and what others see."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from segue import machines
from segue.errors import NoSuchMachine, NotRunning, Refused, SegueError, UsageError
from segue.machines import MachineDirectory, find, list_machines, process_start_time
from tests.unit.fake_supervisor import dead_process, status


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEGUE_RUN_DIR", str(tmp_path / "r"))
    return tmp_path / "r"


@pytest.fixture
def other_owner(root: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that owns the machine `web`."""
    code = (
        "import sys; from segue.machines import MachineDirectory as M; M.create('web');"
        "print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


@pytest.mark.parametrize("name", ["a", "web", "web-1.x_Y", "_", "9", "a" * 64])
def test_a_good_name_is_taken(name: str) -> None:
    assert machines.check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".a", "-a", "a/b", "/a", "a b", "ä", "a\n", "a\0", "a" * 65]
)
def test_a_bad_name_is_refused_with_the_rule(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        MachineDirectory.create(name)
    assert caught.value.hint is not None and "64" in caught.value.hint


def test_root_and_others_have_different_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEGUE_RUN_DIR")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert machines.run_root() == Path("/run/segue")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert machines.run_root() == Path("/run/user/1000/segue")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with pytest.raises(UsageError, match="XDG_RUNTIME_DIR") as caught:
        machines.run_root()
    assert caught.value.hint


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["qemu", "-name", "web"], "web"),
        (["qemu", "--name", "guest=web,process=x"], "web"),
        (["qemu", "-name", "web,debug-threads=on"], "web"),
        (["qemu", "-name", "debug-threads=on,guest=web"], "web"),
        (["qemu", "-name", "guest=a,,b c"], "a-b-c"),
        (["qemu", "-name", "one", "-name", "process=p", "-name", "guest=two"], "two"),
        (["qemu", "-name", "../../etc"], "etc"),
        (["qemu", "-name", "x" * 80], "x" * 64),
    ],
)
def test_the_guests_own_name_is_the_default(argv: list[str], name: str) -> None:
    assert machines.default_name(argv) == name


@pytest.mark.parametrize("argv", [["qemu"], ["qemu", "-name"], ["qemu", "-name", "process=p"]])
def test_a_guest_without_a_name_gets_one_that_is_free(argv: list[str], root: Path) -> None:
    first = machines.default_name(argv)
    assert first == f"qemu-{os.getpid()}"
    (root / first).mkdir(parents=True)
    assert machines.default_name(argv) == f"{first}-2"


def test_the_directory_is_its_owners_alone(root: Path) -> None:
    directory = MachineDirectory.create("web")
    assert directory.path == root / "web"
    assert directory.path.stat().st_mode & 0o777 == 0o700
    assert directory.lock_descriptor is not None
    assert not os.get_inheritable(directory.lock_descriptor)
    with open(directory.lock) as again, pytest.raises(BlockingIOError):
        fcntl.flock(again, fcntl.LOCK_SH | fcntl.LOCK_NB)
    directory.remove()
    assert not directory.path.exists()
    MachineDirectory.create("web").remove()


def test_a_name_in_use_is_refused_and_says_by_whom(other_owner: subprocess.Popen[bytes]) -> None:
    with pytest.raises(Refused, match=f"already running .supervisor pid {other_owner.pid}") as e:
        MachineDirectory.create("web")
    assert e.value.hint is not None and "segue stop web" in e.value.hint


def test_who_has_a_supervisor_needs_no_other(other_owner: subprocess.Popen[bytes]) -> None:
    with pytest.raises(Refused, match=f"has a supervisor .pid {other_owner.pid}") as caught:
        MachineDirectory.take_over("web")
    assert caught.value.hint == "there is nothing to recover"


def test_what_a_killed_owner_left_is_cleared_away(
    other_owner: subprocess.Popen[bytes], root: Path
) -> None:
    pid, start_time = dead_process()
    (root / "web" / "qmp.sock").touch()
    (root / "web" / "old").mkdir()
    (root / "web" / "old" / "file").touch()
    (root / "web" / "status.json").write_text(
        json.dumps(status("web", qemu_pid=pid, qemu_start_time=start_time))
    )
    other_owner.kill()
    other_owner.wait()
    directory = MachineDirectory.create("web")
    assert [entry.name for entry in directory.path.iterdir()] == ["lock"]
    assert directory.owner() == (os.getpid(), process_start_time(os.getpid()))
    directory.remove()


def test_a_qemu_that_outlived_its_supervisor_keeps_its_name(
    other_owner: subprocess.Popen[bytes], root: Path
) -> None:
    report = status(
        "web",
        supervisor_pid=other_owner.pid,
        supervisor_start_time=process_start_time(other_owner.pid),
    )
    (root / "web" / "status.json").write_text(json.dumps(report))
    other_owner.kill()
    other_owner.wait()
    assert [machine.state for machine in list_machines()] == ["orphaned"]
    with pytest.raises(Refused, match="still runs") as caught:
        MachineDirectory.create("web")
    assert caught.value.hint == "take it up again with: segue recover web"
    assert (root / "web" / "status.json").exists(), "a refusal must not touch what it found"
    with pytest.raises(NotRunning, match="has died"):
        find("web")


def test_a_directory_of_doubtful_ownership_is_refused(root: Path) -> None:
    (root / "web").mkdir(parents=True)
    (root / "web").chmod(0o777)
    with pytest.raises(Refused, match="not only yours"):
        MachineDirectory.create("web")


def test_a_symbolic_link_in_place_of_the_lock_is_not_followed(root: Path, tmp_path: Path) -> None:
    (root / "web").mkdir(parents=True, mode=0o700)
    (tmp_path / "precious").write_text("data")
    (root / "web" / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(SegueError, match="cannot use"):
        MachineDirectory.create("web")
    assert (tmp_path / "precious").read_text() == "data"


def test_a_path_too_long_for_sockets_is_said_up_front(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = machines.SOCKET_PATH_LIMIT - len(str(root)) - 2 - machines.SOCKET_NAME_LIMIT
    longest = str(root) + "x" * (room - 1)
    monkeypatch.setenv("SEGUE_RUN_DIR", longest)
    MachineDirectory.create("w").remove()
    monkeypatch.setenv("SEGUE_RUN_DIR", longest + "x")
    with pytest.raises(UsageError, match="too long by 1 bytes") as caught:
        MachineDirectory.create("w")
    assert caught.value.hint is not None and "SEGUE_RUN_DIR" in caught.value.hint
    assert not Path(longest + "x").exists()


def test_a_place_that_cannot_be_used_is_an_error_with_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SEGUE_RUN_DIR", str(tmp_path / "file"))
    with pytest.raises(SegueError, match="cannot use") as caught:
        MachineDirectory.create("web")
    assert caught.value.hint


def test_of_many_that_want_a_name_one_gets_it(root: Path) -> None:
    code = (
        "import sys; from segue.machines import MachineDirectory as M; from segue.errors import *\n"
        "sys.stdin.readline()\n"
        "try: M.create('web')\n"
        "except Refused: print('refused')\n"
        "else: print('mine')\n"
        "sys.stdout.flush(); sys.stdin.readline()\n"
    )
    pipes = subprocess.PIPE
    many = [
        subprocess.Popen([sys.executable, "-c", code], stdin=pipes, stdout=pipes) for _ in range(6)
    ]
    try:
        for process in many:
            assert process.stdin is not None
            process.stdin.write(b"go\n")
            process.stdin.flush()
        answers = []
        for process in many:
            assert process.stdout is not None
            answers.append(process.stdout.readline())
        assert sorted(answers) == [b"mine\n"] + [b"refused\n"] * 5
    finally:
        for process in many:
            process.communicate(b"end\n")


def test_a_lock_that_its_owner_removed_meanwhile_owns_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    last = MachineDirectory.create("web")
    real = fcntl.flock

    def flock(fd: int, operation: int) -> None:
        if last.path.exists() and last.lock_descriptor is not None:
            last.remove()
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    directory = MachineDirectory.create("web")
    assert directory.lock_descriptor is not None
    assert directory.lock.stat().st_ino == os.fstat(directory.lock_descriptor).st_ino
    directory.remove()


def test_a_status_is_replaced_as_a_whole() -> None:
    directory = MachineDirectory.create("web")
    assert directory.read_status() == {}
    assert directory.write_status({"state": "running", "long": "x" * 10000})
    with open(directory.status) as before:
        assert directory.write_status({"state": "paused"})
        assert json.load(before)["state"] == "running"
    assert directory.read_status() == {"state": "paused"}
    directory.remove()


def test_a_full_disk_has_room_for_the_status_that_is_there() -> None:
    directory = MachineDirectory.create("web")
    directory.write_status({"state": "running"})
    (directory.path / "status.json.new").symlink_to("/dev/full")
    assert directory.write_status({"state": "paused"})
    assert directory.read_status() == {"state": "paused"}
    directory.remove()


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"state"'])
def test_a_torn_status_is_no_status(text: str) -> None:
    directory = MachineDirectory.create("web")
    directory.status.write_text(text)
    assert directory.read_status() == {}
    assert [machine.state for machine in list_machines()] == ["starting"]
    directory.remove()


def test_receipts_come_in_order_and_a_torn_one_is_left_out() -> None:
    directory = MachineDirectory.create("web")
    assert directory.read_receipts() == []
    directory.receipts.write_text('{"n": 1}\n{"n": 2}\n{"n": ')
    assert directory.read_receipts() == [{"n": 1}, {"n": 2}]
    directory.remove()


def test_a_listing_tells_the_living_from_the_dead(root: Path) -> None:
    live = MachineDirectory.create("live")
    live.write_status(status("live", state="paused"))
    starting = MachineDirectory.create("starting")
    pid, start_time = dead_process()
    for name, supervisor in (("dead", (pid, start_time)), ("reused", (os.getpid(), 1))):
        (root / name).mkdir()
        report = status(name, qemu_pid=pid, qemu_start_time=start_time)
        report["supervisor_pid"], report["supervisor_start_time"] = supervisor
        (root / name / "status.json").write_text(json.dumps(report))
    (root / "empty").mkdir()
    (root / ".hidden").mkdir()
    (root / "file").touch()
    assert {machine.name: machine.state for machine in list_machines()} == {
        "dead": "dead",
        "empty": "dead",
        "live": "paused",
        "reused": "dead",
        "starting": "starting",
    }
    assert find("live").running
    with pytest.raises(NotRunning):
        find("reused")
    live.remove()
    starting.remove()


def test_no_machines_at_all() -> None:
    assert list_machines() == []


def test_a_mistyped_name_is_recognised(root: Path) -> None:
    (root / "webserver").mkdir(parents=True)
    with pytest.raises(NoSuchMachine) as caught:
        find("websrever")
    assert caught.value.hint == "did you mean webserver?"
    with pytest.raises(NoSuchMachine) as caught:
        find("xyz")
    assert caught.value.hint == "segue ls shows the machines"


def test_start_times_of_odd_processes(tmp_path: Path) -> None:
    name = tmp_path / "a) R (b"
    name.write_bytes(Path("/bin/cat").read_bytes())
    name.chmod(0o700)
    with subprocess.Popen([name], stdin=subprocess.PIPE) as process:
        start_time = process_start_time(process.pid)
        ticks = os.sysconf("SC_CLK_TCK")
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        assert start_time is not None and 0 <= uptime - start_time / ticks < 60
        assert machines.is_alive(process.pid, start_time)
        assert not machines.is_alive(process.pid, start_time + 1)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert process_start_time(process.pid) is None, "a zombie counts as dead"
    assert process_start_time(process.pid) is None
    for nobody in (None, 0, -1, "1"):
        assert not machines.is_alive(nobody, None)


def test_waiting_for_an_end(other_owner: subprocess.Popen[bytes]) -> None:
    machine = find("web")
    assert not machines.wait_until_gone(machine, timeout=0)
    shutil.rmtree(machine.directory.path)
    assert not machines.wait_until_gone(machine, timeout=0), "it still runs without its directory"
    other_owner.kill()
    assert machines.wait_until_gone(machine, timeout=30)
    other_owner.wait()
    assert machines.wait_until_gone(machine, timeout=30)


def test_a_hundred_machines_are_listed_without_asking_any(root: Path) -> None:
    for number in range(100):
        (root / f"m{number:02}").mkdir(parents=True)
        (root / f"m{number:02}" / "status.json").write_text(json.dumps(status(f"m{number:02}")))
    assert len(list_machines()) == 100
