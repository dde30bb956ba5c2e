"""Values that mean something else in the next release, or are drawn anew at each start.

They are noted when the first instance runs, and told to every later one.
"""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from segue.errors import CommandFailed
from segue.kept.base import Lending
from segue.kept.draft import Computed, Draft
from segue.qemu.commandline import Option
from segue.qemu.monitor import Monitor
from segue.qemu.options import Params

# CPU models whose meaning depends on the host, the accelerator and the release.
FLOATING_CPUS = ("host", "max", "base")

# Versioned machine types tell a new QEMU what an older one understands; for others we do.
_UNVERSIONED = ("microvm",)
_SWITCHOVER_START = (10, 0, 0)

# Some releases have these and others not, or with another default.
_SWITCHES = frozenset(("full-cpuid-auto-level", "legacy-multi-node", "pmu"))


@dataclass
class Values:
    """What the first instance made of the user's words; empty until `learn`."""

    cpu_model: str | None = None
    machine_type: str | None = None
    cpu: dict[str, Any] = field(default_factory=dict)

    async def learn(self, monitor: Monitor) -> None:
        name = await monitor.execute("qom-get", {"path": "/machine", "property": "type"})
        self.machine_type = name.removesuffix("-machine")
        if self.cpu_model is not None:
            self.cpu = await expand_cpu(monitor, self.cpu_model)
            await self._correct(monitor)

    async def _correct(self, monitor: Monitor) -> None:
        """An expansion has what the user asked for, also where the accelerator cannot give it."""
        asked = [n for n, v in wishes(self.cpu_model or "").items() if v is True and n in self.cpu]
        if asked:
            path = (await monitor.execute("query-cpus-fast"))[0]["qom-path"]
            for name in asked:
                with contextlib.suppress(CommandFailed):  # a word for how the CPU is made
                    self.cpu[name] = await monitor.execute(
                        "qom-get", {"path": path, "property": name}
                    )

    def to_json(self) -> dict[str, Any]:
        return {"machine_type": self.machine_type, "cpu": self.cpu}

    def recall(self, noted: dict[str, Any]) -> None:
        """What another supervisor noted of this machine, by `to_json`."""
        self.machine_type, self.cpu = noted["machine_type"], noted["cpu"]

    def cpu_arguments(self, target: dict[str, Any]) -> str:
        """`-cpu`'s value for a target whose own expansion of the model is `target`.

        What the target would switch on by itself, and the first instance had not, is off. But not
        what a versioned machine type switches on so that the CPU is the one of its time
        (x-arch-cap-always-on of 10.1: without it an AMD CPU loses a bit of CPUID).
        """
        versioned = self.machine_type not in _UNVERSIONED
        settings = {n: v for n, v in self.cpu.items() if n in target}
        for name, value in target.items():
            if value is True and name not in self.cpu and not (versioned and name[:2] == "x-"):
                settings[name] = False
        changed = {n: v for n, v in settings.items() if target[n] != v}
        model = self.cpu_model or ""
        # What the target does not know is off there.
        said = {n: v for n, v in wishes(model).items() if n in target or v is not False}
        words = [f"{name}={_text(value)}" for name, value in (said | changed).items()]
        return ",".join([model.partition(",")[0], *words])

    def cpu_lacks(self, target: dict[str, Any]) -> list[str]:
        """Features that the guest was shown, and that the target does not know or cannot give."""
        shown = (n for n, v in self.cpu.items() if v is True and not _is_switch(n))
        return sorted(n for n in shown if "_" not in n and target.get(n, False) is False)


def _is_switch(name: str) -> bool:
    """Whether a CPU property says how CPUID is made up, and is not itself something in it."""
    return name.startswith("x-") or name in _SWITCHES


async def expand_cpu(monitor: Monitor, model: str) -> dict[str, Any]:
    """Every property of a CPU model as this binary means it; empty where it cannot tell.

    query-cpu-model-expansion, QEMU 2.8; aarch64 answers with few properties and for few models.
    """
    given: dict[str, Any] = {"name": model.partition(",")[0]}
    props = wishes(model)
    if props:
        given["props"] = props
    try:
        answer = await monitor.execute(
            "query-cpu-model-expansion", {"type": "full", "model": given}
        )
    except CommandFailed:
        return {}
    expanded: dict[str, Any] = answer["model"].get("props", {})
    return expanded


def wishes(model: str) -> dict[str, Any]:
    """The properties that a `-cpu` sets: `x=on`, `+x` and `-x`, of which the last two win."""
    props: dict[str, Any] = {}
    signed: dict[str, Any] = {}
    rest = model.partition(",")[2]
    for key, value in Params.parse(rest).items() if rest else ():
        if key[0] in "+-":
            signed[key[1:]] = key[0] == "+"
        else:
            props[key] = {"on": True, "off": False}.get(value, value)
    return props | signed


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


class ValuesRule:
    """Machine alias, floating CPU models, and `guid=auto`."""

    def __init__(self, values: Values) -> None:
        self._values = values

    def apply(self, draft: Draft) -> None:
        for option in draft.options("device"):
            self._fix_guid(draft, option)

        def machine(lending: Lending) -> list[str]:
            known = self._values.machine_type
            words = [] if lending.first or known is None else ["-machine", f"type={known}"]
            if draft.command_line.machine().get("type") in _UNVERSIONED:
                if lending.target.version >= _SWITCHOVER_START:
                    words += ["-global", "migration.send-switchover-start=off"]
            return words

        draft.add(Computed(machine))
        for option in draft.options("cpu"):
            if (option.value or "").partition(",")[0] in FLOATING_CPUS:
                self._values.cpu_model = option.value
                draft.replace(option, Computed(partial(self._cpu, option)))

    def _cpu(self, option: Option, lending: Lending) -> list[str]:
        if lending.first or not lending.cpu:
            return option.argv()
        return ["-cpu", self._values.cpu_arguments(lending.cpu)]

    def _fix_guid(self, draft: Draft, option: Option) -> None:
        if option.params.get("driver") == "vmgenid" and option.params.get("guid") == "auto":
            name = f"guid {option.params.get('id') or ''}"
            guid = draft.decide(name, lambda: str(uuid.uuid4()), otherwise="auto")
            draft.replace(option, option.with_params(option.params.set("guid", guid)))
