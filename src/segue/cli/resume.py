"""segue resume: a suspended machine goes on."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from segue.cli.parser import Commands

_DESCRIPTION = """\
Let a machine go on that was put into a directory by segue suspend. Nothing is
resumed twice, nor with disks that have changed meanwhile, nor from files that
are damaged; if it cannot be resumed, the directory stays as it was."""


def declare(commands: Commands) -> None:
    parser = commands.add_parser(
        "resume", help="let a suspended machine go on", description=_DESCRIPTION
    )
    parser.add_argument(
        "name", metavar="NAME|DIR", help="the machine, or the directory that it lies in"
    )
    parser.add_argument(
        "--to", metavar="BIN", help="the QEMU to use (default: the path of the one that ran it)"
    )
    parser.add_argument("--name", dest="new_name", metavar="NAME", help="give it another name")
    parser.add_argument("--detach", action="store_true", help="return when the guest is running")
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> int:
    from segue import begin
    from segue.cli.upgrade import binary
    from segue.suspended import Suspended, default_directory

    directory = Path(arguments.name)
    if "/" not in arguments.name:
        directory = default_directory(arguments.name)
    suspended = Suspended.open(directory.absolute())
    try:
        to = Path(binary(arguments.to)) if arguments.to else None
        name = arguments.new_name or suspended.machine["name"]
        return begin.run_suspended(suspended, name, to, detach=arguments.detach)
    finally:
        suspended.close()
