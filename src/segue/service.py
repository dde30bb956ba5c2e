"""The `segue-*` commands of QMP: the one control protocol of a machine (docs/qmp.md)."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segue.errors import MonitorClosed, UsageError
from segue.qmp.server import Client, Command
from segue.reexec import reexec
from segue.upgrade import breakpoints
from segue.upgrade.modes import AUTO, MODES

if TYPE_CHECKING:
    from segue.supervisor import Supervisor

# segue-stop: how long a guest may take to power off, and QEMU to quit, in seconds.
POWERDOWN_LIMIT = 60.0
QUIT_LIMIT = 10.0


class Service:
    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def commands(self) -> dict[str, Command]:
        upgrade: dict[str, Any] = {
            "to": (str, False),
            "rehearse": (bool, False),
            "force": (bool, False),
            "timeout": (float, False),
            "mode": (str, False),
        }
        suspend: dict[str, Any] = {"to": (str, True)}
        testing = []
        if breakpoints.allowed():
            for command in (upgrade, suspend):
                command |= {"x-break": (list, False), "x-limits": (dict, False)}
            testing.append(Command("x-segue-continue", self.go_on, read_only=True))
        return {
            c.name: c
            for c in (
                *testing,
                Command("segue-query", self.query, read_only=True),
                Command(
                    "segue-check",
                    self.check,
                    {"to": (str, False), "mode": (str, False)},
                    read_only=True,
                ),
                Command("segue-upgrade", self.upgrade, upgrade),
                Command("segue-suspend", self.suspend, suspend),
                Command("segue-history", self.history, read_only=True),
                Command("segue-reexec", self.reexec, {"python": (str, False)}),
                Command("segue-stop", self.stop, {"timeout": (float, False)}),
            )
        }

    async def query(self, arguments: dict[str, Any], client: Client) -> dict[str, Any]:
        return self._supervisor.status()

    async def check(self, arguments: dict[str, Any], client: Client) -> dict[str, Any]:
        supervisor = self._supervisor
        to = arguments.get("to")
        plan = await supervisor.upgrader.check(Path(to) if to else None, _mode(arguments))
        running = supervisor.binary
        return {
            "from": {"path": str(running.path), "version": running.version_text},
            "to": {
                "path": str(plan.target.path),
                "version": plan.target.version_text,
                "build_id": plan.target.build_id,
            },
            "current": plan.current,
            "mode": plan.mode.name,
            "why": plan.why,
            "modes": {
                name: [blocker.to_json() for blocker in blockers]
                for name, blockers in plan.modes.items()
            },
            "blockers": [blocker.to_json() for blocker in plan.blockers],
            "not_kept": [note.to_json() for note in plan.notes],
            "notes": [],
        }

    async def upgrade(self, arguments: dict[str, Any], client: Client) -> dict[str, Any]:
        to = arguments.get("to")
        receipt = await self._supervisor.upgrader.upgrade(
            Path(to) if to else None,
            rehearse=arguments.get("rehearse", False),
            force=arguments.get("force", False),
            timeout=arguments.get("timeout"),
            progress=self._progress,
            mode=_mode(arguments),
            breaks=arguments.get("x-break", ()),
            limits=arguments.get("x-limits"),
        )
        return receipt.to_json()

    async def suspend(self, arguments: dict[str, Any], client: Client) -> dict[str, Any]:
        receipt = await self._supervisor.upgrader.suspend(
            Path(arguments["to"]),
            progress=self._progress,
            breaks=arguments.get("x-break", ()),
            limits=arguments.get("x-limits"),
        )
        return receipt.to_json()

    async def go_on(self, arguments: dict[str, Any], client: Client) -> dict[str, Any]:
        self._supervisor.upgrader.breakpoints.go_on()
        return {}

    async def history(self, arguments: dict[str, Any], client: Client) -> list[dict[str, Any]]:
        return list(self._supervisor.receipts)

    async def reexec(self, arguments: dict[str, Any], client: Client) -> dict[str, Any]:
        """It is the next process that answers, unless there is none."""
        await reexec(self._supervisor, client, arguments.get("python"))
        raise AssertionError("exec() returned")

    async def stop(self, arguments: dict[str, Any], client: Client) -> dict[str, Any]:
        """ACPI power-off, then `quit`, then SIGKILL, each with its time limit.

        An upgrade under way is called off first.
        """
        supervisor = self._supervisor
        powerdown = arguments.get("timeout", POWERDOWN_LIMIT)
        supervisor.upgrader.call_off()
        try:
            async with asyncio.timeout(powerdown):
                await supervisor.upgrader.finished()
        except TimeoutError:
            supervisor.upgrader.kill_both()
            await supervisor.upgrader.finished()
            return {"how": "kill"}
        instance = supervisor.instance
        for how, command, limit in (
            ("powerdown", "system_powerdown", powerdown),
            ("quit", "quit", QUIT_LIMIT),
        ):
            with contextlib.suppress(MonitorClosed, TimeoutError):
                async with asyncio.timeout(limit):
                    if how == "quit" or supervisor.state == "running":
                        await instance.monitor.execute(command)
                        await instance.wait()
            if not instance.running:
                return {"how": how}
        await instance.kill()
        return {"how": "kill"}

    def _progress(self, data: dict[str, Any]) -> None:
        self._supervisor.server.event("SEGUE_UPGRADE", data)


def _mode(arguments: dict[str, Any]) -> str:
    """Raises UsageError for a mode that there is not."""
    mode: str = arguments.get("mode", AUTO)
    if mode != AUTO and mode not in MODES:
        raise UsageError(f"there is no mode {mode!r}", hint=f"{AUTO}, {', '.join(MODES)}")
    return mode
