"""segue check: what an upgrade would do, and what stands in its way; touches nothing."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from segue import machines
from segue.cli import output
from segue.cli.upgrade import MODES, binary
from segue.errors import CommandFailed, Refused, SegueError

if TYPE_CHECKING:
    from segue.cli.parser import Commands

# The target binary is started, perhaps for the first time, to see what it knows.
_PROBE_TIMEOUT = 60.0

_DESCRIPTION = """\
Say what an upgrade would do, what it would not keep, and every reason why it
would be refused, each with the change that would help. Nothing is touched.
Exits with 5 if it would be refused. To try it on the running guest: segue
upgrade NAME --rehearse."""


def declare(commands: Commands) -> None:
    parser = commands.add_parser(
        "check", help="say what an upgrade would do", description=_DESCRIPTION
    )
    parser.add_argument("name", metavar="NAME", help="the machine")
    parser.add_argument(
        "--to", metavar="BIN", help="the QEMU to move to (default: the path of the one that runs)"
    )
    parser.add_argument(
        "--mode", metavar="MODE", choices=MODES, help="as for segue upgrade (default auto)"
    )
    parser.add_argument("--json", action="store_true", help="print an object")
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> int:
    from segue.cli import connection

    request = {"to": binary(arguments.to)} if arguments.to else {}
    if arguments.mode:
        request["mode"] = arguments.mode
    machine = machines.find(arguments.name)
    try:
        plan = connection.ask(machine, "segue-check", request, timeout=_PROBE_TIMEOUT)
    except SegueError as error:
        if not isinstance(error.__cause__, CommandFailed):
            raise
        raise Refused(error.what, error.hint, error.guest) from None  # what upgrade would say
    if arguments.json:
        output.print_json(plan)
    else:
        _show(machine.name, plan)
    return Refused.exit_status if plan["blockers"] else 0


def _show(name: str, plan: Mapping[str, Any]) -> None:
    old, new = output.version(plan["from"]["version"]), output.version(plan["to"]["version"])
    if plan["current"]:
        print(f"{name}: already runs QEMU {new} ({plan['to']['path']})")
    else:
        print(f"{name}: QEMU {old} → {new} ({plan['to']['path']})")
    for loss in plan["not_kept"]:
        print(f"  not kept: {output.one_line(loss['what'])}: {output.one_line(loss['why'])}")
    for mode, reasons in plan["modes"].items():
        chosen = f"  ({plan['why']})" if mode == plan["mode"] else ""
        against = "; ".join(f"{r['why']} ({r['remedy']})" for r in reasons)
        print(f"  mode {mode}: {against or 'possible'}{chosen}")
    for note in plan["notes"]:
        print(f"  note: {output.one_line(note)}")
    for blocker in plan["blockers"]:
        print(f"  blocker: {output.blocker_text(blocker)}")
    if not plan["blockers"] and not plan["current"]:
        print("  nothing stands in the way")
