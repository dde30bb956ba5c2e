"""A machine whose supervisor was killed is taken up by another one: `segue recover`.

All that is needed lies in the run directory and in the QEMU processes (keeper.py). An upgrade that
was under way is finished or undone, by what the journal says:

prepare, open, undo    the successor is killed, then the incumbent goes on if it had run
commit                 the successor is asked: if the guest has run on it, as `release`; if it has
                       not, as `open`; if nobody can tell, neither is touched and that is said
release                the incumbent is killed, the successor goes on
resume                 the guest came from a directory: upgrade/resume.py
done                   the instance that it names goes on

The successor that is not to go on is dead before the incumbent may run. Commands to a monitor are
carried out in their order: what answers after a `cont` that was sent says what became of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from segue import checkpoint
from segue.detach import SIGNALS
from segue.errors import GuestLost, NotRunning, QemuError, Refused, SegueError
from segue.keeper import FORMAT, Deposit
from segue.kept.processes import duplicate_of, kill
from segue.machines import MachineDirectory, is_alive
from segue.qemu import migration
from segue.qemu.binary import probe
from segue.qemu.instance import MONITOR_ID, Instance
from segue.qmp.server import FDSETS
from segue.saved import Identity, Loader, identity
from segue.sealed import Damaged, unseal
from segue.store import Store, mark
from segue.supervisor import Supervisor
from segue.suspended import discard
from segue.upgrade import interrupts, journal, resume
from segue.upgrade.receipt import DONE, FAILED, Receipt, Side

# Words of query-status while the guest of a successor has not run, and of an incumbent that only
# waits to be resumed.
_NOT_RUN = frozenset({"inmigrate", "prelaunch", "paused"})
_STOPPED_BY_US = frozenset({"paused", "postmigrate", "finish-migrate", "prelaunch"})
# What QEMU has where nobody has set anything; what was set before is known to the dead alone.
_DEFAULTS = {"max-bandwidth": 1 << 27, "announce-rounds": 5, "announce-initial": 50}


def recover(directory: MachineDirectory, ready: Callable[[], None], *, detached: bool) -> int:
    """Take the machine up, call `ready()`, and supervise it to its end; QEMU's exit status.

    Raises SegueError where it cannot be; whatever runs then runs on.
    """
    return asyncio.run(_supervise(directory, ready, detached))


async def _supervise(directory: MachineDirectory, ready: Callable[[], None], detached: bool) -> int:
    stack = contextlib.ExitStack()
    resume.end_what_must_not_run(journal.read(directory.journal))
    recovery = Recovery.read(directory)
    try:
        supervisor = await recovery.take_up(stack, detached)
    except BaseException:
        # Unwinding it would close and remove what is not ours yet.
        stack.pop_all()
        raise
    if signal.sigtimedwait(SIGNALS, 0) is not None:
        # Meant for the taking up, not for the guest.
        raise SegueError("interrupted", hint=f"again: segue recover {directory.name}")
    ready()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return await supervisor.live(stack)


@dataclass
class Recovery:
    """`journal` is its last record; `busy` is what `clients` says (keeper.py)."""

    directory: MachineDirectory
    machine: dict[str, Any]
    descriptors: dict[str, dict[str, Any]]
    journal: dict[str, Any]
    busy: bytes

    @classmethod
    def read(cls, directory: MachineDirectory) -> Recovery:
        """Raises NotRunning where no QEMU of it lives, Refused for what this code cannot read."""
        try:
            record = unseal(directory.machine.read_bytes())
        except OSError as error:
            raise NotRunning(
                f"there is nothing in {directory.path} from which the machine could be taken up: "
                f"{error}",
                hint="it had not started yet, or has ended",
            ) from None
        except Damaged as error:
            what = f"machine {directory.name} cannot be taken up: {directory.machine}: {error}"
            pid = directory.left_running()
            if pid is None:
                raise NotRunning(what, hint="its QEMU has ended too", guest="dead") from None
            raise Refused(
                what,
                hint=f"its QEMU (pid {pid}) runs on; end it, and start the machine again",
                guest="running without a supervisor",
            ) from None
        if record["format"] != FORMAT:
            raise Refused(
                f"machine {directory.name} was kept by another version of Segue",
                hint="recover it with that version",
            )
        machine, descriptors = record["machine"], record["descriptors"]
        said = journal.read(directory.journal) or {"phase": "done"}
        if "incumbent" not in said:
            first = machine["instances"][0]["instance"]
            said |= {"incumbent": {key: first[key] for key in ("pid", "start_time")}}
        busy = Path(directory.path, "clients")
        recovery = cls(
            directory, machine, descriptors, said, busy.read_bytes() if busy.exists() else b""
        )
        if not any(map(_lives, recovery._processes())):
            raise NotRunning(
                f"the QEMU of machine {directory.name} has ended too",
                hint="start the machine again with `segue run`",
                guest="dead",
            )
        return recovery

    @property
    def phase(self) -> str:
        phase: str = self.journal["phase"]
        return phase

    @property
    def _upgrading(self) -> bool:
        return self.phase not in ("done", resume.PHASE)

    def _processes(self) -> list[dict[str, Any]]:
        saved = [each["instance"] for each in self.machine["instances"]]
        named = [self.journal.get(key) for key in ("incumbent", "successor")]
        return [*saved, *(each for each in named if each)]

    def _saved(self, process: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """What machine.json knows of an instance that the journal names."""
        for each in self.machine["instances"]:
            saved: dict[str, Any] = each["instance"]
            if process is not None and _same(saved, process):
                return saved
        return None

    async def take_up(self, stack: contextlib.ExitStack, detached: bool) -> Supervisor:
        os.chdir(self.machine["directory"])
        line, machine = checkpoint.described(self.machine)
        store = None if detached else Store.of_systemd()
        supervisor = Supervisor(self.directory, line, detached=detached, store=store)
        supervisor.handle_signals()
        stored = supervisor.store.open(mark(line, machine))
        loader = Loader(False, self._take_back(stored), held=self._upgrading)
        checkpoint.close_all(stored)
        self.machine["detached"] = detached
        self.machine["receipts"] = self.directory.read_receipts()[-1000:]
        await supervisor.take_up(stack, self.machine, loader)
        receipt = self._receipt(supervisor)
        live = await self._decide(supervisor, loader, receipt)
        for gone in supervisor.guards.keys() - {live.number}:
            del supervisor.guards[gone]
        supervisor.adopt(live)
        supervisor.keeper.load({str(live.number): await self._deposits(live)})
        supervisor.serve(live)
        supervisor.journal.write("done", live, None)
        supervisor.server.load(self.machine["qmp"], loader, self.busy)
        supervisor.go_on(stack)
        checkpoint.close_all(loader)
        if receipt is not None:
            receipt.kept = supervisor.machine.receipts_of(live.pid)
            supervisor.record(receipt.to_json())
        await supervisor.refresh()
        await supervisor.guest_may_have_ended()
        return supervisor

    def _receipt(self, supervisor: Supervisor) -> Receipt | None:
        """Of the upgrade that was under way; the dead have left none."""
        if not self._upgrading:
            return None
        binary = supervisor.binary
        receipt = Receipt(machine=supervisor.name, started=time.time())
        receipt.source = Side(
            str(binary.path),
            binary.version_text,
            binary.build_id,
            self.journal["incumbent"]["pid"],
        )
        receipt.failed(SegueError(f"the supervisor was killed in phase {self.phase}"))
        return receipt

    # -- descriptors ------------------------------------------------------------------------

    def _take_back(self, stored: Loader) -> dict[str, int]:
        """Duplicates of all that a living instance holds, or else systemd."""
        living = {
            saved["number"]: saved["pid"]
            for each in self.machine["instances"]
            if _lives(saved := each["instance"])
        }
        holdings = {pid: _holdings(pid) for pid in living.values()}
        found = {}
        for name, entry in self.descriptors.items():
            place = _find(entry, living, holdings)
            if place is not None:
                with contextlib.suppress(OSError):
                    found[name] = duplicate_of(*place)
            elif (fd := stored.fd(name)) is not None:
                if identity("self", fd) == entry["identity"]:
                    found[name] = fd
                else:
                    os.close(fd)
        return found

    async def _deposits(self, live: Instance) -> dict[str, Any]:
        """What QEMU holds for the dead, it goes on to hold for us: we may be killed as well, at
        once. What nobody asks for, it is to let go of.
        """
        listed = await live.monitor.execute("query-fdsets")
        ours = {
            fd["fd"]: each["fdset-id"]
            for each in listed
            if each["fdset-id"] >= FDSETS
            for fd in each["fds"]
        }
        there = {live.pid: _identities(live.pid, ours)}
        deposits = {}
        for name, entry in self.descriptors.items():
            place = _find(entry, {live.number: live.pid}, there)
            if place is not None and (fdset := ours.pop(place[1], None)) is not None:
                deposit = Deposit(entry["identity"], fdset, place[1])
                deposits[name] = asdict(deposit)
        for number, fdset in ours.items():
            with contextlib.suppress(SegueError):
                arguments = {"fdset-id": fdset, "fd": number}
                await live.monitor.execute("remove-fd", arguments)
        return deposits

    # -- the upgrade that was under way -----------------------------------------------------

    async def _decide(
        self, supervisor: Supervisor, loader: Loader, receipt: Receipt | None
    ) -> Instance:
        """The instance that goes on; no other lives any more. Raises SegueError, GuestLost."""
        incumbent, successor = self.journal["incumbent"], self.journal.get("successor")
        if self.phase == "done":
            return await self._only(supervisor, loader, incumbent)
        if self.phase == resume.PHASE:
            live = await self._only(supervisor, loader, incumbent)
            await resume.finish(self.journal, live)
            await _usual_settings(live)
            return live
        assert receipt is not None
        if self.phase == "release":
            return await self._finish(supervisor, loader, receipt, None)
        if self.phase == "commit" and successor is not None:
            paused = not self.journal.get("running", True)
            if paused and not _lives(incumbent):
                return await self._finish(supervisor, loader, receipt, None)
            if not paused:
                asked = await self._ask(supervisor, loader, successor)
                if asked is not None:
                    return await self._finish(supervisor, loader, receipt, asked)
        return await self._undo(supervisor, loader, receipt)

    async def _ask(
        self, supervisor: Supervisor, loader: Loader, successor: dict[str, Any]
    ) -> Instance | None:
        """The successor if the guest has run on it, None if it has not. Raises GuestLost."""
        try:
            instance = await self._load(supervisor, loader, successor)
            status = (await instance.monitor.execute("query-status", timeout=10))["status"]
        except (SegueError, TimeoutError) as error:
            pid = self.journal["incumbent"]["pid"]
            raise GuestLost(
                "nobody can tell whether the guest has run on the successor: "
                f"{getattr(error, 'what', 'it does not answer')}",
                hint=f"the incumbent (pid {pid}) is paused and must not be resumed; "
                "end both, and start the machine again",
                guest="unknown",
            ) from None
        if status in _NOT_RUN:
            await instance.kill()
            return None
        return instance

    async def _only(
        self, supervisor: Supervisor, loader: Loader, process: dict[str, Any]
    ) -> Instance:
        await self._kill_all_but(process)
        return await self._load(supervisor, loader, process)

    async def _finish(
        self,
        supervisor: Supervisor,
        loader: Loader,
        receipt: Receipt,
        successor: Instance | None,
    ) -> Instance:
        process = self.journal["successor"]
        old = self._saved(self.journal["incumbent"])
        await self._kill_all_but(process)
        live = successor or await self._load(supervisor, loader, process)
        supervisor.instance = live
        with contextlib.suppress(SegueError):  # else it is told as what it was
            supervisor.upgraded(await probe(live.argv[0]))
        for kept in supervisor.machine.kept:
            kept.switch(live.number)
        for kept in supervisor.machine.kept:
            if old is not None:
                kept.drop(old["number"])
            try:
                await kept.settle(live.monitor)
            except SegueError as error:
                receipt.warnings.append(f"{kept.kind} {kept.name}: {error.what}")
        await _usual_settings(live)
        binary = supervisor.binary
        receipt.target = Side(str(binary.path), binary.version_text, binary.build_id, live.pid)
        receipt.warnings.append(f"finished after the supervisor was killed in phase {self.phase}")
        receipt.result, receipt.error = DONE, None
        receipt.guest = "running on the successor"
        return live

    async def _undo(self, supervisor: Supervisor, loader: Loader, receipt: Receipt) -> Instance:
        process = self.journal["incumbent"]
        if not _lives(process):
            raise GuestLost(
                f"the incumbent (pid {process['pid']}) died before the upgrade was at its end",
                hint="see the machine's qemu.log",
                guest="lost",
            )
        await self._kill_all_but(process)
        live = await self._load(supervisor, loader, process)
        if directory := self.journal.get("directory"):
            # It was being suspended: the guest is to go on here, and so nowhere else.
            discard(Path(directory))
        supervisor.instance = live
        for kept in supervisor.machine.kept:
            kept.restore()
        await migration.cancel(live.monitor)
        status = (await live.monitor.execute("query-status"))["status"]
        if self.journal.get("running", True) and status in _STOPPED_BY_US:
            if await interrupts.can_be_lost(live, supervisor.binary):
                with contextlib.suppress(QemuError):
                    await interrupts.give_again(live)
            await live.monitor.execute("cont")
        await _usual_settings(live)
        successor = self._saved(self.journal.get("successor"))
        for kept in supervisor.machine.kept:
            kept.give_back()
            if successor is not None:
                kept.drop(successor["number"])
        receipt.result = FAILED
        return live

    async def _load(
        self, supervisor: Supervisor, loader: Loader, process: dict[str, Any]
    ) -> Instance:
        for each in self.machine["instances"]:
            if _same(each["instance"], process):
                try:
                    return await checkpoint.load_instance(supervisor, each, loader)
                except KeyError:
                    break
        raise SegueError(
            f"QEMU (pid {process['pid']}) cannot be reached: its monitor is lost",
            hint=f"its guest may run on; end it with: kill {process['pid']}",
            guest="unknown",
        )

    async def _kill_all_but(self, survivor: dict[str, Any]) -> None:
        """Raises TimedOut if one does not die."""
        doomed = [each for each in self._processes() if _lives(each) and not _same(each, survivor)]
        pids = {each["pid"] for each in doomed} | set(self._strays())
        for pid in pids - {survivor["pid"], os.getpid()}:
            await asyncio.to_thread(kill, pid)

    def _strays(self) -> list[int]:
        """QEMUs on this machine's memory that neither the journal nor machine.json knows yet."""
        memory = [
            tuple(entry["identity"])
            for name, entry in self.descriptors.items()
            if name.endswith(".memory")
        ]
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdecimal():
                with contextlib.suppress(OSError):
                    words = Path("/proc", entry, "cmdline").read_bytes()
                    if f"chardev:{MONITOR_ID}".encode() in words and any(
                        tuple(each) in memory for each in _holdings(int(entry))
                    ):
                        found.append(int(entry))
        return found


async def _usual_settings(instance: Instance) -> None:
    listed = await instance.monitor.execute("query-migrate-capabilities")
    capabilities = {each["capability"]: False for each in listed}
    settings = migration.Settings(capabilities, _DEFAULTS, described=True)
    with contextlib.suppress(SegueError):
        await migration.restore(instance.monitor, settings)


def _find(
    entry: Mapping[str, Any],
    living: Mapping[int, int],
    holdings: Mapping[int, Mapping[tuple[str, ...], int]],
) -> tuple[int, int] | None:
    """Process and number of a descriptor of machine.json."""
    for number, fd in entry["held"].items():
        pid = living.get(int(number))
        with contextlib.suppress(OSError):
            if pid is not None and identity(pid, fd) == entry["identity"]:
                return pid, fd
    wanted: Identity = entry["identity"]
    if not wanted[-1].startswith("anon_inode:"):
        for pid, held in holdings.items():
            if tuple(wanted) in held:
                return pid, held[tuple(wanted)]
    return None


def _holdings(pid: int) -> dict[tuple[str, ...], int]:
    return _identities(pid, map(int, os.listdir(f"/proc/{pid}/fd")))


def _identities(pid: int, fds: Iterable[int]) -> dict[tuple[str, ...], int]:
    held: dict[tuple[str, ...], int] = {}
    for fd in fds:
        with contextlib.suppress(OSError):
            held.setdefault(tuple(identity(pid, fd)), fd)
    return held


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return bool(one["pid"] == other["pid"] and one["start_time"] == other["start_time"])


def _lives(process: Mapping[str, Any]) -> bool:
    return is_alive(process["pid"], process["start_time"])
