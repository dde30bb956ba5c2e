"""What is told of a machine: by `segue-query`, to whoever lists machines, and to who resumes it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import segue

if TYPE_CHECKING:
    from segue.supervisor import Supervisor


def report(supervisor: Supervisor) -> dict[str, Any]:
    """What `segue-query` answers and status.json holds (see machines.py)."""
    instance = supervisor.instance
    outdated = supervisor.outdated()
    return {
        "name": supervisor.directory.name,
        "state": "upgrading" if supervisor.upgrader.busy else supervisor.state,
        "qemu_version": supervisor.binary.version_text,
        "machine_type": supervisor.machine.values.machine_type,
        "qemu_pid": instance.pid,
        "qemu_start_time": instance.start_time,
        "supervisor_pid": os.getpid(),
        "supervisor_start_time": supervisor.start_time,
        "ram_bytes": supervisor.machine.ram_bytes,
        "since": supervisor.since,
        "upgrades": supervisor.upgrades,
        "outdated": outdated is not None,
        "outdated_why": outdated,
        "binary": str(supervisor.binary.path),
        "started": supervisor.started.to_json() if supervisor.started else None,
        "command": supervisor.line.argv(),
        "instance_command": instance.argv,
        "kept": supervisor.machine.receipts_of(instance.pid),
        "not_kept": [note.to_json() for note in supervisor.machine.draft.notes],
        "blockers": [blocker.to_json() for blocker in supervisor.machine.draft.blockers],
        "console": str(supervisor.directory.console) if supervisor.machine.console() else None,
        "log": str(supervisor.directory.log),
        "run_directory": str(supervisor.directory.path),
    }


def description(supervisor: Supervisor) -> dict[str, Any]:
    """What machine.json says of the machine itself (suspended.py)."""
    return {
        "segue": segue.__version__,
        "name": supervisor.directory.name,
        "command": supervisor.line.argv(),
        "net_user": supervisor.net_user,
        "directory": os.getcwd(),
        "binary": str(supervisor.binary.path),
        "qemu_version": supervisor.binary.version_text,
        "build_id": supervisor.binary.build_id,
        "values": supervisor.machine.values.to_json(),
    }
