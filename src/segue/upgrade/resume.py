"""resume: a guest that lies in a directory (suspended.py) goes on in a new instance.

    what is written, in this order                     killed after it
    journal: phase resume, the QEMU's pid              that QEMU is ended, the directory stays
    directory: `resuming`, `may_run` false             the same, by `recover` or the next `resume`
    (the state is loaded)
    run directory: machine.json                        the same
    directory: `may_run` true                          `recover` goes on with that QEMU; `resume`
    (cont)                                               refuses while it lives
    directory: removed                                 `recover` goes on with that QEMU
    journal: phase done

So the guest has one QEMU or lies in the directory, never both.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segue.errors import CommandFailed, GuestLost, NotRunning, SegueError
from segue.kept.base import Lending
from segue.kept.processes import kill
from segue.kept.ram import GuestRam
from segue.machines import is_alive
from segue.qemu import migration
from segue.qemu.instance import Instance
from segue.qemu.migration import MigrationWatch
from segue.suspended import Suspended
from segue.upgrade import breakpoints, interrupts, scout

if TYPE_CHECKING:
    from segue.supervisor import Supervisor

PHASE = "resume"
"""What the journal says from when there is a QEMU until the directory is removed."""

_LIMIT = 120.0
"""Seconds for the device state; its size is that of firmware and video memory."""
_ANSWER = 10.0
_NOT_RUN = frozenset({"inmigrate", "prelaunch", "paused", "postmigrate"})


async def lending(suspended: Suspended, supervisor: Supervisor) -> Lending:
    """What a resumed machine is given is what a successor would be."""
    machine = supervisor.machine
    machine.values.recall(suspended.machine["values"])
    cpu = await scout.cpu(machine, supervisor.binary) if machine.values.cpu else {}
    ram = [kept for kept in machine.kept if isinstance(kept, GuestRam)]
    await asyncio.to_thread(suspended.fill, ram)
    return Lending(supervisor.upgrader.next_number(), supervisor.binary, cpu)


async def load(suspended: Suspended, instance: Instance) -> migration.Settings:
    """Load the state; the guest does not run yet. Raises SegueError with QEMU's reason.

    Returns the settings for migrations that are to be put back when it runs.
    """
    monitor = instance.monitor
    before = await migration.configure(monitor, migration.RECEIVER - {"return-path"})
    watch = MigrationWatch(instance)
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            await monitor.execute("getfd", {"fdname": "segue"}, fds=[theirs.fileno()])
        async with asyncio.timeout(_LIMIT):
            await monitor.execute("migrate-incoming", {"uri": "fd:segue"})
            sending = asyncio.ensure_future(_send(suspended, ours))
            try:
                await watch.until("completed")
            finally:
                sending.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await sending
    except TimeoutError:
        raise _failed(suspended, f"it took longer than {_LIMIT:g} s") from None
    except SegueError as error:
        raise _failed(suspended, (await _cause(error, instance)).what) from None
    finally:
        ours.close()
        watch.close()
    return before


async def _cause(error: SegueError, instance: Instance) -> SegueError:
    """QEMU's own last words, where it has ended."""
    try:
        await instance.wait(timeout=2)
    except TimeoutError:
        return error
    return await instance.death()


def _failed(suspended: Suspended, why: str) -> SegueError:
    return SegueError(
        f"the suspended guest could not be loaded: {why}",
        hint="resume it with the QEMU that it was suspended from: --to BIN",
        guest=f"suspended in {suspended.directory}",
    )


async def _send(suspended: Suspended, sock: socket.socket) -> None:
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    with suspended.state.open("rb") as file:
        while chunk := file.read(1 << 20):
            await loop.sock_sendall(sock, chunk)
    sock.shutdown(socket.SHUT_WR)


def begin(suspended: Suspended, host: Supervisor) -> None:
    """There is a QEMU for the guest, which must not run yet. Raises SegueError."""
    journal = host.journal
    journal.running = suspended.machine["running"]
    journal.directory = suspended.directory
    host.gate.close()
    journal.write(PHASE, host.instance, None)
    breakpoints.die_at("journal")
    _mark(suspended, host.instance, may_run=False)
    breakpoints.die_at("marked")


async def go_on(suspended: Suspended, host: Supervisor, before: migration.Settings) -> None:
    """Let the guest run, and make sure that this is never done twice. Raises SegueError.

    `before` is what `load` gave.
    """
    instance = host.instance
    breakpoints.die_at("loaded")
    # From here on the machine can be taken up.
    await host.keeper.safeguard()
    try:
        if suspended.machine["running"]:
            if suspended.machine["loses_interrupts"]:
                await interrupts.give_again(instance)
            _mark(suspended, instance, may_run=True)
            breakpoints.die_at("may-run")
            await instance.monitor.execute("cont")
        else:
            _mark(suspended, instance, may_run=True)
    except SegueError as error:
        await instance.kill()
        if isinstance(error, CommandFailed):  # QEMU would not, and so it has not run
            _mark(suspended, instance, may_run=False)
        raise
    breakpoints.die_at("cont")
    suspended.resumed()
    breakpoints.die_at("removed")
    with contextlib.suppress(SegueError):  # it has ended again: that is noticed elsewhere
        await migration.restore(instance.monitor, before)
    host.journal.directory = None
    host.journal.write("done", instance, None)
    host.gate.open()


def _mark(suspended: Suspended, instance: Instance, *, may_run: bool) -> None:
    try:
        suspended.resuming(instance.pid, instance.start_time, may_run=may_run)
    except OSError as error:
        raise SegueError(
            f"cannot write into {suspended.directory}: {error.strerror}",
            hint="without a mark in it, it could be resumed twice",
            guest=f"suspended in {suspended.directory}",
        ) from None


# -- a resuming whose supervisor was killed ---------------------------------------------------


def end_what_must_not_run(said: Mapping[str, Any] | None) -> None:
    """Before a machine is taken up whose journal says `said`.

    As long as its directory can be resumed, a QEMU of it must not be: that is ended. Raises
    NotRunning then, Refused while somebody else is resuming it.
    """
    if said is None or said["phase"] != PHASE:
        return
    suspended = Suspended.left_in(Path(said["directory"]))
    if suspended is None:
        return
    try:
        ours = said["incumbent"]
        if suspended.may_run and suspended.process_is(ours):
            return
        if is_alive(ours["pid"], ours["start_time"]):
            kill(ours["pid"])
        suspended.not_resumed()
    finally:
        suspended.close()
    raise NotRunning(
        f"the resuming was interrupted; the guest lies in {suspended.directory} as before",
        hint=f"segue resume {suspended.directory}",
        guest=f"suspended in {suspended.directory}",
    )


async def finish(said: Mapping[str, Any], instance: Instance) -> None:
    """The guest may have been told to run: now it is, and not from the directory again.

    Raises SegueError.
    """
    suspended = Suspended.left_in(Path(said["directory"]))
    if suspended is None:
        return
    try:
        status = (await instance.monitor.execute("query-status", timeout=_ANSWER))["status"]
        if said["running"] and status in _NOT_RUN:
            await instance.monitor.execute("cont", timeout=_ANSWER)
        suspended.resumed()
    except TimeoutError:
        raise GuestLost(
            f"QEMU (pid {instance.pid}) does not answer, and may have been told to run the guest",
            hint=f"again: segue recover, or end it and: segue resume {suspended.directory}",
            guest="unknown",
        ) from None
    finally:
        suspended.close()
