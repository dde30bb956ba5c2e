"""Asking a target binary about a CPU model under the machine's own accelerator.

The answer is needed before the successor can be started (its `-cpu` depends on it), and `host`
means nothing without the accelerator; so a process that never runs a guest is asked.
"""

from __future__ import annotations

from typing import Any

from segue.kept.description import Description
from segue.kept.values import expand_cpu
from segue.qemu.binary import Binary, ends_with_us
from segue.qemu.instance import Instance

_LIMIT = 20.0


async def cpu(machine: Description, target: Binary) -> dict[str, Any]:
    """What the target expands the machine's CPU model to; empty where it cannot tell.

    Raises InstanceDied with its reason if it does not start under this accelerator.
    """
    line = machine.draft.command_line
    argv = [
        *ends_with_us(),
        str(target.path),
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-S",
    ]
    if machine.values.machine_type is not None:
        argv += ["-machine", machine.values.machine_type]
    for option in line.options:
        if option.name in ("accel", "enable-kvm"):
            argv += option.argv()
    if accel := line.machine().get("accel"):
        argv += ["-machine", f"accel={accel}"]
    instance = Instance.spawn(0, argv, (), on_stderr=lambda chunk: None)
    try:
        monitor = await instance.connect(_LIMIT)
        return await expand_cpu(monitor, machine.values.cpu_model or "max")
    finally:
        await instance.kill()
        instance.close()
