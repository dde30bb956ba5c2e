"""Asking a machine's supervisor: one QMP command for each connection.

Only commands that talk to a supervisor import this; it costs asyncio (40 ms).
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from segue.errors import CommandFailed, MonitorClosed, NotRunning, SegueError, TimedOut
from segue.machines import MachineStatus
from segue.qemu.monitor import Monitor

ANSWER_TIMEOUT = 10.0


def ask(
    machine: MachineStatus,
    command: str,
    arguments: dict[str, Any] | None = None,
    timeout: float | None = ANSWER_TIMEOUT,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    unanswered: type[SegueError] = TimedOut,
) -> Any:
    """What the supervisor returns for `command`.

    Raises NotRunning where nobody answers at the socket, SegueError with the supervisor's own
    words, MonitorClosed when it ends before it answers, `unanswered` when `timeout` seconds pass.
    """

    async def exchange() -> Any:
        with _woken():
            return await command_and_answer()

    async def command_and_answer() -> Any:
        try:
            monitor = await _connect(machine)
        except TimeoutError:
            raise TimedOut(*silent) from None
        try:
            if on_event is not None:
                monitor.listen(on_event)
            return await monitor.execute(command, arguments, timeout=timeout)
        except TimeoutError:
            raise unanswered(*silent) from None
        except CommandFailed as error:
            # "segue-stop: why" is how a QMP client sees it; who typed `segue stop` knows that.
            what = error.what.removeprefix(f"{command}: ")
            raise SegueError(what, error.hint, error.guest) from error
        finally:
            monitor.close()

    silent = (
        f"the supervisor of machine {machine.name} (pid {machine.supervisor_pid}) does not answer",
        f"see its log: {machine.directory.log}",
    )
    return asyncio.run(exchange())


@contextlib.contextmanager
def _woken() -> Iterator[None]:
    """Have a signal wake the loop: one that comes just before it waits would else wait with it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are not ours
        return
    loop = asyncio.get_running_loop()
    woken, waker = socket.socketpair()
    with woken, waker:
        for end in (woken, waker):
            end.setblocking(False)
        loop.add_reader(woken, woken.recv, 64)
        before = signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            loop.remove_reader(woken)


async def _connect(machine: MachineStatus) -> Monitor:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Non-blocking: a listener whose queue is full says so at once (EAGAIN) instead of hanging us.
    sock.setblocking(False)
    try:
        sock.connect(str(machine.directory.qmp))
    except OSError as error:
        sock.close()
        if machine.state == "starting":
            what = f"machine {machine.name} is still starting"
        else:
            what = f"machine {machine.name} does not answer: {error.strerror}"
        raise NotRunning(what, hint="try again in a moment") from error
    try:
        return await Monitor.connect(sock, timeout=ANSWER_TIMEOUT)
    except MonitorClosed:
        raise NotRunning(
            f"machine {machine.name} is ending", hint="segue ls shows whether it has"
        ) from None
