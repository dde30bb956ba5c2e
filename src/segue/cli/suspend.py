"""segue suspend: put a machine into a directory, to be resumed later."""

from __future__ import annotations

import os
import shlex
from argparse import Namespace
from typing import TYPE_CHECKING

from segue import machines
from segue.cli import output, receipts
from segue.cli.progress import Progress
from segue.errors import GuestLost

if TYPE_CHECKING:
    from segue.cli.parser import Commands

# Memory is written at the speed of a disk.
_LONGEST = 4000.0

_DESCRIPTION = """\
Put a machine into a directory: its memory, the state of its devices, and all
that is needed to go on later (segue resume), with the same QEMU or a newer
one, also after the host was rebooted. Its QEMU ends. Connections to its
consoles and networks are closed. Until the last step every failure ends with
the guest running on."""


def declare(commands: Commands) -> None:
    parser = commands.add_parser(
        "suspend", help="put a machine into a directory, to be resumed later",
        description=_DESCRIPTION,
    )  # fmt: skip
    parser.add_argument("name", metavar="NAME", help="the machine")
    parser.add_argument(
        "--to",
        metavar="DIR",
        help="an empty or new directory (default: /var/lib/segue/suspended/NAME for root, "
        "else $XDG_STATE_HOME/segue/suspended/NAME)",
    )
    parser.add_argument("--json", action="store_true", help="print the receipt")
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> int:
    from segue.cli import connection
    from segue.suspended import default_directory

    machine = machines.find(arguments.name)
    to = os.path.abspath(arguments.to or default_directory(machine.name))
    progress = Progress(machine.name)
    try:
        receipt = connection.ask(
            machine,
            "segue-suspend",
            {"to": to},
            timeout=_LONGEST,
            on_event=progress.event,
            unanswered=GuestLost,
        )
    except KeyboardInterrupt:
        progress.abandon()
        output.tell_failure(
            f"interrupted; machine {machine.name} is being suspended all the same",
            hint=f"segue ls shows when it has gone; it will lie in {to}",
        )
        raise
    finally:
        progress.abandon()
    if receipt["result"] == "done":
        machines.wait_until_gone(machine, timeout=30)
    if arguments.json:
        output.print_json(receipt)
    receipts.tell(receipt, successes=not arguments.json)
    if receipt["result"] == "done" and not arguments.json:
        print(f"  it goes on by: segue resume {shlex.quote(to if arguments.to else machine.name)}")
    return receipts.exit_status(receipt)
