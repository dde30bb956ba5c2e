"""segue history: the receipts of a machine's upgrades, also when it has died."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from segue import machines
from segue.cli import output, receipts

if TYPE_CHECKING:
    from segue.cli.parser import Commands

_DESCRIPTION = "List what upgrades of a machine were tried, oldest first, and how each ended."


def declare(commands: Commands) -> None:
    parser = commands.add_parser(
        "history", help="list a machine's upgrades", description=_DESCRIPTION
    )
    parser.add_argument("name", metavar="NAME", help="the machine")
    parser.add_argument("--json", action="store_true", help="print a list of receipts")
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> int:
    machine = machines.find_any(arguments.name)
    if machine.running:
        # The supervisor also knows those that it could not write, on a full disk.
        from segue.cli import connection

        found = connection.ask(machine, "segue-history")
    else:
        found = machine.directory.read_receipts()
    if arguments.json:
        output.print_json(found)
    elif found:
        output.print_table(
            "WHEN RESULT FROM TO BLACKOUT TOTAL WHY".split(),
            [_row(receipt) for receipt in found],
            right="BLACKOUT TOTAL",
        )
    else:
        output.say(f"{machine.name} has not been upgraded yet")
    return 0


def _row(receipt: receipts.Receipt) -> list[object]:
    return [
        output.moment(receipt.get("started")),
        receipt["result"],
        output.version(receipts.side(receipt, "from")["version"]),
        output.version(receipts.side(receipt, "to")["version"]),
        output.seconds(receipt["blackout_seconds"]),
        output.seconds(sum(receipt["phases"].values())),
        _why(receipt),
    ]


def _why(receipt: receipts.Receipt) -> str:
    blockers = receipt.get("blockers")
    if blockers:
        return "; ".join(output.one_line(f"{each['what']}: {each['why']}") for each in blockers)
    return output.one_line((receipt.get("error") or {}).get("what", ""))
