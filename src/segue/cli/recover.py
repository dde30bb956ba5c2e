"""segue recover: take a machine up whose supervisor has died."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from segue import machines

if TYPE_CHECKING:
    from segue.cli.parser import Commands

_DESCRIPTION = """\
Start a new supervisor for a machine whose own was killed; its guest has gone on
meanwhile. An upgrade that was under way is finished or undone, whichever is
safe. Clients' connections are taken back from QEMU, which holds them."""


def declare(commands: Commands) -> None:
    parser = commands.add_parser(
        "recover",
        help="take a machine up whose supervisor has died",
        description=_DESCRIPTION,
    )
    parser.add_argument("name", metavar="NAME", help="the machine")
    parser.add_argument(
        "--foreground",
        action="store_true",
        help="stay, and end as its QEMU does; without it, return when the machine is taken up",
    )
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> int:
    from segue import begin

    status = begin.recover(arguments.name, detach=not arguments.foreground)
    if status == 0 and not arguments.foreground:
        machine = machines.find(arguments.name)
        print(f"{machine.name}: taken up; its guest is {machine.state}")
    return status
