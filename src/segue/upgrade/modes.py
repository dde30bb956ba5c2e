"""The ways to replace an instance, and which of them would work for one machine.

mode           what it does                                             from QEMU
handover       device state to a successor on the same RAM              7.2
cpr-transfer   QEMU's own, descriptors over a channel of its own        10.0 on both sides
cpr-exec       QEMU's own: the same process executes the new binary     10.2 on both sides
migrate        RAM is copied too, into memory of the successor's        7.2
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from segue.errors import Blocker
from segue.kept import confined
from segue.qemu.binary import Binary
from segue.qemu.commandline import CommandLine
from segue.upgrade.cpr_exec import CprExec
from segue.upgrade.cpr_transfer import CprTransfer, incoming
from segue.upgrade.handover import Handover
from segue.upgrade.migrate import Migrate

AUTO = "auto"
CPR_TRANSFER_SINCE = (10, 0, 0)
CPR_EXEC_SINCE = (10, 2, 0)
VFIO_SINCE = (10, 1, 0)


@dataclass(frozen=True)
class Facts:
    """What there is to judge: `argv` is what the running QEMU was given, `vfio` has the types of
    its VFIO devices, and `kvm` says whether it runs the guest on KVM."""

    running: Binary
    target: Binary
    argv: Sequence[str]
    vfio: Collection[str] = ()
    kvm: bool = False


@dataclass(frozen=True)
class Mode:
    """`judge` gives the reasons against it that other modes do not have; `rehearsal` is the mode
    in which it is rehearsed first.

    `incoming` are the words, for a run directory, with which a successor waits for its state.
    """

    name: str
    transaction: type[Handover]
    judge: Callable[[Facts], list[Blocker]]
    incoming: Callable[[Path], tuple[str, ...]] = lambda directory: ("-incoming", "defer")
    copies_ram: bool = False
    rehearsal: str | None = None


def without_vfio(vfio: Collection[str], remedy: str = "unplug it before") -> list[Blocker]:
    """Where another process would have to open the devices anew, or the state is not all ours."""
    return [
        Blocker(
            f"device {driver}",
            "a VFIO group is open in one process only, and the device's state is in the hardware: "
            "only QEMU's own modes pass it on, and with them the guest is lost if the upgrade "
            "fails once it was stopped",
            remedy,
        )
        for driver in vfio
    ]


def _ours(facts: Facts) -> list[Blocker]:
    return without_vfio(
        facts.vfio, "use --mode cpr-transfer if you accept that, or unplug it before"
    )


def _cpr_transfer(facts: Facts) -> list[Blocker]:
    return _cpr("cpr-transfer", CPR_TRANSFER_SINCE, facts)


def _cpr_exec(facts: Facts) -> list[Blocker]:
    blockers = _cpr("cpr-exec", CPR_EXEC_SINCE, facts)
    reasons = {
        "spawn=deny": "the sandbox forbids QEMU to execute anything",
        "elevateprivileges=deny": "the sandbox forbids QEMU to execute anything",
        "tap,": "taps are lent to one process at a time, and this is the same one",
    }
    return blockers + [
        Blocker("mode cpr-exec", reason, "use --mode handover")
        for word, reason in reasons.items()
        if any(word in given for given in facts.argv)
    ]


def _cpr(name: str, since: tuple[int, int, int], facts: Facts) -> list[Blocker]:
    running, target = facts.running, facts.target
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
    if not blockers and not any("aux-ram-share=on" in word for word in facts.argv):
        blockers.append(
            Blocker(
                mode,
                "the running QEMU was not started with aux-ram-share=on",
                "hand over once (--mode handover), which starts it so",
            )
        )
    if confined.is_confined(CommandLine.parse(facts.argv)):
        blockers.append(
            Blocker(
                mode,
                "after chroot= or user= QEMU can neither reach sockets by name nor be built anew",
                "use --mode handover",
            )
        )
    return blockers + _vfio(facts)


def _vfio(facts: Facts) -> list[Blocker]:
    """QEMU keeps VFIO descriptors from 10.1 on. Under TCG 11.1 crashes and the guest is lost."""
    blockers = []
    for driver in facts.vfio:
        blockers += [
            Blocker(
                f"device {driver}",
                f"QEMU {binary.version_text} at {binary.path} cannot pass it on",
                "QEMU can from 10.1 on; unplug it before",
            )
            for binary in (facts.running, facts.target)
            if binary.version < VFIO_SINCE
        ]
        if not facts.kvm:
            blockers.append(
                Blocker(
                    f"device {driver}",
                    "without KVM QEMU crashes when it passes a VFIO device on, and the guest is "
                    "lost",
                    "use -accel kvm, or unplug it before",
                )
            )
    return blockers


MODES = {
    mode.name: mode
    for mode in (
        Mode("handover", Handover, _ours),
        Mode("cpr-transfer", CprTransfer, _cpr_transfer, incoming),
        Mode("cpr-exec", CprExec, _cpr_exec, rehearsal="handover"),
        Mode("migrate", Migrate, _ours, copies_ram=True),
    )
}


def judge(facts: Facts) -> dict[str, tuple[Blocker, ...]]:
    """For each mode what stands against it alone."""
    return {name: tuple(dict.fromkeys(mode.judge(facts))) for name, mode in MODES.items()}


def choose(
    wanted: str, judged: Mapping[str, Sequence[Blocker]], vfio: Collection[str] = ()
) -> tuple[Mode, str]:
    """The mode to use, and why.

    `auto` is the first that nothing stands against, since they are in the order of their pauses
    (docs/benchmarks.md); where there is none, the one whose reasons help most. With VFIO devices
    no mode has a way back after STOP, and that is not chosen for anybody.
    """
    if wanted != AUTO:
        return MODES[wanted], "it was asked for"
    if vfio:
        return MODES["handover"], "with VFIO a mode must be asked for: none can be undone"
    for name, blockers in judged.items():
        if not blockers:
            shorter = takewhile(lambda item: item[1], judged.items())
            passed = [f"not {other}: {reasons[0].why}" for other, reasons in shorter]
            why = "it has the shortest pause of those that keep everything"
            return MODES[name], "; ".join([why, *passed])
    return MODES["handover"], "no mode would work here"
