"""A machine as a service of a real systemd, root's or a user's, through all of its life."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from segue.guest import Witness
from tests.qemu.conftest import tiny, unharmed
from tests.qemu.harness import LIMIT, Client, alive, kill_between_turns, qemu, wait_until
from tests.qemu.systemd import UID, USER, Systemd

pytestmark = [
    pytest.mark.long,  # not every container may mount what a systemd needs
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces take root"),
]


@pytest.fixture
def systemd(place: Path) -> Iterator[Systemd]:
    made = Systemd(place, {})
    yield made
    made.close()


class Unit:
    """segue@NAME.service of root's, or with `user` of somebody else's."""

    def __init__(self, systemd: Systemd, name: str, argv: list[str], user: bool = False) -> None:
        self.systemd = systemd
        self.name = name
        self.user = user
        config = Path(f"home/{USER}/.config" if user else "etc", "segue/machines")
        folder = systemd.root / config
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{argv[0]}\n  {shlex.join(argv[1:])}\n")
        if user:
            systemd.log_in()

    def systemctl(self, verb: str, *words: str) -> str:
        whose = ["--user"] if self.user else []
        return self.run("systemctl", *whose, verb, f"segue@{self.name}", *words)

    def run(self, *command: str) -> str:
        return self.systemd.run(*command, user=self.user)

    def show(self, name: str) -> str:
        return self.systemctl("show", "--value", "--property", name).strip()

    @property
    def supervisor(self) -> int:
        return self.systemd.outside(int(self.show("MainPID")))

    @property
    def state(self) -> tuple[str, str]:
        return self.show("ActiveState"), self.show("SubState")

    def was_restarted(self, times: str) -> bool:
        return self.show("NRestarts") == times

    def qemus(self) -> list[int]:
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            pid = int(entry.parent.name)
            if b"qemu-system" in entry.read_bytes() and self.systemd.is_ours(pid):
                found.append(pid)
        return found


@pytest.mark.parametrize("user", [False, True], ids=["root", "user"])
def test_a_machine_through_its_life(systemd: Systemd, place: Path, user: bool) -> None:
    if user:
        os.chown(place, UID, UID)
    unit = Unit(systemd, "demo", tiny(place, "7.2"), user)
    unit.systemctl("start")
    assert unit.state == ("active", "running")
    console = Client.unix(place / "console")
    console.witness = Witness()
    console.wait(lambda: console.witness and console.witness.ticks > 20, "the first ticks")
    [machine] = unit.qemus()
    assert Path(f"/proc/{machine}").stat().st_uid == (UID if user else 0)

    pid = unit.supervisor
    before = Path(f"/proc/{pid}/auxv").read_bytes()
    unit.systemctl("reload")
    assert unit.supervisor == pid
    assert Path(f"/proc/{pid}/auxv").read_bytes() != before, "nothing was executed"
    unharmed(console)

    kill_between_turns(pid)
    wait_until("another supervisor", lambda: unit.state == ("active", "running"))
    assert unit.show("NRestarts") == "1"
    assert unit.supervisor != pid
    assert unit.qemus() == [machine]
    unharmed(console)

    unit.run("segue", "upgrade", "demo", "--to", qemu("11.1"))
    assert not alive(machine)
    assert unit.state == ("active", "running")
    unharmed(console)

    # QEMU dies, and then both at once: its console's client sees the guest boot again.
    for restarts in ("2", "3"):
        [machine] = unit.qemus()
        if restarts == "3":
            os.kill(unit.supervisor, signal.SIGSTOP)
            os.kill(machine, signal.SIGKILL)
            os.kill(unit.supervisor, signal.SIGKILL)
        else:
            os.kill(machine, signal.SIGKILL)
        wait_until("the next machine", partial(unit.was_restarted, restarts))
        wait_until("its start", lambda: unit.state == ("active", "running"))
        assert unit.qemus() != [machine]
        console.witness = Witness()
        console.wait(lambda: console.witness and console.witness.ticks > 20, "a guest that boots")
        unharmed(console)

    # This guest knows no power button, so it is told to quit in the end.
    unit.systemctl("stop", "--no-block")
    wait_until("the end", lambda: unit.state == ("inactive", "dead"), 3 * LIMIT)
    assert unit.qemus() == []
    console.wait(lambda: console.closed, "the end of the console")
    console.close()
