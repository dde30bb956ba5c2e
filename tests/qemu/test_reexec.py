"""A supervisor that becomes newer code: nobody who has to do with the machine notices."""

from __future__ import annotations

import json
import os
import pty
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from qemu.qmp.qmp_client import ExecuteError

import segue as segue_package
from tests.qemu.conftest import tiny, unharmed, watch
from tests.qemu.harness import (
    Machine,
    Segue,
    descriptors,
    kill_between_turns,
    newer_python,
    qemu,
    wait_until,
)
from tests.qemu.test_lines import Terminal


def test_clients_and_guest_go_on(segue: Segue, place: Path) -> None:
    machine = segue.start("m", tiny(place, "7.2"))
    assert machine.process is not None
    console = watch(machine, place)
    with machine.qmp() as idle, machine.qmp() as asker:
        asker.command("segue-reexec")
        supervisor = machine.process.pid
        before = len(descriptors(supervisor))
        pid = machine.qemu_pid
        for _ in range(3):
            assert asker.command("segue-reexec")["pid"] == supervisor
            assert machine.qemu_pid == pid
            assert idle.command("query-status")["status"] == "running"
            unharmed(console)
        receipt = machine.handed_over("--to", qemu("10.0"))
        asker.command("segue-reexec")
        unharmed(console)
        assert [each["started"] for each in idle.command("segue-history")] == [receipt["started"]]
        assert idle.command("query-fdsets") == []
        # More for a moment, while QEMU is sent duplicates.
        wait_until("no descriptor more", lambda: len(descriptors(supervisor)) <= before)


def test_a_monitor_behind_the_terminal_goes_on(segue: Segue, place: Path) -> None:
    """`-nographic`: the terminal's own modes, the focus, and a half typed line."""
    argv = [a for a in tiny(place, "7.2") if a not in ("-display", "none", "-nodefaults")]
    argv = [*argv[: argv.index("-serial")], "-nographic"]
    terminal, slave = pty.openpty()
    usual = termios.tcgetattr(slave)
    machine = segue.start("m", argv, stdin=slave, stdout=slave, stderr=slave)
    user = Terminal(terminal)
    user.expect(rb"tick \d+")
    raw = termios.tcgetattr(slave)
    assert raw != usual
    user.type(b"\x01c")
    user.expect(rb"\(qemu\) ")
    user.type(b"info sta")
    user.expect(rb"info sta")
    assert segue("reexec", "m").returncode == 0
    user.type(b"tus\r")
    user.expect(rb"VM status: running")
    assert termios.tcgetattr(slave) == raw
    machine.handed_over("--to", qemu("10.0"))
    user.type(b"\x01c")
    user.expect(rb"tick \d+")
    user.type(b"\x01x")
    assert machine.wait() == 0
    assert termios.tcgetattr(slave) == usual
    os.close(slave)
    user.close()


def test_what_was_asked_is_answered_by_the_new_code(segue: Segue, place: Path) -> None:
    """Commands that wait at the gate, half a message, and one that is out-of-band."""
    machine = segue.start("m", tiny(place, "7.2"))
    other = socket.socket(socket.AF_UNIX)
    other.connect(str(machine.directory / "qmp.sock"))
    lines = other.makefile("rb")
    assert b"QMP" in lines.readline()
    other.sendall(b'{"execute": "qmp_capabilities"}\n')
    assert json.loads(lines.readline()) == {"return": {}}
    with machine.qmp() as qmp:
        for number in range(3):
            other.sendall(b'{"execute": "query-st')
            asked = qmp.begin("segue-reexec")
            asked.result(60)
            other.sendall(b'atus", "id": %d}\n' % number)
            answer = json.loads(lines.readline())
            assert answer["id"] == number
            assert answer["return"]["status"] == "running"
    lines.close()
    other.close()


def test_the_users_own_monitors_listen_on(segue: Segue, place: Path) -> None:
    """By the same sockets: who has connected and was not greeted yet is served by the new code."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    path = place / "monitor"
    monitors = [f"tcp:127.0.0.1:{address[1]}", f"unix:{path}"]
    argv = [word for each in monitors for word in ("-qmp", f"{each},server=on,wait=off")]
    machine = segue.start("m", [*tiny(place, "7.2"), *argv])

    def listening() -> list[str]:
        """Inodes."""
        port = f"0100007F:{address[1]:04X} 00000000:0000 0A"
        tcp = [row for row in Path("/proc/net/tcp").read_text().splitlines() if port in row]
        unix = Path("/proc/net/unix").read_text().splitlines()
        return [tcp[0].split()[9], *(row.split()[6] for row in unix if row.endswith(str(path)))]

    before = listening()
    with machine.qmp() as qmp:
        for _ in range(2):
            qmp.command("segue-reexec")
            assert listening() == before
        for family, where in ((socket.AF_INET, address), (socket.AF_UNIX, str(path))):
            with socket.socket(family) as client, client.makefile("rb") as lines:
                client.connect(where)
                assert b"QMP" in lines.readline()
        qmp.command("quit")
    assert machine.wait() == 0
    assert not path.exists()


def test_a_command_of_long_breath_is_named(segue: Segue, place: Path) -> None:
    machine = segue.start("m", tiny(place, "7.2"))
    with machine.qmp() as stopping, machine.qmp() as qmp:
        going = stopping.begin("segue-stop", {"timeout": 30})
        wait_until("the power button", lambda: any(e["event"] == "POWERDOWN" for e in qmp.events))
        with pytest.raises(ExecuteError, match="segue-stop"):
            qmp.command("segue-reexec")
        assert qmp.command("query-status")["status"] == "running"
        qmp.command("quit")
        going.result(60)
    assert machine.wait() == 0


def test_as_systemd_has_it(segue: Segue, place: Path) -> None:
    """From a file; told when it is up; SIGHUP reloads; killed and started again, it is the same."""
    notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notices.bind(str(place / "notify"))
    notices.settimeout(60)

    def ready() -> None:
        while notices.recv(4096) != b"READY=1":
            pass  # the descriptor store: test_store.py

    config = place / "config/segue/machines"
    config.mkdir(parents=True)
    argv = tiny(place, "7.2")
    (config / "served").write_text(f"# a machine\n{argv[0]}\n  {shlex.join(argv[1:])}\n")
    environment = {
        **segue.environment,
        "NOTIFY_SOCKET": str(place / "notify"),
        "SEGUE_CONFIG_DIR": str(config.parent),
    }
    command = [sys.executable, "-m", "segue", "service", "served"]
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        ready()
        machine = Machine(segue, "served", process)
        console = watch(machine, place)
        with machine.qmp() as qmp:
            process.send_signal(signal.SIGHUP)
            log = machine.directory / "qmp.log"
            wait_until("the new code", lambda: "is still there" in log.read_text())
            assert qmp.command("query-status")["status"] == "running"
        unharmed(console)
        kill_between_turns(process.pid)
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        ready()
        unharmed(console)
        segue("stop", "served", "--timeout", "1")
        assert process.wait(60) == 0
    console.close()
    notices.close()


def test_a_newer_python_and_back(segue: Segue, place: Path) -> None:
    source = Path(segue_package.__file__).parents[1]
    segue.environment["PYTHONPATH"] = os.fspath(source)
    machine = segue.start("m", tiny(place, "7.2"))
    assert machine.process is not None
    console = watch(machine, place)

    def runs_under(python: Path | str) -> None:
        """Its command line says so, behind a loader too."""
        assert machine.process is not None
        command = Path(f"/proc/{machine.process.pid}/cmdline").read_bytes().split(b"\0")
        assert os.fsencode(python) in command[:3]

    with machine.qmp() as qmp:
        for python in (newer_python(), sys.executable, newer_python()):
            done = segue("reexec", "m", "--python", os.fspath(python))
            assert done.returncode == 0, done
            runs_under(python)
            unharmed(console)
            assert qmp.command("query-status")["status"] == "running"
            machine.handed_over("--to", qemu("10.0"), "--force")
            unharmed(console)
        # It is the one that is kept from now on.
        assert segue("reexec", "m").returncode == 0
        runs_under(newer_python())
        unharmed(console)


_GARBAGE = "no program"
_NO_MODULE = "import sys; sys.modules['segue.supervisor'] = None"
_OTHER_FORM = "import segue.checkpoint; segue.checkpoint.VERSION += 1"


class NewCode:
    """An interpreter at a path of its own, whose Segue has something wrong with it."""

    def __init__(self, place: Path) -> None:
        self.path = place / "python"
        self._place = place

    def write(self, script: str) -> None:
        self.path.write_text(f"#!/bin/sh\n{script}\n")
        self.path.chmod(0o755)

    def spoil(self, when: str, fault: str) -> None:
        """Python runs `fault` first where it is asked ("ask") or has been executed ("restart")."""
        (self._place / "sitecustomize.py").write_text(f"{fault}\n")
        spoilt = f"export PYTHONPATH={shlex.quote(str(self._place))}"
        real = shlex.quote(sys.executable)
        self.write(f'case $SEGUE_CPR in {when}*) {spoilt};; esac\nexec {real} "$@"')

    def once(self, then: str) -> None:
        """It answers that it can, but then the file is another one."""
        self.write(f'{then}\nexec {shlex.quote(sys.executable)} "$@"')


def test_another_release_of_segue_and_back(segue: Segue, place: Path) -> None:
    """Its state has what this one does not know, and lacks what this one says: both ways."""
    source = Path(segue_package.__file__).parent
    other = place / "other/segue"
    shutil.copytree(source, other, ignore=shutil.ignore_patterns("__pycache__"))

    def change(name: str, old: str, new: str) -> None:
        text = (other / name).read_text()
        assert text.count(old) == 1, (name, old)
        (other / name).write_text(text.replace(old, new))

    change("__init__.py", segue_package.__version__, "77.0.0")
    change(
        "checkpoint.py",
        '"stored": supervisor',
        '"unheard-of": {"of": [1, 2]}, "unstored": supervisor',
    )
    change(
        "reexec.py",
        '@section("segue-machine", version=1)',
        '@section("segue-more", version=3, optional=True)\n'
        "@dataclass(frozen=True)\n"
        "class More:\n"
        "    notes: tuple[str, ...]\n\n\n"
        '@section("segue-machine", version=1)',
    )
    change("reexec.py", "    return State(\n", '    return State(\n        More(("a note",)),\n')
    change("reexec.py", "arrival.load(Machine)", "arrival.load(Machine, More)")

    new = NewCode(place)
    machine = segue.start("m", tiny(place, "7.2"))
    console = watch(machine, place)
    path = {"77.0.0": other.parent, segue_package.__version__: source.parent}
    with machine.qmp() as qmp:
        for version in ("77.0.0", "77.0.0", segue_package.__version__, "77.0.0"):
            new.once(f"export PYTHONPATH={shlex.quote(str(path[version]))}")
            answer = qmp.command("segue-reexec", {"python": os.fspath(new.path)})
            assert answer["segue"] == version
            unharmed(console)
            machine.handed_over("--to", qemu("10.0"), "--force")
            unharmed(console)
        # And where the one was killed, the other takes it up.
        assert machine.process is not None
        kill_between_turns(machine.process.pid)
        machine.process.wait()
        assert segue("recover", "m").returncode == 0
        unharmed(console)
        assert qmp.command("query-status")["status"] == "running"
    machine.stop()


_DIES = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
_DIES_LATER = f"""import segue.checkpoint
def recall(*_):
    {_DIES}
segue.checkpoint.recall = recall"""


@pytest.mark.parametrize("fault", [_DIES, _DIES_LATER], ids=["begin", "loading"])
def test_killed_while_it_becomes_newer_code(segue: Segue, place: Path, fault: str) -> None:
    machine = segue.start("m", tiny(place, "7.2"))
    assert machine.process is not None
    console = watch(machine, place)
    new = NewCode(place)
    new.spoil("restart", fault)
    with machine.qmp() as idle, machine.qmp() as asker:
        pid = machine.qemu_pid
        asker.begin("segue-reexec", {"python": os.fspath(new.path)})
        assert machine.wait() == -signal.SIGKILL
        asker.abandon()
        assert segue("recover", "m").returncode == 0
        assert machine.qemu_pid == pid
        unharmed(console)
        assert idle.command("query-status")["status"] == "running"
    machine.handed_over("--to", qemu("10.0"))
    unharmed(console)
    machine.stop()


def test_new_code_that_fails_at_any_point_leaves_the_old(segue: Segue, place: Path) -> None:
    machine = segue.start("m", tiny(place, "7.2"))
    assert machine.process is not None
    console = watch(machine, place)
    new = NewCode(place)
    (place / "garbage").write_text(_GARBAGE)
    with machine.qmp() as qmp:
        qmp.command("segue-reexec")
        before = descriptors(machine.process.pid)

        pid = machine.process.pid

        def refused(said: str) -> None:
            with pytest.raises(ExecuteError, match=said):
                qmp.command("segue-reexec", {"python": os.fspath(new.path)})
            unharmed(console)
            assert qmp.command("query-status")["status"] == "running"
            wait_until("no descriptor more", lambda: len(descriptors(pid)) <= len(before))

        # Asked.
        refused("cannot be started: .*No such file")
        new.path.write_text(_GARBAGE)
        refused("cannot be started: .*Permission denied")
        new.path.chmod(0o755)
        refused("cannot be started: .*Exec format error")
        new.write("exit 3")
        refused("ended without an answer")
        new.write("echo ModuleNotFoundError: No module named segue >&2; exit 1")
        refused("No module named segue")
        new.spoil("ask", _OTHER_FORM)
        refused("in another form than this one reads")
        # Executed.
        new.once('rm "$0"')
        refused("cannot be executed: .*No such file")
        new.once(f'cp {shlex.quote(str(place))}/garbage "$0"')
        refused("cannot be executed: .*Exec format error")
        # Executed, and on the way to being ready.
        new.spoil("restart", _NO_MODULE)
        refused("did not get ready: .*segue.supervisor")
        new.spoil("restart", _OTHER_FORM)
        refused("did not get ready: .*in another form")
        receipt = machine.handed_over("--to", qemu("10.0"))
        assert receipt["result"] == "done"
        new.once("true")
        qmp.command("segue-reexec", {"python": os.fspath(new.path)})
    unharmed(console)
