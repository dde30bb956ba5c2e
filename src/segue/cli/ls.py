"""segue ls: this user's machines, read from their run directories alone."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segue import machines
from segue.cli import output

if TYPE_CHECKING:
    from segue.cli.parser import Commands

_DESCRIPTION = """\
List your machines. OUTDATED says why an upgrade would be useful: the file of
the running QEMU, or a library that it uses, has been replaced since. The
supervisor of an orphaned machine has died: `segue recover` takes it up again.
Its guard, if it has a tap, is unanswered: a guest waits that sets that up anew.
"""


def declare(commands: Commands) -> None:
    parser = commands.add_parser("ls", help="list the machines", description=_DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> int:
    found = [summary(machine) for machine in machines.list_machines()]
    if arguments.json:
        output.print_json(found)
    elif found:
        output.print_table(
            "NAME STATE QEMU MACHINE PID RAM SINCE UPGRADES OUTDATED".split(),
            [_row(machine) for machine in found],
            right="PID RAM SINCE UPGRADES",
        )
    else:
        output.say("no machines")
    return 0


def summary(machine: machines.MachineStatus) -> dict[str, Any]:
    """One entry of `segue ls --json`; what is not known (any more) is null."""
    report = machine.report
    alive = machine.state != "dead"
    why = outdated_why(report) if alive else None
    return {
        "name": machine.name,
        "state": machine.state,
        "qemu_version": report.get("qemu_version"),
        "machine_type": report.get("machine_type"),
        "qemu_pid": report.get("qemu_pid") if alive else None,
        "supervisor_pid": machine.supervisor_pid if machine.running else None,
        "guard_unanswered": machine.state == "orphaned" and _is_guarded(report),
        "ram_bytes": report.get("ram_bytes"),
        "since": report.get("since"),
        "upgrades": report.get("upgrades", 0),
        "outdated": why is not None,
        "outdated_why": why,
        "binary": report.get("binary"),
        "run_directory": os.fspath(machine.directory.path),
    }


def _is_guarded(report: Mapping[str, Any]) -> bool:
    """Whether QEMU waits for a supervisor's answer when its guest sets up a network card."""
    return any(kept["kind"] == "tap" for kept in report.get("kept", ()))


def outdated_why(report: Mapping[str, Any]) -> str | None:
    """Looked up now: a package manager tells no supervisor that it has replaced a file."""
    if not report.get("started"):
        return None
    from segue.qemu.mapped import Started, outdated

    return outdated(
        report["qemu_pid"], Path(report["binary"]), Started.from_json(report["started"])
    )


def _row(machine: Mapping[str, Any]) -> list[object]:
    return [
        machine["name"],
        machine["state"] + ", guard unanswered" * machine["guard_unanswered"],
        output.version(machine["qemu_version"]),
        machine["machine_type"] or "-",
        machine["qemu_pid"] or "-",
        output.size(machine["ram_bytes"]),
        output.age(machine["since"]),
        machine["upgrades"],
        machine["outdated_why"] or "-",
    ]
