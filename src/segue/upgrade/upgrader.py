"""Upgrades of one machine: one at a time, each with its receipt."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from segue.errors import GuestLost, Refused, SegueError, TimedOut, advice
from segue.kept.base import Lending
from segue.kept.description import Description
from segue.qemu.binary import Binary
from segue.qemu.instance import Instance
from segue.qemu.monitor import Event
from segue.qmp.gate import Gate
from segue.upgrade import access, devices, interrupts, modes
from segue.upgrade import plan as planning
from segue.upgrade.breakpoints import Breakpoints
from segue.upgrade.handover import Handover, called_off
from segue.upgrade.journal import Journal
from segue.upgrade.modes import AUTO, MODES, Mode
from segue.upgrade.phases import OPEN, PLAN
from segue.upgrade.plan import Plan
from segue.upgrade.receipt import CURRENT, DONE, FAILED, LOST, REFUSED, REHEARSED, Receipt, Side
from segue.upgrade.surroundings import Surroundings
from segue.upgrade.suspend import Suspend

Progress = Callable[[dict[str, Any]], None]

# Of an upgrade's own doing, as a stop in its course is: clients see SEGUE_UPGRADE instead.
_MIGRATION = frozenset({"MIGRATION", "MIGRATION_PASS"})


class Host(Protocol):
    """What an upgrade needs of the supervisor."""

    machine: Description
    binary: Binary
    instance: Instance
    journal: Journal
    gate: Gate
    receipts: deque[dict[str, Any]]

    @property
    def name(self) -> str: ...
    @property
    def run_directory(self) -> Path: ...

    def spawn(self, lending: Lending) -> Instance: ...
    def launch(
        self,
        lending: Lending,
        argv: list[str],
        ends: tuple[socket.socket, socket.socket],
        command: list[str],
        environment: dict[str, str],
    ) -> Instance: ...
    def to_suspend(self) -> dict[str, Any]: ...
    def adopt(self, instance: Instance) -> None: ...
    async def safeguard(self, successor: Instance | None) -> None: ...
    def serve(self, instance: Instance, told: Sequence[Event] = ()) -> None: ...
    def suppress(self, events: Collection[str]) -> None: ...
    def tell(self, events: Sequence[Event]) -> None: ...
    def is_outdated(self) -> bool: ...
    def upgraded(self, binary: Binary) -> None: ...
    def record(self, receipt: dict[str, Any]) -> None: ...
    def end(self, status: int) -> None: ...
    async def refresh(self) -> None: ...


class Upgrader:
    """At most one upgrade is under way."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.number = 1
        self._task: asyncio.Task[Receipt] | None = None
        self._begun = False
        self._handover: Handover | None = None
        self._limits: Mapping[str, float] = {}
        self.breakpoints = Breakpoints()

    def next_number(self) -> int:
        """For the next instance; they count from 1."""
        self.number += 1
        return self.number

    @property
    def busy(self) -> bool:
        return self._task is not None

    async def check(self, to: Path | None, mode: str = AUTO) -> Plan:
        """Judge a target. Raises Refused if it is not a QEMU that answers."""
        host = self._host
        return await planning.make(
            host.machine,
            host.instance,
            host.binary,
            to or host.binary.path,
            host.is_outdated(),
            mode,
        )

    async def upgrade(
        self,
        to: Path | None,
        *,
        rehearse: bool,
        force: bool,
        timeout: float | None,
        progress: Progress,
        mode: str = AUTO,
        breaks: Collection[str] = (),
        limits: Mapping[str, float] | None = None,
    ) -> Receipt:
        """Carry out one upgrade; a second one meanwhile is refused. It outlives its caller.

        `breaks` and `limits` are for tests (see breakpoints.py).
        """
        host = self._host
        receipt = Receipt(
            machine=host.name, started=time.time(), source=_side(host.binary, host.instance.pid)
        )
        if self._task is not None:
            receipt.failed(_busy())
            return receipt
        self.breakpoints = Breakpoints(breaks, progress)
        self._limits = limits or {}
        limbo = asyncio.get_running_loop().create_future()
        return await self._carried_out(
            receipt,
            self._run(
                receipt, to or host.binary.path, mode, rehearse, force, timeout, progress, limbo
            ),
            limbo,
        )

    async def suspend(
        self,
        to: Path,
        *,
        progress: Progress,
        breaks: Collection[str] = (),
        limits: Mapping[str, float] | None = None,
    ) -> Receipt:
        """Put the machine into a directory; afterwards it has ended. As `upgrade` otherwise."""
        host = self._host
        source = _side(host.binary, host.instance.pid)
        receipt = Receipt(machine=host.name, started=time.time(), source=source, mode="suspend")
        if self._task is not None:
            receipt.failed(_busy())
            return receipt
        self.breakpoints = Breakpoints(breaks, progress)
        self._limits = limits or {}
        limbo = asyncio.get_running_loop().create_future()
        return await self._carried_out(receipt, self._suspend(receipt, to, progress, limbo), limbo)

    async def _carried_out(
        self, receipt: Receipt, work: Awaitable[None], limbo: asyncio.Future[Receipt]
    ) -> Receipt:
        """The receipt of a transaction at its end, or what can be said when it is in limbo."""
        self._begun = False
        self._task = asyncio.ensure_future(self._recorded(receipt, work))
        await asyncio.wait((self._task, limbo), return_when=asyncio.FIRST_COMPLETED)
        if limbo.done():
            return limbo.result()
        limbo.cancel()
        return receipt

    async def _suspend(
        self, receipt: Receipt, to: Path, progress: Progress, limbo: asyncio.Future[Receipt]
    ) -> None:
        host = self._host
        loses_interrupts = await interrupts.can_be_lost(host.instance, host.binary)
        blockers = [
            *host.machine.draft.blockers,
            *modes.without_vfio(devices.vfio(await devices.types(host.instance.monitor))),
            *await planning.incumbent_blockers(host.instance),
            *await access.blockers(host.instance, host.machine.draft.command_line),
            *await host.machine.survey(host.instance.monitor),
            *host.machine.changes.against_suspend(),
            *await interrupts.blockers(host.instance, host.binary),
        ]
        if blockers:
            receipt.failed(
                Refused(
                    "this machine cannot be suspended",
                    hint="see the blockers; nothing was touched",
                    blockers=tuple(blockers),
                )
            )
            return
        for kept in host.machine.kept:
            await kept.quiet()
        suspend = Suspend(
            incumbent=host.instance,
            target=host.binary.target,
            surroundings=self._surroundings(
                lambda back: Lending(0, host.binary),
                receipt,
                progress,
                limbo,
                "",
            ),
            receipt=receipt,
            limits=self._limits,
            to=to,
            loses_interrupts=loses_interrupts,
            machine=host.to_suspend() | {"loses_interrupts": loses_interrupts},
        )
        self._handover = suspend
        await suspend.run()

    def call_off(self) -> None:
        """Undo an upgrade that has not reached its commit point."""
        if self._task is None:
            return
        if self._handover is not None:
            self._handover.call_off(self._task)
        elif self._begun:
            self._task.cancel()
        else:
            # Of a task that is cancelled before its first step nothing at all is done.
            asyncio.get_running_loop().call_soon(self.call_off)

    def kill_both(self) -> None:
        """The end of an upgrade that waits for a QEMU which does not answer, and of the guest."""
        if self._handover is not None:
            for instance in (self._handover.successor, self._handover.incumbent):
                if instance is not None:
                    instance.signal(signal.SIGKILL)

    async def finished(self) -> None:
        """Wait until no upgrade is under way."""
        while self._task is not None:
            await asyncio.wait((self._task,))

    async def _recorded(self, receipt: Receipt, work: Awaitable[None]) -> Receipt:
        """Do the work of one transaction, and record how it ended."""
        self._begun = True
        host = self._host
        incumbent = host.instance
        # A collection of garbage takes longer than all that we do in the blackout.
        gc.collect()
        gc.disable()
        try:
            await work
            return receipt
        except asyncio.CancelledError:
            receipt.failed(called_off())
            return receipt
        except Exception as error:
            receipt.failed(_as_told(error))
            return receipt
        finally:
            gc.enable()
            host.suppress(())
            self._handover = None
            self._task = None
            self._tell_fate(receipt, incumbent)
            host.record(receipt.to_json())
            with contextlib.suppress(SegueError):
                await host.refresh()

    async def _run(
        self,
        receipt: Receipt,
        to: Path,
        mode: str,
        rehearse: bool,
        force: bool,
        timeout: float | None,
        progress: Progress,
        limbo: asyncio.Future[Receipt],
    ) -> None:
        host = self._host
        plan = await self._plan(receipt, to, mode, timeout, progress)
        if plan is None:
            return
        if plan.current and not force and not rehearse:
            receipt.result = CURRENT
            return
        if rehearse and plan.modes["handover"]:
            receipt.failed(
                Refused(
                    f"{plan.mode.name} cannot be rehearsed here: with a VFIO device QEMU "
                    "does not go on after it was stopped",
                    hint="`segue check` says what else is known beforehand",
                    blockers=plan.modes["handover"],
                )
            )
            return
        for kept in host.machine.kept:
            await kept.quiet()
        if plan.rehearsal is not None:
            rehearsal = await self._rehearse(plan, receipt, timeout, progress, limbo)
            if rehearse or rehearsal.result != REHEARSED:
                return
            receipt.result = FAILED
        await self._attempt(plan, plan.mode, receipt, rehearse, timeout, progress, limbo)
        if receipt.result == DONE:
            host.machine.changes.settled()
            host.upgraded(plan.target)
            receipt.kept = host.machine.receipts_of(host.instance.pid)

    async def _rehearse(
        self,
        plan: Plan,
        receipt: Receipt,
        timeout: float | None,
        progress: Progress,
        limbo: asyncio.Future[Receipt],
    ) -> Receipt:
        """The rehearsal of another mode that must come first; its end is the receipt's for now."""
        assert plan.rehearsal is not None
        started = time.monotonic()
        mode = MODES[plan.rehearsal]
        assert receipt.target is not None
        target = replace(receipt.target)  # each has a process of its own
        rehearsal = replace(receipt, mode=mode.name, phases={}, target=target)
        await self._attempt(plan, mode, rehearsal, True, timeout, progress, limbo, "rehearsal.")
        receipt.rehearsal = rehearsal.to_json()
        receipt.clock_lag_seconds = rehearsal.clock_lag_seconds  # it was a pause too
        receipt.phases["rehearsal"] = time.monotonic() - started
        if rehearsal.result != REHEARSED:
            receipt.result, receipt.error = rehearsal.result, rehearsal.error
            receipt.guest = rehearsal.guest
        else:
            receipt.result = REHEARSED
        return rehearsal

    async def _attempt(
        self,
        plan: Plan,
        mode: Mode,
        receipt: Receipt,
        rehearse: bool,
        timeout: float | None,
        progress: Progress,
        limbo: asyncio.Future[Receipt],
        prefix: str = "",
    ) -> None:
        """One transaction; `prefix` is what its phases' breakpoints begin with."""
        host = self._host

        def lend(back: bool) -> Lending:
            return Lending(
                self.next_number(),
                host.binary if back else plan.target,
                {} if back else plan.cpu,
                incoming=mode.incoming(host.run_directory),
                copies_ram=mode.copies_ram,
            )

        self._handover = mode.transaction(
            incumbent=host.instance,
            target=host.binary.target,
            surroundings=self._surroundings(lend, receipt, progress, limbo, prefix),
            receipt=receipt,
            rehearse=rehearse,
            timeout=timeout,
            limits=self._limits,
            loses_interrupts=plan.loses_interrupts,
        )
        await self._handover.run()

    async def _plan(
        self, receipt: Receipt, to: Path, mode: str, timeout: float | None, progress: Progress
    ) -> Plan | None:
        progress({"phase": PLAN.name, "state": "begin"})
        started = time.monotonic()
        limit = self._limits.get(PLAN.name, PLAN.limit)
        if timeout is not None:
            limit = min(limit, timeout)
        try:
            async with asyncio.timeout(limit):
                await self.breakpoints.reach(PLAN.name)
                plan = await self.check(to, mode)
        except TimeoutError:
            receipt.failed(
                TimedOut(
                    f"phase {PLAN.name} took longer than {limit:g} s",
                    hint="either QEMU may hang: the one that runs, or the target when it is asked",
                )
            )
            return None
        except SegueError as error:
            receipt.failed(error)
            receipt.result = REFUSED
            return None
        finally:
            receipt.phases[PLAN.name] = time.monotonic() - started
            progress({"phase": PLAN.name, "state": "end", "seconds": receipt.phases[PLAN.name]})
        receipt.target = _side(plan.target, None)
        receipt.mode = plan.mode.name
        receipt.not_kept = [note.to_json() for note in plan.notes]
        if plan.blockers:
            receipt.failed(
                Refused(
                    f"this machine cannot be moved to {plan.target.path} by {plan.mode.name}",
                    hint="see the blockers; nothing was touched",
                    blockers=plan.blockers,
                )
            )
            return None
        return plan

    def _surroundings(
        self,
        lend: Callable[[bool], Lending],
        receipt: Receipt,
        progress: Progress,
        limbo: asyncio.Future[Receipt],
        prefix: str,
    ) -> Surroundings:
        host = self._host

        def spawn() -> Instance:
            lending = lend(False)
            try:
                instance = host.spawn(lending)
            except BaseException:
                for kept in host.machine.kept:
                    kept.drop(lending.number)
                raise
            assert receipt.target is not None
            receipt.target.pid = instance.pid
            return instance

        async def survey() -> None:
            blockers = await host.machine.survey(host.instance.monitor)
            if blockers:
                raise Refused(
                    "this machine was changed, and cannot be built like that again",
                    hint="see the blockers; nothing was touched",
                    blockers=tuple(blockers),
                )

        def hush() -> None:
            host.suppress(_MIGRATION | {"STOP", "RESUME"})

        async def read_only() -> None:
            host.suppress(_MIGRATION)
            host.gate.read_only()
            await host.gate.drain()

        async def closed() -> None:
            host.gate.close()
            await host.gate.drain()
            hush()

        def served(instance: Instance, told: Sequence[Event]) -> None:
            before = host.instance
            if instance is not before:
                host.serve(instance, told)
            # From here on what stops and resumes the guest is a client's doing.
            host.suppress(())
            if instance is before:
                host.tell(told)
            host.gate.open()

        async def checkpoint(phase: str) -> None:
            if phase == OPEN.name and self._handover is not None:
                await host.safeguard(self._handover.successor)
            await self.breakpoints.reach(prefix + phase)

        def on_limbo(error: GuestLost) -> None:
            if not limbo.done():
                told = replace(receipt, phases=dict(receipt.phases), blockers=[])
                told.failed(error)
                limbo.set_result(told)

        return Surroundings(
            directory=host.run_directory,
            spawn=spawn,
            lend=lend,
            argv=host.machine.argv,
            launch=host.launch,
            adopt=host.adopt,
            kept=host.machine.kept,
            survey=survey,
            journal=host.journal,
            read_only=read_only,
            closed=closed,
            hush=hush,
            served=served,
            progress=progress,
            checkpoint=checkpoint,
            on_limbo=on_limbo,
        )

    def _tell_fate(self, receipt: Receipt, incumbent: Instance) -> None:
        """An instance that ended while it was the transaction's affair is the supervisor's now."""
        host = self._host
        current = host.instance
        if current.running:
            return
        if receipt.mode == "suspend" and receipt.result == DONE:
            host.end(0)
            return
        status = current.exit_status
        if status == 0 and not current.replaced and receipt.result != LOST:
            receipt.guest = "ended"  # a client's `quit`, as soon as clients were answered again
        elif receipt.result != LOST:
            died = current.how_it_ended()
            receipt.failed(GuestLost(died.what, hint=died.hint, guest="lost"))
        # That of a process which executed another program is not the guest's end.
        host.end(1 if status is None or current.replaced else status)


def _side(binary: Binary, pid: int | None) -> Side:
    return Side(str(binary.path), binary.version_text, binary.build_id, pid)


def _busy() -> Refused:
    return Refused(
        "an upgrade of this machine is already under way",
        hint="wait for its end; `segue history` shows it then",
        guest="in the hands of the other upgrade",
    )


def _as_told(error: Exception) -> SegueError:
    if isinstance(error, SegueError):
        return error
    if isinstance(error, OSError):
        return SegueError(f"{error.strerror or error}", advice(error))
    return SegueError(f"internal error: {error!r}")
