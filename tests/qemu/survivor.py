"""The guest that faults happen to: a machine that is upgraded again and again, and checked."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from tests.qemu.conftest import migrates_as_ever, tiny, unharmed, watch
from tests.qemu.harness import Client, Machine, Qmp, Segue, cpu_ticks, qemu, wait_until

PHASES = ("prepare", "open", "hold", "move", "commit")
STARTED = ("open", "hold", "move", "commit")
"""Phases at whose beginning there is a successor."""


def limits(**seconds: float) -> dict[str, Any]:
    return {"x-limits": seconds}


class Survivor:
    def __init__(self, place: Path, *more: str, segue: Segue | None = None) -> None:
        self.place = place
        self.segue = segue or Segue(place / "run", {"SEGUE_TESTING": "1"})
        argv = tiny(place, "7.2", *more)
        self.machine: Machine = self.segue.start("survivor", argv)
        self.console: Client = watch(self.machine, place)
        self.qmp: Qmp = self.machine.qmp()
        # One client's commands are answered in their order: another one must say `continue`.
        self.other: Qmp = self.machine.qmp()

    def begin(self, phase: str | None = None, to: str = "10.0", **more: Any) -> Future[Any]:
        """Start an upgrade that stops at the beginning of `phase`."""
        self.qmp.events.clear()
        path = to if to.startswith("/") else qemu(to)
        arguments = {"to": path, "force": True, "timeout": 20, **more}
        if phase is not None:
            arguments["x-break"] = [phase]
        going = self.qmp.begin("segue-upgrade", arguments)
        if phase is not None:
            self.qmp.event(phase=phase, state="break")
        return going

    def go_on(self) -> None:
        self.other.command("x-segue-continue")

    def successor(self) -> int:
        """The pid of the QEMU that is not the incumbent."""
        return next(p for p in self.qemus() if p != self.machine.qemu_pid)

    def qemus(self) -> list[int]:
        assert self.machine.process is not None
        return [p for p in self.segue.processes() if p != self.machine.process.pid]

    def check(self, receipt: dict[str, Any], result: str, incumbent: int) -> None:
        assert receipt["result"] == result, receipt
        assert receipt["error"]["what"]
        assert receipt["guest"] == "running on the incumbent"
        assert self.qemus() == [incumbent]
        self.well()

    def well(self) -> None:
        unharmed(self.console)
        pid = self.machine.qemu_pid
        before = cpu_ticks(pid)
        wait_until("the guest using CPU time", lambda: cpu_ticks(pid) > before)
        migrates_as_ever(self.qmp)

    def upgrade_works(self) -> None:
        receipt = self.begin(to="10.0").result(60)
        assert receipt["result"] == "done", receipt
        self.well()

    def close(self) -> None:
        self.qmp.close()
        self.other.close()
