"""segue upgrade: replace the QEMU of one machine, or of all, one after another."""

from __future__ import annotations

import os
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from segue import machines
from segue.cli import output, receipts
from segue.cli.progress import Progress
from segue.errors import GuestLost, MonitorClosed, Partial, SegueError, UsageError

if TYPE_CHECKING:
    from segue.cli.parser import Commands

# How much longer than the supervisor's own limit we wait for it: it first undoes what it did.
_PATIENCE = 30.0
# Without a --timeout its limits are those of the phases, which add up to much less than this.
_LONGEST = 600.0

# As segue.upgrade.modes has them, which is too much to import for --help.
MODES = ("auto", "handover", "cpr-transfer", "cpr-exec", "migrate")

_DESCRIPTION = """\
Replace the QEMU of a running machine by another binary, by default by what is
now at the path of the one that runs. The guest stops for some milliseconds.
Whatever goes wrong before the new QEMU has taken over ends with the guest
running on in the old one, and says so."""

_EPILOG = """\
exit codes: 0 done, or already current; 1 failed; 5 refused, nothing was
touched; 6 timed out (in all of these the guest runs on where it was); 7 some
of several failed; 8 the guest is lost, or nobody can tell."""


def declare(commands: Commands) -> None:
    parser = commands.add_parser(
        "upgrade",
        help="replace the QEMU of a machine",
        usage="segue upgrade (NAME | --all) [--to BIN] [--mode MODE]\n"
        "                     [--rehearse] [--force] [--timeout S] [--json]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="the machine")
    parser.add_argument(
        "--all", action="store_true", help="every machine, one after another; goes on after errors"
    )
    parser.add_argument("--to", metavar="BIN", help="the QEMU to move to, of any release")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="do all of it but the last step, then go back: proof at the price of a short pause",
    )
    parser.add_argument(
        "--force", action="store_true", help="also when the QEMU that runs is the one to move to"
    )
    parser.add_argument(
        "--mode",
        metavar="MODE",
        choices=MODES,
        help="the way to do it (default auto); segue check tells which ones would work",
    )
    parser.add_argument(
        "--timeout", metavar="S", type=positive, help="give up after so many seconds and go back"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the receipt (with --all a list of them)"
    )
    parser.set_defaults(run=run)


def positive(text: str) -> float:
    """An argparse type: a finite number of seconds above zero."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ArgumentTypeError(f"{text!r} is not a number of seconds above zero")
    return value


def run(arguments: Namespace) -> int:
    if bool(arguments.name) == arguments.all:
        raise UsageError(
            "name one machine, or say --all (not both)",
            hint="segue ls shows the machines",
        )
    request: dict[str, Any] = {}
    if arguments.to:
        request["to"] = binary(arguments.to)
    if arguments.rehearse:
        request["rehearse"] = True
    if arguments.force:
        request["force"] = True
    if arguments.mode:
        request["mode"] = arguments.mode
    if arguments.timeout:
        request["timeout"] = arguments.timeout
    if arguments.all:
        return _upgrade_all(request, arguments.json)
    try:
        receipt = upgrade(machines.find(arguments.name), request)
    except SegueError as error:
        if arguments.json:
            output.print_json(receipts.from_error(arguments.name, error))
        raise
    if arguments.json:
        output.print_json(receipt)
    receipts.tell(receipt, successes=not arguments.json)
    return receipts.exit_status(receipt)


def upgrade(machine: machines.MachineStatus, request: Mapping[str, Any]) -> receipts.Receipt:
    """Have the machine's supervisor do it, with progress on stderr; returns the receipt.

    Raises SegueError where there is none: GuestLost above all, when the supervisor ended midway.
    """
    from segue.cli import connection

    progress = Progress(machine.name)
    started = time.time()
    timeout = request["timeout"] + _PATIENCE if "timeout" in request else _LONGEST
    try:
        receipt: receipts.Receipt = connection.ask(
            machine,
            "segue-upgrade",
            dict(request),
            timeout=timeout,
            on_event=progress.event,
            unanswered=GuestLost,
        )
    except MonitorClosed:
        return _after_loss(machine, started)
    except KeyboardInterrupt:
        progress.abandon()
        output.tell_failure(
            f"interrupted; the supervisor of {machine.name} goes on with the upgrade",
            hint=f"its outcome: segue history {machine.name}",
        )
        raise
    finally:
        progress.abandon()
    return receipt


def _after_loss(machine: machines.MachineStatus, started: float) -> receipts.Receipt:
    # The receipt is written before it is sent, so a supervisor that ended in between (its guest
    # may have powered off that very moment) has left it behind.
    *_, last = [{}, *machine.directory.read_receipts()]
    if last.get("started", 0) >= started:
        return last
    machines.wait_until_gone(machine, timeout=1)
    now = machines.status_of(machine.directory)
    pid = now.report.get("qemu_pid")
    if now.running:
        raise SegueError(
            f"the supervisor of machine {machine.name} closed the connection midway",
            hint=f"its outcome: segue history {machine.name}",
            guest=f"{now.state}, QEMU pid {pid}",
        )
    raise GuestLost(
        f"the supervisor of machine {machine.name} ended during the upgrade",
        hint=f"see its log: {machine.directory.log}",
        guest=f"unknown; QEMU pid {pid} lives" if now.state == "orphaned" else "lost, or ended",
    )


def _upgrade_all(request: Mapping[str, Any], json: bool) -> int:
    found = machines.list_machines()
    if not found:
        output.say("no machines")
    outcomes: list[receipts.Receipt] = []
    statuses: list[int] = []
    for listed in found:
        if listed.state == "dead":
            output.say(f"{listed.name}: left out, it is not running")
            continue
        try:
            # Looked up again: others may have taken minutes.
            receipt = upgrade(machines.find(listed.name), request)
            statuses.append(receipts.exit_status(receipt))
        except SegueError as error:
            receipt = receipts.from_error(listed.name, error)
            statuses.append(error.exit_status)
        outcomes.append(receipt)
        receipts.tell(receipt, successes=not json)
    if json:
        output.print_json(outcomes)
    return Partial.exit_status if any(statuses) else 0


def binary(path: str) -> str:
    """--to as the supervisor must see it: its working directory is not ours.

    A word without a slash is looked for in PATH, as a shell would.
    """
    if "/" in path:
        return os.path.abspath(path)
    import shutil

    found = shutil.which(path)
    if found is None:
        raise UsageError(
            f"there is no program {path} in PATH", hint=f"for a file right here: --to ./{path}"
        )
    return os.path.abspath(found)
