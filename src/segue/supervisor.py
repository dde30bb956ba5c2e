"""One machine: what outlives its QEMU, the instance of the moment, and whoever asks about them.

The supervisor is one asyncio loop in one process. Towards its caller it behaves as QEMU does:
stdio, signals and exit status are QEMU's own.
"""

from __future__ import annotations

import segue.lean  # noqa: F401  # isort: skip  (before asyncio)

import asyncio
import contextlib
import errno
import gc
import json
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from segue import checkpoint, reexec, spawner
from segue.detach import SIGNALS
from segue.entrances import Entrances
from segue.errors import InstanceDied, MonitorClosed, SegueError
from segue.keeper import Keeper
from segue.kept import yank
from segue.kept.base import Kept, Lending
from segue.kept.broker import Broker
from segue.kept.changes.survey import Changes
from segue.kept.description import Description, describe
from segue.kept.display import VncAddress
from segue.kept.files import KeptFile
from segue.kept.guard import Guard
from segue.kept.lent import AddFd, Lent
from segue.kept.mux import Mux
from segue.kept.user import AUTO
from segue.machines import MachineDirectory
from segue.qemu import mapped
from segue.qemu.binary import Binary, probe
from segue.qemu.commandline import CommandLine
from segue.qemu.instance import Instance, start_time
from segue.qemu.monitor import ENDS_BY_ITSELF, Event
from segue.qmp.commands import error_of
from segue.qmp.gate import Gate
from segue.qmp.log import LogFile, logger
from segue.qmp.server import QmpServer
from segue.saved import Loader
from segue.service import Service
from segue.status import description, report
from segue.store import Store, mark
from segue.suspended import Suspended
from segue.upgrade import resume
from segue.upgrade.journal import Journal
from segue.upgrade.upgrader import Upgrader
from segue.voice import Voice

# After these the guest's state may be another one.
_STATE_EVENTS = frozenset(
    {"STOP", "RESUME", "SHUTDOWN", "RESET", "SUSPEND", "WAKEUP", "GUEST_PANICKED", "BLOCK_IO_ERROR"}
)
_HISTORY = 1000

# Seconds for the answer to what has ended the machine.
_LAST_ANSWERS = 10.0
_WITHOUT_US = "QEMU itself says so; does it start from the same command line without Segue?"
# Seconds for QEMU to say how its guest is, before that is "unresponsive".
_HANGS = 2.0
# Seconds until a status is written again for which there was no room or no descriptor.
_RETRY = 1.0


class Supervisor:
    """The life of one machine, from `run` to the end of its last instance."""

    def __init__(
        self,
        directory: MachineDirectory,
        line: CommandLine,
        *,
        detached: bool,
        suspended: Suspended | None = None,
        to: Path | None = None,
        net_user: str = AUTO,
        store: Store | None = None,
    ) -> None:
        self.directory = directory
        self._suspended = suspended
        self._to = to
        self.net_user = net_user
        self.line = line
        self.detached = detached
        self.since = time.time()
        self.upgrades = 0
        self.state = "starting"
        self.receipts: deque[dict[str, Any]] = deque(maxlen=_HISTORY)
        self.gate = Gate()
        self.machine: Description
        self.binary: Binary
        self.instance: Instance
        self.journal: Journal
        self.server: QmpServer
        self.started: mapped.Started | None = None
        self.store = store or Store()
        self.voice = Voice(directory, detached=detached)
        self.upgrader = Upgrader(self)
        self.keeper = Keeper(self)
        self.successor: Instance | None = None
        self.guards: dict[int, Guard] = {}
        self.entrances: Entrances
        self.exit_status: int | None = None
        # Once and for all: there may be no descriptor left to read it when it is asked for.
        self.start_time = start_time(os.getpid())
        self._starting: asyncio.Task[Any] | None = None
        self._status_is_late: asyncio.TimerHandle | None = None
        self._suppressed: frozenset[str] = frozenset()
        self._ended: asyncio.Future[int]
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, ready: Any) -> int:
        """Start the machine, call `ready()` when the guest runs, return QEMU's exit status.

        Raises SegueError if it cannot be started; nothing is left over then either.
        """
        self.handle_signals()
        self._starting = asyncio.current_task()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            with contextlib.ExitStack() as stack:
                try:
                    await self._start(stack)
                except asyncio.CancelledError:
                    return self.exit_status or 1
                except (InstanceDied, MonitorClosed) as error:
                    return await self._ended_early(error)
                self._starting = None
                ready()
                return await self._live()
        finally:
            self._clear_away()

    async def _ended_early(self, error: SegueError) -> int:
        """QEMU did not start, or its guest was off again before we had learnt all about it."""
        if self._suspended is not None:
            raise error
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_ANSWERS):
                await asyncio.shield(self._ended)
        if not self._ended.done() or (self.detached and isinstance(error, InstanceDied)):
            raise type(error)(error.what, hint=_WITHOUT_US)
        return self._ended.result()  # its own words, and ours, were seen already

    def handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._signalled, number)

    async def live(self, stack: contextlib.ExitStack) -> int:
        """As `run`, of a machine that was taken up; `stack` is what `go_on` has filled."""
        try:
            with stack:
                return await self._live()
        finally:
            self._clear_away()

    async def _live(self) -> int:
        # What is there now is there to stay: an upgrade's collection of garbage need not look at
        # it, which took 20 ms, and on a busy host half a second in which nobody read a console.
        gc.collect()
        gc.freeze()
        status = await self._ended
        await self.upgrader.finished()
        await self.server.finish(_LAST_ANSWERS)
        if status == 0:
            self._spare(False)
            self.store.clear()
        return status

    def _spare(self, on: bool) -> None:
        """Whether systemd, which starts a machine again that failed, has its clients until then."""
        for kept in self.machine.kept:
            kept.spare(on)
        self.entrances.spare(on)

    def _clear_away(self) -> None:
        for task in self._tasks:
            task.cancel()
        if (machine := getattr(self, "machine", None)) is not None:
            machine.lifecycle.remove_pidfile()
        self.directory.remove()

    async def _start(self, stack: contextlib.ExitStack) -> None:
        self.binary = await probe(self._to or Path(self.line.program))
        self.machine = describe(self.line, self.binary, net_user=self.net_user)
        if self._suspended is not None:
            self._suspended.point_at_files(
                [kept for kept in self.machine.kept if isinstance(kept, KeptFile)]
            )
        self.voice.open_log(stack)
        self._foretell()
        self.machine.lifecycle.write_pidfile()
        found = self.store.open(mark(self.line, self.machine))
        for number, kept in enumerate(self.machine.kept):
            stack.callback(kept.close)
            self._connect(kept)
            kept.inherit(found.within(f"kept{number}"))
            await kept.start()
        self.server = self._make_server(stack)
        stack.callback(self.entrances.close)
        await self.entrances.open_before_qemu(found)
        checkpoint.close_all(found)
        self.journal = Journal(self.directory.journal)
        stack.callback(self.journal.close)
        if self._suspended is not None:
            stack.callback(self._suspended.not_resumed)
        self.instance = self.spawn(await self._first_lending())
        stack.callback(self._kill_whatever_is_left)
        if self._suspended is not None:
            resume.begin(self._suspended, self)
        await self.instance.connect(timeout=86400)
        if self._suspended is not None:
            before = await resume.load(self._suspended, self.instance)
        self.entrances.open_qmp()
        self.serve(self.instance)
        await self.machine.learn(self.instance.monitor)
        if self._suspended is not None:
            self.machine.values.recall(self._suspended.machine["values"])
        self._keep(stack)
        if self._suspended is not None:
            await resume.go_on(self._suspended, self, before)
        await self.refresh()
        self.keeper.changed()
        await self.guest_may_have_ended()

    def _foretell(self) -> None:
        """What stands in an upgrade's way, or would be lost, while it can still be changed."""
        draft = self.machine.draft
        for blocker in draft.blockers:
            what = f"{blocker.what}: {blocker.why}; {blocker.remedy}"
            self.voice.at_start(f"cannot be upgraded: {what}")
        for note in draft.notes:
            self.voice.at_start(f"not kept by an upgrade: {note.what}: {note.why}")

    async def take_up(
        self, stack: contextlib.ExitStack, data: dict[str, Any], loader: Loader
    ) -> None:
        """Go on with a machine that another process had (checkpoint.py), but for its instances.

        Whatever is raised: until `go_on`, `stack` must not be unwound, since that would end what
        others still have.
        """
        checkpoint.recall(self, data)
        self.voice.open_log(stack)
        for kept in self.machine.kept:
            self._connect(kept)
        checkpoint.load_guards(self, data, loader)
        await checkpoint.load_kept(self, data, loader)
        self.server = self._make_server(stack)
        await self.entrances.load(data, loader)
        self.journal = Journal(self.directory.journal)

    def go_on(self, stack: contextlib.ExitStack) -> None:
        """All of it has been taken up: at its end it is this process that closes it."""
        for kept in self.machine.kept:
            stack.callback(kept.close)
        stack.callback(self.entrances.close)
        self.entrances.go_on()
        stack.callback(self.journal.close)
        stack.callback(self._kill_whatever_is_left)
        self._keep(stack)

    def _keep(self, stack: contextlib.ExitStack) -> None:
        """From now on the machine outlives this process."""
        stack.callback(self.keeper.close)
        self.keeper.begin()

    def _connect(self, kept: Kept) -> None:
        kept.changed = self.keeper.changed
        kept.spare(self.store.used)
        kept.move_in(self.run_directory, self.voice.say)
        if isinstance(kept, Broker):
            kept.replace_backend = partial(self._replace_backend, kept.shared)
        elif isinstance(kept, Mux):
            kept.on_quit = self._quit

    @property
    def instances(self) -> list[Instance]:
        """The one that is served, and during an upgrade its successor."""
        return list(dict.fromkeys(each for each in (self.instance, self.successor) if each))

    async def safeguard(self, successor: Instance | None) -> None:
        """An upgrade is about to pause the guest: what this process has, both instances hold."""
        self.successor = successor
        await self.keeper.safeguard()

    async def _first_lending(self) -> Lending:
        if self._suspended is None:
            return Lending(1, self.binary)
        return await resume.lending(self._suspended, self)

    def to_suspend(self) -> dict[str, Any]:
        return description(self)

    def spawn(self, lending: Lending) -> Instance:
        return spawner.spawn(self, lending)

    def launch(
        self,
        lending: Lending,
        argv: list[str],
        ends: tuple[socket.socket, socket.socket],
        command: list[str],
        environment: dict[str, str],
    ) -> Instance:
        return spawner.launch(self, lending, argv, ends, command, environment)

    def adopt(self, instance: Instance) -> None:
        """Notice its end, whatever it is at the time."""
        instance.on_end(lambda status: self._instance_ended(instance, status))

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def run_directory(self) -> Path:
        return self.directory.path

    def serve(self, instance: Instance, told: Sequence[Event] = ()) -> None:
        """Have clients answered by `instance` from now on; `told` are events that it has sent."""
        self.instance = instance
        instance.monitor.listen(lambda event: self._event(instance, event))
        for event in told:
            self._event(instance, event)
        self.server.upstream = instance.monitor

    def suppress(self, events: Collection[str]) -> None:
        """Clients are spared these, and no others."""
        self._suppressed = frozenset(events)

    def tell(self, events: Sequence[Event]) -> None:
        """Clients hear of events now that they were spared before."""
        for event in events:
            self.server.emit(event)

    def is_outdated(self) -> bool:
        return self.outdated() is not None

    def outdated(self) -> str | None:
        """Why the QEMU that runs is not the one that is installed."""
        if self.started is None:
            return None
        return mapped.outdated(self.instance.pid, self.binary.path, self.started)

    def upgraded(self, binary: Binary) -> None:
        """The instance of the moment runs `binary` now."""
        self.binary = binary
        self.upgrades += 1
        self.started = None
        self._remember()

    def _remember(self) -> None:
        """What it was started from; later, where there is no descriptor left to look at it."""
        if self.started is None:
            with contextlib.suppress(OSError):
                self.started = mapped.remember(self.binary.path, self.instance.pid)

    def record(self, receipt: dict[str, Any]) -> None:
        """Keep a receipt, also where the disk is full."""
        self.successor = None
        self.keeper.write()
        self.keeper.changed()
        self.receipts.append(receipt)
        with contextlib.suppress(OSError), self.directory.receipts.open("a") as file:
            file.write(json.dumps(receipt) + "\n")

    def _event(self, instance: Instance, event: Event) -> None:
        if instance is not self.instance:
            return
        name = event["event"]
        if name not in self._suppressed:
            self.server.emit(event)
        if name == "DEVICE_DELETED":
            data = event["data"]
            self.machine.changes.device_deleted(data["path"], data.get("device"))
        if name in ("SHUTDOWN", "GUEST_PANICKED"):
            self._later(self._guest_ended(name, event.get("data", {})))
        elif name in _STATE_EVENTS and not self.upgrader.busy:
            self._later(self.refresh())

    async def _guest_ended(self, name: str, data: dict[str, Any]) -> None:
        """The guest powered off or panicked and QEMU has paused it: do what the user said."""
        await self.upgrader.finished()
        life = self.machine.lifecycle
        if name == "GUEST_PANICKED":
            if life.panic == "exit-failure":
                self.exit_status = 1
            wanted = life.panic in ("shutdown", "exit-failure")
            wanted = wanted and (life.panic == "exit-failure" or life.shutdown == "poweroff")
        else:
            wanted = life.shutdown == "poweroff" and data.get("reason") not in ENDS_BY_ITSELF
        if wanted:
            await self._execute("quit")
        else:
            await self.refresh()

    async def guest_may_have_ended(self) -> None:
        """Its event may have been told to a process that was killed."""
        if self.state == "shutdown":
            await self._guest_ended("SHUTDOWN", {})
        elif self.state == "guest-panicked":
            await self._guest_ended("GUEST_PANICKED", {})

    async def refresh(self) -> None:
        """Ask for the guest's state and write it where `segue ls` looks."""
        if not self.instance.monitor.closed:
            try:
                answer = await self.instance.monitor.execute("query-status", timeout=_HANGS)
                self.state = answer["status"]
            except TimeoutError:
                self.state = "unresponsive"
            except SegueError:
                pass
        if self._status_is_late is not None:
            self._status_is_late.cancel()
            self._status_is_late = None
        self._remember()
        if not self._write_status():
            loop = asyncio.get_running_loop()
            self._status_is_late = loop.call_later(_RETRY, lambda: self._later(self.refresh()))

    def _write_status(self) -> bool:
        try:
            return self.directory.write_status(self.status())
        except OSError as error:  # no descriptors left
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            return False

    def status(self) -> dict[str, Any]:
        return report(self)

    def _quit(self) -> None:
        """Ctrl-a x."""
        self._later(self._execute("quit"))

    async def _execute(self, command: str) -> None:
        await self.upgrader.finished()
        with contextlib.suppress(SegueError):
            await self.instance.monitor.execute(command)

    async def _replace_backend(self, shared: dict[str, str], chardev: str, fd: int) -> None:
        """Give the guest's port a connection of its own, so that it sees a client come."""
        monitor = self.instance.monitor
        await monitor.execute("getfd", {"fdname": chardev}, fds=[fd])
        address = {"type": "fd", "data": {"str": chardev}}
        data: dict[str, Any] = {"addr": address, "server": False}
        if "logfile" in shared:
            data |= {"logfile": shared["logfile"], "logappend": True}
        backend = {"type": "socket", "data": data}
        await monitor.execute("chardev-change", {"id": chardev, "backend": backend})

    def _make_server(self, stack: contextlib.ExitStack) -> QmpServer:
        log = LogFile(self.directory.path / "qmp.log")
        stack.callback(log.close)
        server = QmpServer(Service(self).commands(), gate=self.gate, log=logger(log))
        server.observers += [
            kept.observe
            for kept in self.machine.kept
            if isinstance(kept, Lent | AddFd | Changes | VncAddress)
        ]
        server.changed = self.keeper.changed
        server.busy = self.keeper.busy()
        changes = self.machine.changes
        changes.incumbent = lambda: (self.instance.monitor, self.instance.number)
        changes.say = self.voice.say
        server.carried_out = changes.carries_out()
        server.carried_out["yank"] = yank.refuse_ours
        server.edits["query-chardev"] = self.machine.correct_chardevs
        server.edits["query-yank"] = yank.without_ours
        stack.callback(server.close)
        self.entrances = Entrances(self.directory, self.machine, server, self.voice.say)
        self.entrances.spare(self.store.used)
        return server

    def _instance_ended(self, instance: Instance, status: int) -> None:
        if instance is not self.instance or self.upgrader.busy:
            return
        self.end(status)

    def end(self, status: int) -> None:
        """The last instance is dead: the machine's life ends with its exit status."""
        if self._ended.done():
            return
        if status >= 128:
            self.voice.say(f"QEMU (pid {self.instance.pid}) was killed by signal {status - 128}")
        elif status:
            self.voice.say(f"QEMU (pid {self.instance.pid}) ended with exit status {status}")
        self._ended.set_result(status if self.exit_status is None else self.exit_status)

    def _signalled(self, number: int) -> None:
        """As QEMU: these end the machine, but never in the middle of an upgrade."""
        if self._starting is not None:
            self.exit_status = 128 + number
            self._starting.cancel()
            return
        if number == signal.SIGHUP and (self.detached or "NOTIFY_SOCKET" in os.environ):
            self._later(self._reload())
            return
        self._later(self._pass_on(number))

    async def _pass_on(self, number: int) -> None:
        self.upgrader.call_off()
        await self.upgrader.finished()
        self.instance.signal(number)

    async def _reload(self) -> None:
        """SIGHUP, where it does not mean that a terminal is gone."""
        await self.upgrader.finished()
        try:
            await reexec.reexec(self, None)
        except SegueError as error:
            self.not_replaced(error)

    def not_replaced(self, why: SegueError) -> None:
        """Other code was to take this process's place, and did not."""
        self.server.answer_asker(error_of(why))
        self.voice.say(why.what)

    def _later(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _kill_whatever_is_left(self) -> None:
        self.instance.kill_at_once()
        self.instance.close()
