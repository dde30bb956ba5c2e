"""Handover: a successor beside the incumbent, on the same RAM, takes over the device state.

The class is the transaction of docs/concepts: its phases are those of `phases.py`, in their
order. There is one commit point, the sending of `cont` to the successor (for a guest that stays
paused, the kill of the incumbent). Every way out before it goes through `_undo`, in which the
successor is dead and reaped before the incumbent may go on: `cont` on the incumbent beside a
running successor destroyed the guest in 6 of 6 trials.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from segue.errors import (
    Blocker,
    CommandFailed,
    GuestLost,
    MigrationFailed,
    MonitorClosed,
    QemuError,
    Refused,
    SegueError,
    TimedOut,
    advice,
)
from segue.qemu import migration
from segue.qemu.instance import Instance
from segue.qemu.migration import MigrationWatch
from segue.qemu.monitor import Event, Monitor
from segue.upgrade import compare, images, interrupts, placement, wishes
from segue.upgrade.commit import Commit, switch, tell_limbo
from segue.upgrade.phases import COMMIT, HOLD, MOVE, OPEN, PREPARE, RELEASE, RETIRE, UNDO, Phase
from segue.upgrade.receipt import DONE, REHEARSED, Receipt
from segue.upgrade.surroundings import Surroundings

ON_INCUMBENT = "running on the incumbent"
ON_SUCCESSOR = "running on the successor"
_PAUSED = "paused on the incumbent"
_GO_ON = "`cont` it first (and `stop` it again, if it is to be paused)"
_START_ANEW = "`system_reset` and `cont`, or start it again"
# States of a guest that QEMU paused, and that can go on.
_CAN_GO_ON = ("watchdog", "io-error", "debug")

_CHANNEL = "segue"
"""What QEMU calls its end of it."""

# Seconds. In a new process nothing of the guest's code is translated yet, and no page is mapped:
# at first it needs the processor more than we do. With the incumbent freed at once the gap was half
# as long again (two processors, TCG).
_SETTLING = 0.05


@dataclass
class Handover:
    """One attempt. `timeout` bounds all that comes before commit, in seconds.

    `limits` are seconds by phase, where they are not to be those of phases.py. With
    `loses_interrupts` whoever goes on with the guest is given them again (interrupts.py).
    """

    incumbent: Instance
    target: str
    surroundings: Surroundings
    receipt: Receipt
    rehearse: bool = False
    timeout: float | None = None
    limits: Mapping[str, float] = field(default_factory=dict)
    loses_interrupts: bool = False
    successor: Instance | None = None
    phase: Phase = PREPARE
    _was_running: bool = False
    _events: list[Event] = field(default_factory=list)
    _late: list[dict[str, Any]] = field(default_factory=list)
    _before: migration.Settings | None = None
    _fresh: migration.Settings | None = None
    _frozen: bool = False
    _migrating: bool = False
    _undoing: bool = False
    _committed: bool = False
    _hushed: bool = False
    _untold: list[Event] = field(default_factory=list)
    _went_round: asyncio.Task[None] | None = None
    _watches: list[MigrationWatch] = field(default_factory=list)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _not_resumed: CommandFailed | None = None

    async def run(self) -> Receipt:
        """Carry it out; the receipt tells how it ended. Raises nothing on purpose."""
        self._stack.callback(self.incumbent.monitor.listen(self._incumbent_event))
        if (task := asyncio.current_task()) is not None:
            # With the incumbent the guest is lost: there is nothing more to wait for.
            self._stack.callback(self.incumbent.on_end(lambda _: self._incumbent_ended(task)))
        try:
            async with asyncio.timeout(self.timeout) as budget:
                await self._enter(PREPARE, self._prepare)
                await self._enter(OPEN, self._open)
                await self._enter(HOLD, self._hold)
                await self._enter(MOVE, self._move)
                budget.reschedule(None)
            if self.rehearse:
                await self._go_back()
                self.receipt.result = REHEARSED
                if self._not_resumed is not None:
                    self.receipt.failed(self._undone_but("the rehearsal", self._not_resumed))
            else:
                await self._enter(COMMIT, self._commit)
        except BaseException as error:
            await self._fail(error)
        if self.receipt.result != REHEARSED and self.receipt.error is None:
            self.receipt.result = DONE
            if self._was_running:
                await asyncio.sleep(_SETTLING)
            for phase, work in ((RELEASE, self._release), (RETIRE, self._retire)):
                try:
                    await self._enter(phase, work)
                except (SegueError, OSError) as error:
                    self.receipt.warnings.append(f"phase {phase.name}: {error}")
        self._stack.close()
        self._tell_late()
        return self.receipt

    def _incumbent_ended(self, task: asyncio.Task[Any]) -> None:
        became_successor = self.successor is not None and self.successor.pid == self.incumbent.pid
        if not became_successor:
            self.call_off(task)

    def call_off(self, task: asyncio.Task[Any]) -> None:
        """Undo if the commit point has not been reached; otherwise let it finish."""
        if self.phase in (PREPARE, OPEN, HOLD, MOVE) and not self._undoing:
            task.cancel()

    async def _enter(self, phase: Phase, work: Callable[[], Awaitable[None]]) -> None:
        self.phase = phase
        await self.surroundings.checkpoint(phase.name)
        self._tell({"phase": phase.name, "state": "begin"})
        started = time.monotonic()
        try:
            # What follows the commit point is not broken off; `_commit` has limits of its own.
            await (work() if phase is COMMIT else self._within(phase, work))
        finally:
            seconds = time.monotonic() - started
            self.receipt.phases[phase.name] = seconds
            self._tell({"phase": phase.name, "state": "end", "seconds": round(seconds, 6)})

    async def _within(self, phase: Phase, work: Callable[[], Awaitable[None]]) -> None:
        try:
            async with asyncio.timeout(self._limit(phase)) as limit:
                await work()
        except TimeoutError:
            if not limit.expired():
                raise
            seconds = self._limit(phase)
            raise TimedOut(f"phase {phase.name} took longer than {seconds:g} s") from None

    def _limit(self, phase: Phase) -> float:
        return self.limits.get(phase.name, phase.limit)

    def _tell(self, event: dict[str, Any]) -> None:
        """Progress; what happens in the blackout is told after it."""
        if self.phase.paused:
            self._late.append(event)
        else:
            self._tell_late()
            self.surroundings.progress(event)

    def _tell_late(self) -> None:
        late, self._late = self._late, []
        for event in late:
            self.surroundings.progress(event)

    async def _look(self) -> None:
        """Raises Refused unless the guest is in a state that can be moved."""
        status = (await self.incumbent.monitor.execute("query-status"))["status"]
        self._was_running = self.surroundings.journal.running = status == "running"
        if status == "postmigrate":
            raise Refused(
                "an upgrade of this paused guest was undone: QEMU does not move it again as it is",
                hint=_GO_ON,
                guest=_PAUSED,
            )
        if status not in ("running", "paused", "prelaunch"):
            raise Refused(
                f"the guest's state is {status}: only a running or paused guest can be handed over",
                hint=_GO_ON if status in _CAN_GO_ON else _START_ANEW,
                guest=f"not running ({status}), on the incumbent",
            )
        if not self._was_running:
            self.receipt.guest = _PAUSED
            await images.activate(self.incumbent.monitor, self.surroundings.directory)

    async def _prepare(self) -> None:
        await self._freeze()
        await self._look()
        self.surroundings.journal.write("prepare", self.incumbent, None)
        self.successor = successor = self.surroundings.spawn()
        placement.copy(self.incumbent.pid, successor.pid)
        self.surroundings.journal.write("prepare", self.incumbent, successor)
        await self._introduce()
        monitor = await successor.connect(self._limit(PREPARE))
        await self._furnish(monitor)
        await placement.copy_vcpus(self.incumbent.monitor, monitor)
        old, new = await asyncio.gather(
            compare.describe(self.incumbent.monitor, self.target),
            compare.describe(monitor, self.target),
        )
        differences = compare.differences(old, new)
        if differences:
            raise Refused(
                "the successor is not the same machine",
                hint="nothing was changed; the differences are listed as blockers",
                blockers=tuple(
                    Blocker("machine", d, "upgrade to a QEMU that builds the same machine")
                    for d in differences
                ),
            )

    async def _furnish(self, monitor: Monitor) -> None:
        for kept in self.surroundings.kept:
            await kept.furnish(monitor)

    async def _freeze(self) -> None:
        """From here on no client can change what is copied and compared."""
        await self.surroundings.read_only()
        self._frozen = True
        for kept in self.surroundings.kept:
            kept.freeze()
        await self.surroundings.survey()

    async def _introduce(self) -> None:
        """What must come before the successor can answer."""

    async def _open(self) -> None:
        assert self.successor is not None
        names = await images.paths(self.incumbent.monitor)
        fds = self._stack.enter_context(images.opened(names))
        await self._configure()
        self._watches = [self._watch(self.incumbent), self._watch(self.successor)]
        await self._open_channel()
        await images.write_out(fds)
        self.surroundings.journal.write("open", self.incumbent, self.successor)

    async def _configure(self) -> None:
        await self._configure_both(migration.SENDER, migration.RECEIVER)

    async def _configure_both(self, sender: frozenset[str], receiver: frozenset[str]) -> None:
        assert self.successor is not None
        old, new = self.incumbent.monitor, self.successor.monitor
        self._before = await migration.configure(old, sender)
        self._fresh = await migration.configure(new, receiver)
        await migration.describe_not(old, new, self._before, self._fresh)

    def _watch(self, instance: Instance) -> MigrationWatch:
        watch = MigrationWatch(instance)
        self._stack.callback(watch.close)
        return watch

    async def _open_channel(self) -> None:
        """A socket between the two; no path in a directory that may be full or too long."""
        assert self.successor is not None
        ours, theirs = socket.socketpair()
        with ours, theirs:
            for monitor, end in ((self.incumbent.monitor, ours), (self.successor.monitor, theirs)):
                await monitor.execute("getfd", {"fdname": _CHANNEL}, fds=[end.fileno()])
        await self.successor.monitor.execute("migrate-incoming", {"uri": f"fd:{_CHANNEL}"})

    async def _hold(self) -> None:
        """The last moments before STOP: what clients send waits here from now on.

        It is held while the guest still runs, so that there is nothing that an incumbent whose
        state has been saved could still read. The alternative, `pause-before-switchover` and
        holding at that point, costs 2.7 ms of blackout (1 ms of it a fixed wait in QEMU).
        """
        await self.surroundings.closed()
        self._hush()
        self._check_guest()
        for kept in self.surroundings.kept:
            kept.hold()
        for kept in self.surroundings.kept:
            kept.take_back()
        self._migrating = True
        await self._begin()

    async def _begin(self) -> None:
        """Have the incumbent stop its guest and send its state."""
        await self.incumbent.monitor.execute("migrate", {"uri": f"fd:{_CHANNEL}"})

    def _hush(self) -> None:
        """From here on a stop is our affair."""
        self._hushed = True
        self.surroundings.hush()

    def _incumbent_event(self, event: Event) -> None:
        self._events.append(event)
        if event["event"] == "STOP" and self._hushed:
            self._untold = [event]
        if event["event"] == "STOP" and self._migrating and self._went_round is None:
            self._went_round = asyncio.ensure_future(self._go_round())
            self._stack.callback(_give_up, self._went_round)

    async def _go_round(self) -> None:
        """Two answers: QEMU's main loop runs again; it has gone round once."""
        for _ in range(2):
            await self.incumbent.monitor.relay({"execute": "query-status"})

    async def _move(self) -> None:
        """Wait until the successor has loaded, and the incumbent has acted on its guest's wishes.

        A reset or power-off that the guest asked for as it was stopped is in no saved state: the
        incumbent acts on it when its main loop runs again, which is after the state was saved,
        and says so in an event. It is asked from STOP on, while the successor loads.
        """
        sender, receiver = self._watches
        await self._until(receiver.until("completed"))
        await self._until(sender.until("completed"))
        if self._went_round is not None:
            await self._went_round
        self._check_guest()

    async def _commit(self) -> None:
        assert self.successor is not None
        await self._within(COMMIT, self._ready)
        self.surroundings.journal.write("commit", self.incumbent, self.successor)
        if not self._was_running:
            await self.incumbent.kill()
            self._no_way_back()
            switch(self.successor, self.surroundings)
            return
        if self.successor.monitor.closed:
            raise await self.successor.death()
        commit = Commit(self.successor, self.surroundings, self._limit(COMMIT))
        sent = await commit.run()
        # Before any client can stop the guest again: it has run.
        self._no_way_back()
        commit.switch()
        if (resume := commit.resume_told()) is not None:
            self._measure(_seconds(resume))
            self.receipt.own_seconds = sent - max(w.reached("completed") for w in self._watches)

    def _no_way_back(self) -> None:
        """The successor has run the guest, or is the only one to have it."""
        self._committed = True
        try:
            self.surroundings.journal.write("release", self.incumbent, self.successor)
        except OSError as error:
            self.receipt.warnings.append(f"the journal: {error}")

    async def _ready(self) -> None:
        """The last that may fail, or take its time, before the commit point."""
        assert self.successor is not None
        for kept in self.surroundings.kept:
            kept.pass_on(self.successor.number)
        if self.loses_interrupts:
            await interrupts.give_again(self.successor)
        if not self._was_running:
            # Nobody is going to ask whether this one runs; so it must answer now.
            await self.successor.monitor.execute("query-status")

    async def _give_again(self, instance: Instance) -> None:
        """In an undo, where a guest that may wait for its disk is better than one that stands."""
        try:
            await interrupts.give_again(instance)
        except QemuError as error:
            self.receipt.warnings.append(f"interrupts of disks in iothreads: {error.what}")

    def _stop(self) -> Event | None:
        return next((e for e in self._events if e["event"] == "STOP"), None)

    def _measure(self, resumed: float) -> None:
        stop = self._stop()
        if stop is not None:
            self.receipt.blackout_seconds = resumed - _seconds(stop)
            self.receipt.clock_lag_seconds += self.receipt.blackout_seconds

    async def _release(self) -> None:
        assert self.successor is not None
        self.receipt.guest = ON_SUCCESSOR if self._was_running else "paused on the successor"
        with contextlib.suppress(SegueError, TimeoutError):
            self.receipt.bytes_moved = await self._bytes_moved()

    async def _bytes_moved(self) -> int | None:
        """Through the stream; an incumbent that was killed for a paused guest cannot tell."""
        if self.incumbent.monitor.closed:
            return None
        answer = await self.incumbent.monitor.execute("query-migrate", timeout=1)
        moved: int = answer["ram"]["transferred"]
        return moved

    async def _retire(self) -> None:
        assert self.successor is not None
        await self.incumbent.kill()
        self.incumbent.close()
        for kept in self.surroundings.kept:
            kept.drop(self.incumbent.number)
        for kept in self.surroundings.kept:
            try:
                await kept.settle(self.successor.monitor)
            except SegueError as error:
                self.receipt.warnings.append(f"{kept.kind} {kept.name}: {error.what}")
        if not self._was_running:
            await self._take_images(self.successor.monitor)
        if self._before is not None and self._fresh is not None:
            await migration.restore(self.successor.monitor, self._fresh.with_those_of(self._before))
        self.surroundings.journal.write("done", self.successor, None)

    async def _until(self, reached: asyncio.Future[str]) -> None:
        """Wait for a migration's state; a dead successor is named as what it is."""
        try:
            await reached
        except SegueError:
            successor = self.successor
            if successor is not None and not successor.running:
                raise await successor.death() from None
            raise

    def _check_guest(self) -> None:
        """Raise SegueError if the guest is no longer what was compared and is being moved."""
        wishes.check(self._events, stops=self._migrating)

    async def _fail(self, error: BaseException) -> None:
        """Undo, and put what happened into the receipt."""
        told: SegueError
        if isinstance(error, SegueError):
            told = error
        elif isinstance(error, TimeoutError):
            limit = "its time" if self.timeout is None else f"{self.timeout:g} s"
            told = TimedOut(f"the upgrade took longer than {limit}, in phase {self.phase.name}")
        elif isinstance(error, asyncio.CancelledError):
            told = called_off()
        elif isinstance(error, OSError):
            what = f"{error.strerror or error} in phase {self.phase.name}"
            told = SegueError(what, advice(error))
        else:
            told = SegueError(f"internal error in phase {self.phase.name}: {error!r}")
        if self._committed:
            assert self.successor is not None
            self.receipt.warnings.append(f"as all became the successor's: {told.what}")
            self.surroundings.served(self.successor, ())
            return
        if isinstance(told, GuestLost):
            # What the incumbent holds is the guest of before: nobody is to resume that by mistake.
            await self.incumbent.kill()
            if self.successor is not None:
                await self.successor.kill()
            self.receipt.failed(told)
            return
        try:
            await self._go_back()
        except SegueError as worse:
            told = worse
            if isinstance(worse, GuestLost):
                await self.incumbent.kill()
        if self._not_resumed is not None:
            told = self._undone_but(f"{told.what}; the upgrade", self._not_resumed)
        if isinstance(told, MigrationFailed) and self.successor is not None:
            said = [line.partition(": ")[2] or line for line in self.successor.last_words]
            told = MigrationFailed("; ".join([told.what, *said[-2:]]), told.hint)
        self.receipt.failed(told)

    def _undone_but(self, what: str, why: SegueError) -> SegueError:
        return SegueError(
            f"{what} was undone, but QEMU does not let the guest go on: {why.what}",
            hint=f"mend what it names, then: segue qmp {self.receipt.machine} cont",
            guest=_PAUSED,
        )

    async def _go_back(self) -> None:
        """Undo. Whoever waits is told if that takes long: an incumbent that hangs, for one."""
        self._undoing = True
        self._tell({"phase": UNDO.name, "state": "begin"})
        started = time.monotonic()
        undo = asyncio.ensure_future(self._undo())
        await asyncio.wait((undo,), timeout=self._limit(UNDO))
        if not undo.done():
            tell_limbo(self.surroundings, "the incumbent does not answer")
        await undo
        seconds = round(time.monotonic() - started, 6)
        self._tell({"phase": UNDO.name, "state": "end", "seconds": seconds})

    def _restore(self) -> None:
        for kept in self.surroundings.kept:
            try:
                kept.restore()
            except (SegueError, OSError) as error:
                self.receipt.warnings.append(f"{kept.kind} {kept.name}: {error}")

    async def _undo(self) -> None:
        """The incumbent goes on. Raises GuestLost if it cannot."""
        if self.successor is not None:
            await self.successor.kill()
            self.successor.close()
        self.surroundings.journal.write("undo", self.incumbent, self.successor)
        if not self.incumbent.running:
            raise GuestLost(
                str(await self.incumbent.death()), hint="see the machine's qemu.log", guest="lost"
            )
        monitor = self.incumbent.monitor
        self._restore()
        try:
            await migration.cancel(monitor)
            if self.loses_interrupts and self._stop() is not None:
                await self._give_again(self.incumbent)
            if self._was_running and not wishes.stopped_itself(self._events):
                try:
                    await monitor.execute("cont")
                except CommandFailed as error:
                    # An image that it may not open any more. All else is put back all the same.
                    self._not_resumed = error
            elif self._migrating and not self._was_running:
                await self._take_images(monitor)
            await self._as_before(monitor)
        except MonitorClosed:
            raise GuestLost(
                str(await self.incumbent.death()), hint="see the machine's qemu.log", guest="lost"
            ) from None
        for kept in self.surroundings.kept:
            if self._frozen:
                kept.give_back()
            if self.successor is not None:
                kept.drop(self.successor.number)
        stays = self._not_resumed is not None or wishes.stopped_itself(self._events)
        # A stop that was an upgrade's affair is the guest's now.
        told = self._untold if self._was_running and stays else ()
        self.surroundings.served(self.incumbent, told)
        stop = self._stop()
        resume = next((e for e in reversed(self._events) if e["event"] == "RESUME"), None)
        if stop and resume and _seconds(resume) > _seconds(stop):
            self.receipt.blackout_seconds = _seconds(resume) - _seconds(stop)
            self.receipt.clock_lag_seconds += self.receipt.blackout_seconds
        self.surroundings.journal.write("done", self.incumbent, None)
        self.phase = PREPARE

    async def _take_images(self, monitor: Monitor) -> None:
        """Those of a guest that stays paused. Without, it is none the worse: `cont` opens them."""
        try:
            await images.activate(monitor, self.surroundings.directory)
        except (CommandFailed, OSError) as error:
            self.receipt.warnings.append(f"its images were not opened: {error}")

    async def _as_before(self, monitor: Monitor) -> None:
        """The incumbent has what an upgrade has set, and what it was lent, no more."""
        if self._before is not None:
            try:
                await migration.restore(monitor, self._before)
            except CommandFailed as error:
                self.receipt.warnings.append(f"settings for migrations: {error.what}")
            # One that was not used.
            with contextlib.suppress(CommandFailed):
                await monitor.execute("closefd", {"fdname": _CHANNEL})


def _give_up(task: asyncio.Task[None]) -> None:
    """Nobody waits for it any more, nor for the reason why it failed."""
    task.cancel()
    task.add_done_callback(lambda done: done.cancelled() or done.exception())


def called_off() -> SegueError:
    return SegueError("the upgrade was called off")


def _seconds(event: Event) -> float:
    stamp = event["timestamp"]
    return float(stamp["seconds"] + stamp["microseconds"] / 1e6)
