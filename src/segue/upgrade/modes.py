"""The ways to replace an instance, and which of them would work for one machine.

mode           what it does                                             from QEMU
handover       device state to a successor on the same RAM              7.2
cpr-transfer   QEMU's own, descriptors over a channel of its own        10.0 on both sides
cpr-exec       QEMU's own: the same process executes the new binary     10.2 on both sides
migrate        RAM is copied too, into memory of the successor's        7.2
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from segue.errors import Blocker
from segue.qemu.binary import Binary
from segue.upgrade.cpr_exec import CprExec
from segue.upgrade.cpr_transfer import CprTransfer, incoming
from segue.upgrade.handover import Handover
from segue.upgrade.migrate import Migrate

AUTO = "auto"
CPR_TRANSFER_SINCE = (10, 0, 0)
CPR_EXEC_SINCE = (10, 2, 0)


@dataclass(frozen=True)
class Mode:
    """`judge` gives the reasons against it that other modes do not have; `rehearsal` is the mode
    in which it is rehearsed first.

    `incoming` are the words, for a run directory, with which a successor waits for its state.
    """

    name: str
    transaction: type[Handover]
    judge: Callable[[Binary, Binary, Sequence[str]], list[Blocker]]
    incoming: Callable[[Path], tuple[str, ...]] = lambda directory: ("-incoming", "defer")
    copies_ram: bool = False
    rehearsal: str | None = None


def _always(running: Binary, target: Binary, argv: Sequence[str]) -> list[Blocker]:
    return []


def _cpr_transfer(running: Binary, target: Binary, argv: Sequence[str]) -> list[Blocker]:
    return _cpr("cpr-transfer", CPR_TRANSFER_SINCE, running, target, argv)


def _cpr_exec(running: Binary, target: Binary, argv: Sequence[str]) -> list[Blocker]:
    blockers = _cpr("cpr-exec", CPR_EXEC_SINCE, running, target, argv)
    reasons = {
        "spawn=deny": "the sandbox forbids QEMU to execute anything",
        "elevateprivileges=deny": "the sandbox forbids QEMU to execute anything",
        "tap,": "taps are lent to one process at a time, and this is the same one",
    }
    return blockers + [
        Blocker("mode cpr-exec", reason, "use --mode handover")
        for word, reason in reasons.items()
        if any(word in given for given in argv)
    ]


def _cpr(
    name: str,
    since: tuple[int, int, int],
    running: Binary,
    target: Binary,
    argv: Sequence[str],
) -> list[Blocker]:
    mode = f"mode {name}"
    blockers = [
        Blocker(
            mode,
            f"QEMU {binary.version_text} at {binary.path} does not have it",
            f"QEMU has it from {since[0]}.{since[1]} on; use --mode handover",
        )
        for binary in (running, target)
        if binary.version < since
    ]
    if target.version < running.version:
        blockers.append(
            Blocker(
                mode,
                f"QEMU {target.version_text} is older than {running.version_text}, "
                "and cannot read what it sends",
                "use --mode handover",
            )
        )
    if not blockers and not any("aux-ram-share=on" in word for word in argv):
        blockers.append(
            Blocker(
                mode,
                "the running QEMU was not started with aux-ram-share=on",
                "hand over once (--mode handover), which starts it so",
            )
        )
    return blockers


MODES = {
    mode.name: mode
    for mode in (
        Mode("handover", Handover, _always),
        Mode("cpr-transfer", CprTransfer, _cpr_transfer, incoming),
        Mode("cpr-exec", CprExec, _cpr_exec, rehearsal="handover"),
        Mode("migrate", Migrate, _always, copies_ram=True),
    )
}


def judge(running: Binary, target: Binary, argv: Sequence[str]) -> dict[str, tuple[Blocker, ...]]:
    """For each mode what stands against it alone; `argv` is what the running QEMU was given."""
    return {name: tuple(mode.judge(running, target, argv)) for name, mode in MODES.items()}


def choose(wanted: str, judged: dict[str, tuple[Blocker, ...]]) -> tuple[Mode, str]:
    """The mode to use, and why. `auto` is the first that nothing stands against: the shortest."""
    if wanted != AUTO:
        return MODES[wanted], "it was asked for"
    name = next((n for n, blockers in judged.items() if not blockers), "handover")
    return MODES[name], "it has the shortest pause of those that keep everything"
