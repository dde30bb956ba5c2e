"""segue stop: power the guest off; if it does not listen, quit QEMU; if that hangs, kill it."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from segue import machines
from segue.cli import output
from segue.cli.upgrade import positive
from segue.errors import MonitorClosed, SegueError

if TYPE_CHECKING:
    from segue.cli.parser import Commands

# The guest's power-off, where no --timeout is given, and what quit and kill may take after it.
_POWERDOWN = 60.0
_AFTERWARDS = 30.0

_HOW = {
    "powerdown": "the guest has powered itself off",
    "quit": "the guest did not power itself off; its QEMU was told to quit",
    "kill": "neither the guest nor its QEMU obeyed; QEMU was killed",
}

_DESCRIPTION = """\
End a machine: press the guest's power button, and wait until it has shut down.
If it has not in time, its QEMU is told to quit, and killed if that hangs too."""


def declare(commands: Commands) -> None:
    parser = commands.add_parser("stop", help="end a machine", description=_DESCRIPTION)
    parser.add_argument("name", metavar="NAME", help="the machine")
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=positive,
        default=_POWERDOWN,
        help="how long the guest may take to shut down (default: %(default)g seconds)",
    )
    parser.add_argument("--json", action="store_true", help="print an object")
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> int:
    machine = machines.find(arguments.name)
    from segue.cli import connection

    if output.is_lively(sys.stderr):
        output.say(
            f"{machine.name}: its power button is pressed; it has {arguments.timeout:g} seconds"
        )
    try:
        answer = connection.ask(
            machine,
            "segue-stop",
            {"timeout": arguments.timeout},
            timeout=arguments.timeout + _AFTERWARDS,
        )
    except KeyboardInterrupt:
        output.tell_failure(
            f"interrupted; machine {machine.name} is being stopped all the same",
            hint="segue ls shows when it has gone",
        )
        raise
    except MonitorClosed:
        answer = {"how": None}  # it ended before it could say how
    # So that the name is free again when this command has ended.
    if not machines.wait_until_gone(machine, timeout=_AFTERWARDS):
        raise SegueError(
            f"the guest of machine {machine.name} has ended, but its supervisor "
            f"(pid {machine.supervisor_pid}) has not",
            hint=f"see its log: {machine.directory.log}",
        )
    if arguments.json:
        output.print_json({"name": machine.name, **answer})
    else:
        print(f"{machine.name}: {_HOW.get(answer['how'], 'ended')}")
    return 0
