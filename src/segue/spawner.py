"""How a machine's instances are started."""

from __future__ import annotations

import socket
import subprocess
from typing import TYPE_CHECKING

from segue.errors import SegueError
from segue.kept.base import Lending
from segue.qemu.instance import Instance

if TYPE_CHECKING:
    from segue.supervisor import Supervisor


def spawn(supervisor: Supervisor, lending: Lending) -> Instance:
    """Start an instance, not yet connected."""
    argv = supervisor.machine.argv(lending)
    guard = lending.guard
    guard.arm()
    try:
        instance = Instance.spawn(
            lending.number,
            [*argv, *guard.arguments],
            (*lending.descriptors, *guard.descriptors),
            on_stderr=supervisor.voice.of_qemu,
            stdout=supervisor.voice.stdout,
            before_exec=guard.before_exec if guard.armed else None,
        )
    except subprocess.SubprocessError:
        raise SegueError(f"QEMU's guard: {guard.why_not_started()}") from None
    guard.serve()
    if guard.armed:
        supervisor.guards[lending.number] = guard
    supervisor.adopt(instance)
    return instance


def launch(
    supervisor: Supervisor,
    lending: Lending,
    argv: list[str],
    ends: tuple[socket.socket, socket.socket],
    command: list[str],
    environment: dict[str, str],
) -> Instance:
    """As `spawn`, by way of a program that is told what to execute (upgrade/launcher.py)."""
    instance = Instance.launch(
        lending.number,
        argv,
        ends,
        (),
        on_stderr=supervisor.voice.of_qemu,
        stdout=supervisor.voice.stdout,
        command=command,
        environment=environment,
    )
    supervisor.adopt(instance)
    return instance
