"""A machine as plain data and descriptors, and a supervisor made of them again.

`save` gives what its supervisor knows, `load` makes another one go on with it: in the same
process after it has executed new code (reexec.py), or in another after it was killed
(recovery.py). See saved.py for what differs.

Version 1 of the data, all of it what JSON knows:

    {"version": 1, "segue": VERSION, "name", "command": [WORD], "directory", "detached", "since",
     "upgrades", "net_user", "state", "exit_status", "next_number",
     "first": BINARY, "binary": BINARY, "started": {...},
     "decisions": {...},                       see kept/draft.py
     "values": {...},                          see kept/values.py
     "instances": [{"instance": {...}, "guard": {...}}],      the first is the one that is served
     "kept": [{"kind", "name", "data"}],       in the order of the description
     "control": [{"listeners", "made"}], "console": bool,
     "qmp": {...},
     "receipts": [...], "deposits": {...}, "stored": {...}}     only where it is exact
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import segue
from segue.errors import Refused, SegueError
from segue.kept.description import Description, describe
from segue.kept.guard import Guard
from segue.qemu import mapped
from segue.qemu.binary import Binary, MachineType
from segue.qemu.commandline import CommandLine
from segue.qemu.instance import Instance
from segue.saved import Loader, Saver
from segue.store import mark

if TYPE_CHECKING:
    from segue.qmp.server import Client
    from segue.supervisor import Supervisor

VERSION = 1


def save(supervisor: Supervisor, saver: Saver, asker: Client | None = None) -> dict[str, Any]:
    """`asker` is the QMP client whose command of the moment the next process answers."""
    machine = supervisor.machine
    instances = []
    for instance in supervisor.instances:
        inner = saver.within(f"instance{instance.number}")
        guard = supervisor.guards.get(instance.number)
        instances.append(
            {
                "instance": instance.save(inner),
                "guard": {} if guard is None else guard.save(inner, instance.number),
            }
        )
    return {
        "version": VERSION,
        "segue": segue.__version__,
        "name": supervisor.name,
        "command": supervisor.line.argv(),
        "directory": os.getcwd(),
        "detached": supervisor.detached,
        "since": supervisor.since,
        "upgrades": supervisor.upgrades,
        "net_user": supervisor.net_user,
        "state": supervisor.state,
        "exit_status": supervisor.exit_status,
        "next_number": supervisor.upgrader.number,
        "first": machine.draft.binary.plain,
        "binary": supervisor.binary.plain,
        "started": supervisor.started.to_json() if supervisor.started else None,
        "decisions": machine.draft.decisions,
        "values": machine.values.to_json(),
        "instances": instances,
        "kept": [
            {
                "kind": kept.kind,
                "name": kept.name,
                "data": kept.save(saver.within(f"kept{number}")),
            }
            for number, kept in enumerate(machine.kept)
        ],
        **supervisor.entrances.save(saver),
        "qmp": supervisor.server.save(saver, asker),
        "receipts": list(supervisor.receipts) if saver.exact else [],
        "deposits": supervisor.keeper.save() if saver.exact else {},
        "stored": supervisor.store.save() if saver.exact else {},
    }


def described(data: Mapping[str, Any]) -> tuple[CommandLine, Description]:
    """The machine as this code would describe it. Touches nothing.

    Raises Refused if this code would keep something else than is kept, BadCommandLine.
    """
    if data["version"] != VERSION:
        raise Refused(
            f"the machine was saved by Segue {data['segue']}, in another form than this one reads",
            hint="go there by way of a release that knows both",
        )
    line = CommandLine.parse(data["command"])
    machine = describe(line, _binary(data["first"]), data["decisions"])
    there = [(saved["kind"], saved["name"]) for saved in data["kept"]]
    here = [(kept.kind, kept.name) for kept in machine.kept]
    if there != here:
        more = [f"{kind} {name}" for kind, name in [*there, *here] if (kind, name) not in here]
        less = [f"{kind} {name}" for kind, name in here if (kind, name) not in there]
        words = [f"does not keep {each}" for each in more] + [f"would keep {e}" for e in less]
        raise Refused(
            f"Segue {segue.__version__} {', '.join(words) or 'keeps them in another order'}",
            hint="the machine stays with its supervisor of now; start it anew to use the new one",
        )
    machine.values.recall(data["values"])
    return line, machine


def recall(supervisor: Supervisor, data: Mapping[str, Any]) -> None:
    """What is known without any descriptor."""
    supervisor.line, supervisor.machine = described(data)
    supervisor.detached = data["detached"]
    supervisor.since = data["since"]
    supervisor.upgrades = data["upgrades"]
    supervisor.net_user = data["net_user"]
    supervisor.state = data["state"]
    supervisor.exit_status = data["exit_status"]
    supervisor.upgrader.number = data["next_number"]
    supervisor.binary = _binary(data["binary"])
    supervisor.receipts = deque(data["receipts"], supervisor.receipts.maxlen)
    supervisor.keeper.load(data["deposits"])
    supervisor.store.load(data.get("stored", {}), mark(supervisor.line, supervisor.machine))
    if data["started"] is not None:
        supervisor.started = mapped.Started.from_json(data["started"])


def load_guards(supervisor: Supervisor, data: Mapping[str, Any], loader: Loader) -> None:
    """Before the first word to QEMU, which may wait for an answer of its guard's."""
    for saved in data["instances"]:
        number = saved["instance"]["number"]
        with contextlib.suppress(KeyError):  # it is dead
            guard = Guard.load(saved["guard"], loader.within(f"instance{number}"))
            if guard.armed:
                supervisor.guards[number] = guard


async def load_instance(
    supervisor: Supervisor, saved: Mapping[str, Any], loader: Loader, timeout: float = 10
) -> Instance:
    """Raises as `Instance.load`."""
    inner = loader.within(f"instance{saved['instance']['number']}")
    return await Instance.load(
        saved["instance"], inner, on_stderr=supervisor.voice.of_qemu, timeout=timeout
    )


async def load_kept(supervisor: Supervisor, data: Mapping[str, Any], loader: Loader) -> None:
    """Raises SegueError for what cannot go on."""
    for number, (kept, saved) in enumerate(zip(supervisor.machine.kept, data["kept"], strict=True)):
        inner = loader.within(f"kept{number}")
        inner.guards = supervisor.guards
        try:
            await kept.load(saved["data"], inner)
        except KeyError as error:
            raise SegueError(f"{kept.kind} {kept.name}: {error.args[0]} is lost") from None
    for guard in supervisor.guards.values():
        guard.go_on()


def close_all(loader: Loader) -> None:
    """What nobody has asked for."""
    while loader.found:
        with contextlib.suppress(OSError):
            os.close(loader.found.popitem()[1])


def _binary(plain: Mapping[str, Any]) -> Binary:
    sets = {
        name: frozenset(plain[name])
        for name in ("capabilities", "commands", "cpu_models", "displays")
    }
    major, minor, micro = plain["version"]
    return Binary(
        path=Path(plain["path"]),
        version=(major, minor, micro),
        version_text=plain["version_text"],
        target=plain["target"],
        build_id=plain["build_id"],
        machines={name: MachineType(**machine) for name, machine in plain["machines"].items()},
        deferred_irqfd=plain["deferred_irqfd"],
        **sets,
    )
