"""How a supervisor comes to be: started, resumed from a directory, or in place of one that died."""

from __future__ import annotations

import segue.lean  # noqa: F401  # isort: skip  (before asyncio)

import asyncio
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from segue.detach import SIGNALS, detached
from segue.kept.user import AUTO
from segue.machines import MachineDirectory, default_name
from segue.qemu.commandline import CommandLine
from segue.store import Store
from segue.supervisor import Supervisor
from segue.suspended import Suspended

Ready = Callable[[], None]


def run(
    name: str | None,
    argv: list[str],
    *,
    detach: bool,
    stay: bool = False,
    net_user: str = AUTO,
) -> int:
    """`segue run`: the exit status is QEMU's own. Raises SegueError for bad input.

    `stay` says that somebody watches this process, whatever the command line says of -daemonize.
    """
    line = CommandLine.parse(argv)
    if line.only_prints:
        os.execvp(argv[0], argv)  # noqa: S606
    if detach or (line.daemonize and not stay):
        return detached(partial(_supervise, name, line, detached=True, net_user=net_user))
    return _supervise(name, line, tell_systemd, detached=False, net_user=net_user)


def run_suspended(suspended: Suspended, name: str, to: Path | None, *, detach: bool) -> int:
    """`segue resume`: as `run`, with the guest that lies in a directory."""
    line = CommandLine.parse(suspended.argv)
    os.chdir(suspended.machine["directory"])
    more = {
        "suspended": suspended,
        # As for an upgrade: the path of the QEMU that ran it, not of the one it was started with.
        "to": to or Path(suspended.machine["binary"]),
        "net_user": suspended.machine.get("net_user", AUTO),
    }
    if detach:
        return detached(partial(_supervise, name, line, detached=True, **more))
    return _supervise(name, line, tell_systemd, detached=False, **more)


def recover(name: str, *, detach: bool) -> int:
    """`segue recover`: a machine whose supervisor was killed is taken up; see recovery.py."""
    from segue import recovery

    def supervise(ready: Ready) -> int:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        return recovery.recover(MachineDirectory.take_over(name), ready, detached=detach)

    return detached(supervise) if detach else supervise(tell_systemd)


def tell_systemd() -> None:
    """The machine is up, for Type=notify. Without systemd nothing happens."""
    if "NOTIFY_SOCKET" in os.environ:
        from segue.cpr.systemd import Notifier

        Notifier.from_environment().ready()


def _supervise(
    name: str | None, line: CommandLine, ready: Ready, *, detached: bool, **more: Any
) -> int:
    # Until the loop can handle them: what is made from here on must not be left behind.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    directory = MachineDirectory.create(name or default_name(line.argv()))
    # What a detached machine's caller was told by systemd, and given, was not meant for it.
    store = None if detached else Store.of_systemd()
    supervisor = Supervisor(directory, line, detached=detached, store=store, **more)
    return asyncio.run(supervisor.run(ready))
