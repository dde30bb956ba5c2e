"""segue run: a machine from QEMU's own command line."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from segue.errors import UsageError

if TYPE_CHECKING:
    from segue.cli.parser import Commands

_DESCRIPTION = """\
Start a machine. What follows is QEMU's own command line, exactly as you would
give it to your shell; stdin, stdout, signals and the exit status are QEMU's
own as well. What cannot be kept over an upgrade is said at the start."""

_EPILOG = """\
examples:
  segue run -- qemu-system-x86_64 -m 2G -nographic disk.qcow2
  segue run --name web --detach -- qemu-system-x86_64 -m 2G disk.qcow2"""


def declare(commands: Commands) -> None:
    parser = commands.add_parser(
        "run",
        help="start a machine from QEMU's own command line",
        usage="segue run [--name NAME] [--detach] [--net-user=HOW] -- QEMU ARGS...",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--name", metavar="NAME", help="the machine's name (default: from -name, else qemu-PID)"
    )
    parser.add_argument(
        "--detach",
        action="store_true",
        help="return when the guest is running; prints the name if none was given",
    )
    parser.add_argument(
        "--net-user",
        choices=("auto", "passt", "slirp"),
        default="auto",
        help="what user networking is made of: passt, whose connections outlive an upgrade, or "
        "QEMU's own slirp (default: passt where it is installed and can do what is asked)",
    )
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> int:
    if not arguments.words:
        raise UsageError(
            "which QEMU is to run, and with which arguments?",
            hint="segue run -- qemu-system-x86_64 ARGS...",
        )
    from segue import begin, machines

    name = arguments.name or machines.default_name(arguments.words)
    status = begin.run(name, arguments.words, detach=arguments.detach, net_user=arguments.net_user)
    if arguments.detach and status == 0 and not arguments.name:
        print(name)
    return status
