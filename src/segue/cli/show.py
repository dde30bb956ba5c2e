"""segue show: everything about one machine."""

from __future__ import annotations

import json
import shlex
from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from segue import machines
from segue.cli import output
from segue.cli.ls import outdated_why

if TYPE_CHECKING:
    from segue.cli.parser import Commands

_DESCRIPTION = """\
Show one machine: which QEMU runs it, what is kept when that is replaced and by
which identity, what is not, and what stands in the way of an upgrade."""


def declare(commands: Commands) -> None:
    parser = commands.add_parser(
        "show", help="show everything about a machine", description=_DESCRIPTION
    )
    parser.add_argument("name", metavar="NAME", help="the machine")
    parser.add_argument(
        "--command",
        dest="command_lines",
        action="store_true",
        help="print the command line you gave and the one that its QEMU was given",
    )
    parser.add_argument("--json", action="store_true", help="print an object")
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> int:
    machine = machines.find(arguments.name)
    from segue.cli import connection

    status = connection.ask(machine, "segue-query")
    status["outdated_why"] = outdated_why(status)  # the supervisor does not look by itself
    status["outdated"] = status["outdated_why"] is not None
    if arguments.json:
        # `started` is the supervisor's own note for the check just made.
        status.pop("started", None)
        if arguments.command_lines:
            status = {key: status[key] for key in ("command", "instance_command")}
        output.print_json(status)
    elif arguments.command_lines:
        print("# as you gave it")
        print(shlex.join(status["command"]))
        print(f"# as QEMU {status['qemu_version']} (pid {status['qemu_pid']}) was given it")
        print(shlex.join(status["instance_command"]))
    else:
        _show(status)
    return 0


def _show(status: Mapping[str, Any]) -> None:
    output.print_fields(
        [
            ("name", status["name"]),
            ("state", status["state"]),
            ("QEMU", f"{status['qemu_version']}, pid {status['qemu_pid']}, {status['binary']}"),
            ("outdated", status["outdated_why"] or "no"),
            ("machine type", status["machine_type"]),
            ("RAM", output.size(status["ram_bytes"])),
            ("since", f"{output.moment(status['since'])} ({output.age(status['since'])})"),
            ("upgrades", status["upgrades"]),
            ("supervisor", f"pid {status['supervisor_pid']}"),
            ("run directory", status["run_directory"]),
            ("console", status["console"]),
            ("log", status["log"]),
        ]
    )
    for kept in status["kept"]:
        print(f"keeps     {kept['kind']} {kept['name']}{_identity(kept.get('identity'))}")
    for loss in status["not_kept"]:
        print(output.one_line(f"loses     {loss['what']}: {loss['why']}"))
    for blocker in status["blockers"]:
        print(f"blocker   {output.blocker_text(blocker)}")


def _identity(identity: Mapping[str, Any] | None) -> str:
    if not identity:
        return ""
    said = (
        f"{key}={value if isinstance(value, str | int) else json.dumps(value)}"
        for key, value in identity.items()
    )
    return f"  ({', '.join(said)})"
