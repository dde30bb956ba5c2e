"""A supervisor that is killed, at any moment: the guest goes on, and another takes it up.

One guest goes through all of it. After each recovery: one QEMU, its ticks consecutive on a console
that stayed connected, and the next upgrade works.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from segue.guest import Witness
from segue.sealed import seal, unseal
from tests.qemu.conftest import migrates_as_ever, tiny, unharmed, watch
from tests.qemu.harness import (
    Client,
    Machine,
    Qmp,
    Segue,
    alive,
    command_of,
    kill_between_turns,
    qemu,
    wait_until,
)

ROUNDS = 60


class Orphan:
    """The machine whose supervisors die."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.segue = Segue(place / "run", {"SEGUE_TESTING": "1"})
        self.machine: Machine = self.segue.start(
            "orphan",
            tiny(
                place,
                "7.2",
                *("-qmp", f"unix:{place}/control,server=on,wait=off"),
                *("-device", "virtio-serial-pci"),
                *("-chardev", f"pty,id=p0,path={place}/pty"),
                *("-device", "virtconsole,chardev=p0"),
            ),
        )
        self.console: Client = watch(self.machine, place)

    @property
    def supervisor(self) -> int:
        return int(self.machine.status()["supervisor_pid"])

    @property
    def held(self) -> list[str]:
        """What instances hold for the supervisor."""
        text = (self.machine.directory / "machine.json").read_text()
        descriptors: dict[str, Any] = json.loads(text)["descriptors"]
        return [name for name, each in descriptors.items() if each["held"]]

    def kill(self) -> None:
        pid = self.supervisor
        kill_between_turns(pid)
        if self.machine.process is not None and self.machine.process.pid == pid:
            self.machine.process.wait()
        wait_until("the supervisor's death", lambda: not alive(pid))

    def recover(self, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = self.segue("recover", "orphan")
        assert done.returncode == status, done
        return done

    def upgrade_until(self, phase: str, to: str = "10.0") -> None:
        with self.machine.qmp() as qmp:
            arguments = {"to": qemu(to), "force": True, "x-break": [phase]}
            qmp.begin("segue-upgrade", arguments)
            qmp.event(phase=phase, state="break")
            # It is answered by nobody.
            qmp.abandon()

    def qemus(self) -> list[int]:
        return [pid for pid in self.segue.processes() if pid != self.supervisor]

    def last_receipt(self) -> dict[str, Any]:
        receipts: list[dict[str, Any]] = json.loads(
            self.segue("history", "orphan", "--json").stdout
        )
        return receipts[-1]


@pytest.fixture(scope="module")
def orphan() -> Iterator[Orphan]:
    place = Path(tempfile.mkdtemp(prefix="segue-"))
    orphan = Orphan(place)
    try:
        yield orphan
        orphan.machine.stop()
        wait_until("the end of all", lambda: not orphan.segue.leftovers())
    finally:
        orphan.segue.end()
        shutil.rmtree(place)


@pytest.fixture(autouse=True)
def well(orphan: Orphan) -> Iterator[None]:
    yield
    assert orphan.qemus() == [orphan.machine.qemu_pid]
    unharmed(orphan.console)
    with orphan.machine.qmp() as qmp:
        migrates_as_ever(qmp)
    orphan.machine.handed_over("--to", qemu("10.0"), "--force")
    assert orphan.qemus() == [orphan.machine.qemu_pid]
    unharmed(orphan.console)


def test_idle(orphan: Orphan) -> None:
    """Clients and listening sockets are where they were; one that waits meanwhile is served."""
    machine = orphan.machine
    before = machine.qemu_pid
    with machine.qmp() as qmp, Qmp(orphan.place / "control") as control:
        qmp.command("query-status")
        wait_until("both clients in QEMU's keeping", lambda: _clients(orphan.held) == 2)
        terminal = os.readlink(orphan.place / "pty")
        orphan.kill()
        assert json.loads(orphan.segue("ls", "--json").stdout)[0]["state"] == "orphaned"
        refused = orphan.segue("run", "--name", "orphan", "--", *tiny(orphan.place, "7.2"))
        assert refused.returncode == 5, refused
        assert "segue recover orphan" in refused.stderr
        early = socket.socket(socket.AF_UNIX)
        early.connect(str(machine.directory / "qmp.sock"))
        orphan.recover()
        assert early.recv(5) == b'{"QMP'[:5]
        early.close()
        assert machine.qemu_pid == before
        assert qmp.command("query-status")["status"] == "running"
        assert control.command("query-status")["status"] == "running"
        assert qmp.command("query-fdsets") == []
        assert os.readlink(orphan.place / "pty") == terminal
        assert os.path.exists(terminal)


def test_twice_in_a_row_and_reexec(orphan: Orphan) -> None:
    orphan.kill()
    orphan.recover()
    orphan.kill()
    orphan.recover()
    assert orphan.segue("reexec", "orphan").returncode == 0
    orphan.kill()
    orphan.recover()


def test_killed_before_it_has_told_anyone_that_it_is_there(orphan: Orphan) -> None:
    """What the first had given into QEMU's keeping stays there: the third takes it back."""
    orphan.kill()
    path = orphan.machine.directory / "machine.json"
    was = path.stat().st_ino
    command, environment = orphan.segue.command("recover", "orphan"), orphan.segue.environment
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as caller:
        children = Path(f"/proc/{caller.pid}/task/{caller.pid}/children")
        while path.stat().st_ino == was:
            assert caller.poll() is None
        second = int(children.read_text())
        kill_between_turns(second)
    wait_until("the second supervisor's death", lambda: not alive(second))
    orphan.recover()


def test_a_second_supervisor_is_refused(orphan: Orphan) -> None:
    done = orphan.recover(status=5)
    assert "has a supervisor" in done.stderr


@pytest.mark.parametrize("phase", ["prepare", "open", "hold", "move", "commit"])
def test_before_commit(orphan: Orphan, phase: str) -> None:
    before = orphan.machine.qemu_pid
    orphan.upgrade_until(phase)
    orphan.kill()
    orphan.recover()
    assert orphan.machine.qemu_pid == before
    if phase != "prepare":
        receipt = orphan.last_receipt()
        assert receipt["result"] == "failed"
        assert "was killed" in receipt["error"]["what"]


@pytest.mark.parametrize("phase", ["release", "retire"])
def test_after_commit(orphan: Orphan, phase: str) -> None:
    before = orphan.machine.qemu_pid
    orphan.upgrade_until(phase, "11.1")
    orphan.kill()
    orphan.recover()
    assert orphan.machine.qemu_pid != before
    assert not alive(before)
    assert orphan.last_receipt()["result"] == "done"
    assert orphan.machine.status()["qemu_version"].startswith("11.1")


def journal_says(orphan: Orphan, phase: str) -> None:
    path = orphan.machine.directory / "journal"
    record = unseal(path.read_bytes().rstrip())
    path.write_bytes(seal(record | {"phase": phase}).ljust(4096))


def successor(orphan: Orphan) -> int:
    journal = json.loads((orphan.machine.directory / "journal").read_text())
    return int(journal["successor"]["pid"])


def test_in_an_undo(orphan: Orphan) -> None:
    """The successor is dead, and the incumbent has not been told to go on."""
    before = orphan.machine.qemu_pid
    orphan.upgrade_until("commit")
    orphan.kill()
    doomed = successor(orphan)
    os.kill(doomed, signal.SIGKILL)
    wait_until("its death", lambda: not alive(doomed))
    journal_says(orphan, "undo")
    orphan.recover()
    assert orphan.machine.qemu_pid == before
    assert orphan.last_receipt()["result"] == "failed"


def test_cont_was_not_sent(orphan: Orphan) -> None:
    """Only the journal had been written: the successor says that the guest has not run on it."""
    before = orphan.machine.qemu_pid
    orphan.upgrade_until("commit")
    orphan.kill()
    journal_says(orphan, "commit")
    orphan.recover()
    assert orphan.machine.qemu_pid == before


def test_cont_was_not_answered(orphan: Orphan) -> None:
    """While the successor is silent nobody is touched; when it answers, it has won."""
    before = orphan.machine.qemu_pid
    with orphan.machine.qmp() as qmp, orphan.machine.qmp() as other:
        arguments = {"to": qemu("10.0"), "force": True, "x-break": ["commit"]}
        qmp.begin("segue-upgrade", arguments)
        qmp.event(phase="commit", state="break")
        pid = successor(orphan)
        os.kill(pid, signal.SIGSTOP)
        other.command("x-segue-continue")
        journal = orphan.machine.directory / "journal"
        wait_until("the commit point", lambda: '"phase": "commit"' in journal.read_text())
        qmp.abandon()
        other.abandon()
    orphan.kill()
    done = orphan.recover(status=8)
    assert "nobody can tell" in done.stderr
    assert alive(before)
    assert alive(pid)
    os.kill(pid, signal.SIGCONT)
    orphan.recover()
    assert orphan.machine.qemu_pid == pid
    assert not alive(before)


def test_a_journal_that_cannot_be_read(orphan: Orphan) -> None:
    """Whose the guest is it alone knows: both are left as they are."""
    before = orphan.machine.qemu_pid
    orphan.upgrade_until("move")
    other = successor(orphan)
    orphan.kill()
    path = orphan.machine.directory / "journal"
    whole = path.read_bytes()
    assert b'"phase": "open"' in whole
    path.write_bytes(whole.replace(b'"phase": "open"', b'"phase": "done"'))
    assert "cannot be read" in orphan.recover(status=5).stderr
    assert alive(before)
    assert alive(other)
    path.write_bytes(whole)
    orphan.recover()
    assert orphan.machine.qemu_pid == before


def test_a_process_number_that_is_another_s(orphan: Orphan) -> None:
    """What has the pid of a QEMU, but not its start time, is left alone."""
    bystander = subprocess.Popen(["sleep", "1000"])
    try:
        orphan.upgrade_until("open")
        orphan.kill()
        os.kill(successor(orphan), signal.SIGKILL)
        path = orphan.machine.directory / "journal"
        journal = unseal(path.read_bytes().rstrip())
        journal["successor"]["pid"] = bystander.pid
        path.write_bytes(seal(journal).ljust(4096))
        orphan.recover()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.long  # what it looks for is rare
def test_at_any_moment(orphan: Orphan) -> None:
    """No breakpoints, and no waiting for a turn to be over: what was on its way may be lost."""
    chance = random.Random(6)
    releases = itertools.cycle(("11.1", "10.0"))
    last = followed(orphan.console)
    for _ in range(ROUNDS):
        with orphan.machine.qmp() as qmp:
            qmp.begin("segue-upgrade", {"to": qemu(next(releases)), "force": True})
            time.sleep(chance.uniform(0, 0.5))
            pid = orphan.supervisor
            os.kill(pid, signal.SIGKILL)
            qmp.abandon()
        if orphan.machine.process is not None and orphan.machine.process.pid == pid:
            orphan.machine.process.wait()
        wait_until("the supervisor's death", partial(is_dead, pid))
        orphan.recover()
        others = set(orphan.qemus()) - {orphan.machine.qemu_pid}
        assert not others, [command_of(pid) for pid in others]
        now = followed(orphan.console)
        # It has neither begun anew nor gone back.
        assert now.nonce == last.nonce
        assert now.tick is not None and last.tick is not None and now.tick > last.tick
        last = now


def followed(console: Client) -> Witness:
    """What the guest says from now on, unharmed."""
    console.witness = witness = Witness()
    console.wait(lambda: witness.nonces, "the guest's nonce")
    unharmed(console)
    return witness


def is_dead(pid: int) -> bool:
    return not alive(pid)


def _clients(held: list[str]) -> int:
    return sum(name.startswith("client") for name in held)
