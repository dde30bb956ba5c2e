"""Machines under Segue: the embedded guest, started for this, or one of the user's own."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from segue import machines
from segue.bench import guest
from segue.bench.cases import Case, Load
from segue.bench.guest import Shell
from segue.bench.heartbeat import Heartbeat
from segue.bench.pings import Pings
from segue.bench.subject import Subject, Upgraded
from segue.errors import QemuError, Refused, SegueError, TimedOut
from segue.qemu.monitor import Monitor

# Until a guest that boots has beaten so often, it still has other things to do.
BOOTED = 3000
BOOT_LIMIT = 180.0
_ENDING = 30.0
# From `open` to `release` something is done to the guest.
_EXPOSED = ("open", "hold", "move", "commit")
_ERRORS = {"refused": Refused, "timed-out": TimedOut}


class Supervised(Subject):
    """A machine with a supervisor, asked over its QMP socket as any client would."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.binary = case.old
        self.machine: machines.MachineStatus
        self._monitor: Monitor | None = None

    @property
    def pid(self) -> int:
        assert self.machine.supervisor_pid is not None
        return self.machine.supervisor_pid

    @property
    def monitor(self) -> Monitor:
        assert self._monitor is not None, "attach() comes first"
        return self._monitor

    @property
    def supervisor(self) -> int | None:
        return self.pid

    async def attach(self, machine: machines.MachineStatus) -> None:
        self.machine = machine
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(machine.directory.qmp))
        self._monitor = await Monitor.connect(sock)

    async def upgrade(self, to: Path) -> Upgraded:
        receipt = await self._upgrade(to, self.case.way)
        phases = receipt["phases"]
        return Upgraded(
            receipt["from"]["version"],
            receipt["to"]["version"],
            receipt["blackout_seconds"],
            receipt["own_seconds"],
            sum(phases.get(name, 0.0) for name in _EXPOSED),
            receipt["bytes_moved"],
            [f"{lost['what']}: {lost['why']}" for lost in receipt["not_kept"]],
        )

    async def go_back(self, to: Path) -> None:
        await self._upgrade(to, "handover")

    async def _upgrade(self, to: Path, mode: str) -> dict[str, Any]:
        request = {"to": str(to), "force": True, "mode": mode}
        receipt: dict[str, Any] = await self.monitor.execute("segue-upgrade", request)
        if receipt["result"] != "done":
            reasons = [f"{b['what']}: {b['why']}" for b in receipt["blockers"]]
            error = receipt["error"] or {}
            what = "; ".join([error.get("what") or receipt["result"], *reasons])
            kind = _ERRORS.get(receipt["result"], SegueError)
            raise kind(what, error.get("hint"), receipt["guest"])
        self.binary = to
        return receipt


class OwnMachine(Supervised):
    """A machine that is there, and stays when the bench has ended.

    `beat` is the path of a socket on which its guest beats, if it does.
    """

    def __init__(self, case: Case, machine: machines.MachineStatus, beat: Path | None) -> None:
        super().__init__(case)
        self._found = machine
        self._beat = beat

    async def start(self) -> None:
        await self.attach(self._found)
        if self._beat is not None:
            self.heartbeat = Heartbeat()
            self.heartbeat.listen(_connected(self._beat))

    async def rest(self) -> None:
        """Its guest has its own work to do."""

    async def wake(self) -> None:
        """It never rested."""

    async def close(self) -> None:
        if self._monitor is not None:
            self._monitor.close()
        if self.heartbeat is not None:
            self.heartbeat.close()


class Embedded(Supervised):
    """The Linux guest, run for the bench in a run directory of its own."""

    def __init__(self, case: Case, place: Path, number: int) -> None:
        super().__init__(case)
        self._number = number
        self._name = f"bench-{number}"
        self._place = place / self._name
        self._shell: Shell | None = None

    async def start(self) -> None:
        self._place.mkdir()
        beat, shell = self._place / "beat", self._place / "shell"
        command = [
            *(
                str(self.case.old),
                "-M",
                "q35",
                *guest.machine(self.case, self._place, self._number),
            ),
            *("-chardev", f"socket,id=beat,path={beat},server=on,wait=off"),
            *("-chardev", f"socket,id=shell,path={shell},server=on,wait=off"),
        ]
        # A session of its own: a Ctrl-C is for us, who then end it.
        began = time.monotonic()
        starting = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "segue", "run", "--name", self._name, "--detach", "--"),
            *command,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            _, said = await starting.communicate()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                starting.send_signal(signal.SIGINT)
            await starting.wait()
            raise
        if starting.returncode:
            reason, *_ = said.decode(errors="replace").splitlines() or ["no reason was given"]
            raise SegueError(f"the guest could not be started: {reason.removeprefix('segue: ')}")
        self.ready = time.monotonic() - began
        await self.attach(machines.find(self._name))
        self._shell = Shell(_connected(shell))
        self.heartbeat = Heartbeat()
        self.heartbeat.listen(_connected(beat))
        await asyncio.to_thread(self.heartbeat.wait, BOOTED, BOOT_LIMIT)
        await guest.load_once(self.case, self._shell)
        if self.case.load is Load.NET:
            self.pings = Pings(guest.addresses(self._number)[1])

    async def rest(self) -> None:
        if self.pings is not None:
            await asyncio.to_thread(self.pings.end)
        await self.monitor.execute("stop")

    async def wake(self) -> None:
        assert self._shell is not None
        await self.monitor.execute("cont")
        await guest.load_again(self.case, self._shell)
        if self.pings is not None:
            self.pings.begin()

    async def close(self) -> None:
        with contextlib.suppress(SegueError):
            machine = machines.find(self._name)
            if self._monitor is None:
                await self.attach(machine)
            with contextlib.suppress(QemuError, TimeoutError):
                await self.monitor.execute("quit", timeout=_ENDING)
            self.monitor.close()
            await asyncio.to_thread(machines.wait_until_gone, machine, _ENDING)
        if self._shell is not None:
            self._shell.close()
        if self.heartbeat is not None:
            self.heartbeat.close()
        if self.pings is not None:
            self.pings.close()


def _connected(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(path))
    return sock
