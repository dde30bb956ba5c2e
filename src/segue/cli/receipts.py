"""Receipts of upgrades (segue.upgrade.receipt): their exit codes, and how they read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from segue.cli import output
from segue.errors import GuestLost, Refused, SegueError, TimedOut
from segue.upgrade import receipt as results

Receipt = Mapping[str, Any]

EXIT_STATUS = {
    results.DONE: 0,
    results.CURRENT: 0,
    results.REHEARSED: 0,
    results.FAILED: SegueError.exit_status,
    results.REFUSED: Refused.exit_status,
    results.TIMED_OUT: TimedOut.exit_status,
    results.LOST: GuestLost.exit_status,
}


def exit_status(receipt: Receipt) -> int:
    """A result that this release has never heard of proves nothing about the guest."""
    return EXIT_STATUS.get(receipt["result"], GuestLost.exit_status)


def from_error(machine: str, error: SegueError) -> Receipt:
    """What `upgrade --json` prints where the supervisor could not give a receipt."""
    receipt = results.Receipt(machine, time.time(), guest="unknown")
    receipt.failed(error)
    return receipt.to_json()


def side(receipt: Receipt, which: str) -> Mapping[str, Any]:
    """`from` or `to`, also of a receipt that ended before that was known."""
    return receipt[which] or {"version": "?", "pid": "?"}


def sentence(receipt: Receipt) -> str:
    """One receipt in one line."""
    name = receipt["machine"]
    old, new = side(receipt, "from"), side(receipt, "to")
    before, after = output.version(old["version"]), output.version(new["version"])
    # A guest that was paused all the time has none.
    pause = receipt["blackout_seconds"]
    blackout = "" if pause is None else f"blackout {output.seconds(pause)}, "
    match receipt["result"]:
        case results.DONE if receipt["mode"] == "suspend":
            return f"{name}: {receipt['guest']}"
        case results.DONE:
            return (
                f"{name}: QEMU {before} → {after}, pid {old['pid']} → {new['pid']}, "
                f"{blackout}{output.counted(len(receipt['kept']), 'object')} kept"
            )
        case results.CURRENT:
            return f"{name}: already runs QEMU {after}"
        case results.REHEARSED:
            return (
                f"{name}: QEMU {before} → {after} would work (rehearsed, {blackout}"
                "the guest goes on where it was)"
            )
        case result:
            error = receipt.get("error") or {}
            return output.one_line(f"{name}: {result}: {error.get('what', 'no reason given')}")


def tell(receipt: Receipt, successes: bool = True) -> None:
    """The outcome for a person: success on stdout, anything else as an error on stderr."""
    for warning in receipt.get("warnings", ()):
        output.say(output.one_line(f"warning: {warning}"))
    if exit_status(receipt):
        error = receipt.get("error") or {}
        output.tell_failure(
            sentence(receipt), error.get("hint"), receipt.get("guest"), receipt["blockers"]
        )
    elif successes:
        print(sentence(receipt))
        if receipt["result"] == results.CURRENT:
            return  # nothing was lost, since nothing was done
        for loss in receipt["not_kept"]:
            print(f"  not kept: {output.one_line(loss['what'])}: {output.one_line(loss['why'])}")
