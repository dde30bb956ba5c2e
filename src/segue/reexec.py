"""The supervisor executes newly installed code in its own place (segue.cpr): `segue reexec`.

The guest is not paused, and QEMU does not notice. The new code is asked first; then no command is
passed on any more, those under way are waited for, the state is taken, and exec() is called by the
command line that started the process: whatever it finds there now is the new code. For the
fraction of a second until that has loaded, what clients send and what QEMU says waits in their
sockets. If it does not load, the old code is executed again.
"""

from __future__ import annotations

import segue.lean  # isort: skip  (before asyncio)

import asyncio
import contextlib
import gc
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import segue
from segue.cpr import CprError, Descriptor, How, Question, State, restart, resumed, section
from segue.cpr import Refused as StateRefused
from segue.errors import Refused, SegueError

if TYPE_CHECKING:
    from segue.qmp.server import Client
    from segue.supervisor import Supervisor

_PATIENCE = 10.0
"""Seconds for what clients have asked of QEMU."""
_ANSWER = 30.0
"""Seconds for the new code to say whether it can."""


@section("segue-machine", version=1)
@dataclass(frozen=True)
class Machine:
    """`data` is checkpoint.py's, which has a version of its own."""

    data: dict[str, Any]
    lock: Descriptor
    descriptors: tuple[Descriptor, ...]

    def post_load(self, version: int) -> Machine:
        from segue import checkpoint

        try:
            checkpoint.described(self.data)
        except SegueError as error:
            raise StateRefused(error.what, error.hint) from error
        return self


async def reexec(supervisor: Supervisor, asker: Client | None, python: str | None = None) -> None:
    """Never returns, or raises SegueError and all goes on as before.

    `asker` is the QMP client that the next process is to answer; `python` the interpreter, if it
    is to be another one.
    """
    if supervisor.upgrader.busy:
        raise Refused(
            "an upgrade of this machine is under way", hint="try again when it is at its end"
        )
    argv = [python or sys.executable, *sys.orig_argv[1:]]
    try:
        await _ask(_state(supervisor, asker), argv)
        await _quiet(supervisor, asker)
        try:
            restart(_state(supervisor, asker), argv, asked=True)
        finally:
            supervisor.gate.open()
    except CprError as error:
        refused = isinstance(error, StateRefused)
        kind = Refused if refused else SegueError
        raise kind(
            f"the supervisor was not replaced: {error.what}",
            hint=error.hint,
            guest="running, under the supervisor of before",
        ) from error


def _state(supervisor: Supervisor, asker: Client | None) -> State:
    from segue import checkpoint
    from segue.saved import Saver

    saver = Saver(exact=True)
    data = checkpoint.save(supervisor, saver, asker)
    lock = supervisor.directory.lock_descriptor
    assert lock is not None
    return State(
        Machine(
            data,
            Descriptor("lock", lock),
            tuple(Descriptor(name, each.fd) for name, each in saver.found.items()),
        )
    )


async def _ask(state: State, argv: list[str]) -> None:
    """Raises CprError unless the new code can."""
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[None] = loop.create_future()
    with Question(state, argv, timeout=_ANSWER) as question:
        loop.add_reader(question.fileno(), _resolve, answered)
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(answered, _ANSWER)
            question.answer()
        finally:
            loop.remove_reader(question.fileno())


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _quiet(supervisor: Supervisor, asker: Client | None) -> None:
    """Nothing is under way afterwards. Raises Refused, saying what was, and lets all go on."""
    supervisor.gate.close()
    try:
        for kept in supervisor.machine.kept:
            await kept.quiet()
        await supervisor.keeper.quiet()
        async with asyncio.timeout(_PATIENCE):
            await supervisor.gate.drain(_PATIENCE)
            server, monitor = supervisor.server, supervisor.instance.monitor
            while not monitor.idle or server.why_not_quiet(asker):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        if supervisor.upgrader.busy:
            raise Refused("an upgrade of this machine has begun")
    except BaseException as error:
        supervisor.gate.open()
        if isinstance(error, TimeoutError):
            raise Refused(
                supervisor.server.why_not_quiet(asker) or "QEMU does not answer",
                hint="try again when that is done",
            ) from None
        raise


def main() -> int:
    """The process has executed this code: go on with the machine.

    Nothing is collected while it loads, when clients wait; and what is loaded stays.
    """
    gc.disable()
    return asyncio.run(_go_on())


async def _go_on() -> int:
    with resumed() as arrival:
        assert arrival is not None
        machine = arrival.load(Machine).get(Machine)
        from segue import checkpoint
        from segue.machines import MachineDirectory
        from segue.qemu.commandline import CommandLine
        from segue.saved import Loader
        from segue.store import Store
        from segue.supervisor import Supervisor

        data = machine.data
        directory = MachineDirectory.owned(data["name"], machine.lock.fd)
        line = CommandLine.parse(data["command"])
        store = None if data["detached"] else Store.of_systemd()
        supervisor = Supervisor(directory, line, detached=data["detached"], store=store)
        supervisor.handle_signals()
        loader = Loader(True, {each.name: each.fd for each in machine.descriptors})
        stack = contextlib.ExitStack()
        await supervisor.take_up(stack, data, loader)
        instance = await checkpoint.load_instance(supervisor, data["instances"][0], loader)
        supervisor.adopt(instance)
        supervisor.serve(instance)
        supervisor.server.load(data["qmp"], loader)
        supervisor.go_on(stack)
        checkpoint.close_all(loader)
    gc.freeze()
    gc.enable()
    if arrival.how is How.BACK:
        why = SegueError(
            f"the new code did not get ready: {arrival.reason}",
            guest="running, under the supervisor of before",
        )
        supervisor.not_replaced(why)
    else:
        supervisor.server.answer_asker({"return": {"segue": segue.__version__, "pid": os.getpid()}})
    return await supervisor.live(stack)
