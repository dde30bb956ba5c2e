"""segue reexec: supervisors run newly installed Segue code, in place."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from segue import machines
from segue.cli import output
from segue.errors import Partial, SegueError, UsageError

if TYPE_CHECKING:
    from segue.cli.parser import Commands

# Longer than the supervisor waits for the new code, and for what its clients have asked.
_PATIENCE = 60.0

_DESCRIPTION = """\
Have a machine's supervisor run the Segue that is installed now, or a newer
Python, in its own process. The guest is not paused; consoles and QMP clients
stay connected. The new code is asked first whether it can take the machine
over; if it cannot, the old code goes on."""


def declare(commands: Commands) -> None:
    parser = commands.add_parser(
        "reexec",
        help="have supervisors run newly installed Segue code",
        usage="segue reexec (NAME | --all) [--python BIN] [--json]",
        description=_DESCRIPTION,
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="the machine")
    parser.add_argument("--all", action="store_true", help="every machine; goes on after errors")
    parser.add_argument(
        "--python", metavar="BIN", help="the interpreter to run it with (default: the same path)"
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> int:
    if bool(arguments.name) == arguments.all:
        raise UsageError(
            "name one machine, or say --all (not both)", hint="segue ls shows the machines"
        )
    request = {"python": os.path.abspath(arguments.python)} if arguments.python else {}
    if not arguments.all:
        outcome = _reexec(machines.find(arguments.name), request)
        _tell([outcome], arguments.json)
        return 0
    outcomes: list[dict[str, Any]] = []
    failed = False
    for listed in machines.list_machines():
        if not listed.running:
            output.say(f"{listed.name}: left out, it is {listed.state}")
            continue
        try:
            outcomes.append(_reexec(machines.find(listed.name), request))
        except SegueError as error:
            failed = True
            output.fail(error)
            outcomes.append({"name": listed.name, **error.to_json()})
    _tell(outcomes, arguments.json)
    return Partial.exit_status if failed else 0


def _reexec(machine: machines.MachineStatus, request: dict[str, Any]) -> dict[str, Any]:
    from segue.cli import connection

    answer = connection.ask(machine, "segue-reexec", request, timeout=_PATIENCE)
    return {"name": machine.name, **answer}


def _tell(outcomes: list[dict[str, Any]], json: bool) -> None:
    if json:
        output.print_json(outcomes)
        return
    for outcome in outcomes:
        if "error" not in outcome:
            print(f"{outcome['name']}: its supervisor runs Segue {outcome['segue']} now")
