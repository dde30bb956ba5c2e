"""The first phase: what an upgrade would do, and every reason why it cannot. Touches nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segue.errors import Blocker
from segue.kept.description import Description
from segue.kept.draft import Note
from segue.qemu.binary import Binary, missing_devices, probe
from segue.qemu.instance import Instance
from segue.upgrade import access, devices, interrupts, modes, scout
from segue.upgrade.modes import MODES, Facts, Mode

OLDEST = (7, 2, 0)
VIRTIO_MEM_KEEPS_RAM = (8, 1, 0)


@dataclass(frozen=True)
class Plan:
    """`cpu` is what the target makes of a floating CPU model (see kept/values.py).

    `mode` was chosen, for the reason `why`; `modes` has for each one what stands against it alone.
    `loses_interrupts`: see interrupts.py. `rehearsal`: the mode in which it can be rehearsed first.
    """

    target: Binary
    current: bool
    blockers: tuple[Blocker, ...]
    notes: tuple[Note, ...]
    cpu: dict[str, Any] = field(default_factory=dict)
    mode: Mode = MODES["handover"]
    why: str = ""
    modes: dict[str, tuple[Blocker, ...]] = field(default_factory=dict)
    loses_interrupts: bool = False

    @property
    def rehearsal(self) -> str | None:
        name = self.mode.rehearsal
        return name if name is not None and not self.modes[name] else None


async def make(
    machine: Description,
    incumbent: Instance,
    running: Binary,
    to: Path,
    outdated: bool,
    wanted: str = modes.AUTO,
) -> Plan:
    """Judge `to` for this machine. Raises Refused if it is not a QEMU that answers."""
    target = await probe(to)
    types = await devices.types(incumbent.monitor)
    vfio = devices.vfio(types)
    kvm = await incumbent.monitor.execute("query-kvm")
    facts = Facts(running, target, incumbent.argv, vfio, kvm["enabled"])
    judged = modes.judge(facts)
    mode, why = modes.choose(wanted, judged, vfio)
    blockers = [
        *machine.draft.blockers,
        *judged[mode.name],
        *_binary(machine, running, target),
        *await incumbent_blockers(incumbent, cpr=bool(vfio) and not judged[mode.name]),
        *await access.blockers(incumbent, machine.draft.command_line),
        *await machine.survey(incumbent.monitor),
        *await interrupts.blockers(incumbent, running),
    ]
    if target.target == running.target:
        blockers += await _devices(types, target)
    cpu: dict[str, Any] = {}
    if machine.values.cpu and not blockers:
        cpu = await scout.cpu(machine, target)
        blockers += [
            Blocker(
                f"CPU feature {name}",
                f"the guest was shown it, and QEMU {target.version_text} does not have it",
                f"start the machine with -cpu {machine.values.cpu_model},{name}=off",
            )
            for name in machine.values.cpu_lacks(cpu)
        ]
    return Plan(
        target,
        target.build_id == running.build_id and not outdated,
        tuple(blockers),
        (*machine.draft.notes, *machine.changes.notes),
        cpu,
        mode,
        why,
        judged,
        await interrupts.can_be_lost(incumbent, running),
    )


def _binary(machine: Description, running: Binary, target: Binary) -> list[Blocker]:
    name = f"QEMU {target.version_text} at {target.path}"
    blockers = []
    if target.target != running.target:
        return [
            Blocker(
                name, f"it is for {target.target} guests, not {running.target}", "name another --to"
            )
        ]
    if target.version < OLDEST:
        blockers.append(Blocker(name, "it is older than 7.2", "name a QEMU from 7.2 on"))
    if not target.has_ignore_shared:
        blockers.append(
            Blocker(name, "it lacks the migration capability x-ignore-shared", "name another --to")
        )
    machine_type = machine.values.machine_type
    if machine_type is not None and target.machine(machine_type) is None:
        blockers.append(
            Blocker(
                f"machine type {machine_type}",
                f"{name} does not know it",
                "name a QEMU that does; a machine type is for the guest's whole life",
            )
        )
    return blockers


async def _devices(types: set[str], target: Binary) -> list[Blocker]:
    """What the guest was given that the target cannot make."""
    name = f"QEMU {target.version_text} at {target.path}"
    blockers = [
        Blocker(f"device {driver}", f"{name} lacks it", "install the package that has it")
        for driver in await missing_devices(target.path, types)
    ]
    if target.version < VIRTIO_MEM_KEEPS_RAM:
        blockers += [
            Blocker(
                f"device {driver}",
                "before QEMU 8.1 a successor empties its memory merely by starting",
                "name a QEMU from 8.1 on",
            )
            for driver in sorted(types)
            if driver.startswith("virtio-mem")
        ]
    return blockers


async def incumbent_blockers(incumbent: Instance, *, cpr: bool = False) -> list[Blocker]:
    """What the running QEMU itself says against being migrated, or moved by a mode of its own.

    It tells what stands against the mode that is set. A VFIO device stands against the normal one.
    """
    monitor = incumbent.monitor
    if cpr:
        await monitor.execute("migrate-set-parameters", {"mode": "cpr-transfer"})
    try:
        answer = await monitor.execute("query-migrate")
    finally:
        if cpr:
            await monitor.execute("migrate-set-parameters", {"mode": "normal"})
    return [
        Blocker("QEMU", reason, "remove what it names")
        for reason in answer.get("blocked-reasons", [])
    ]
